"""Real Sentinel groups for tests: a primary, its replicas, and the processes that watch them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Self

import redis

from tests.support.servers import QUICK_SYNC, Engine, Server
from tests.support.waiting import wait_until

NAME = "flows"
_HEALTHY_WITHIN_S = 60.0
# No shorter: a replica is demoted that has been primary for four publications, which is how the promoted one looks
# until the others hear of it, and they take a second for that. And a ping must be back before `down_after_ms`.
_HURRIED = {"info-period": 500, "publish-period": 500, "ask-period": 500, "ping-period": 500}


class Sentinels:
    """A primary, replicas and Sentinels on 127.0.0.1; leaving the context ends them all.

    The Sentinels are hurried, unless told otherwise: they look and talk every half second. Left at their own pace, a
    primary replaced by plan goes on taking writes for some ten seconds, which will be lost.
    """

    def __init__(
        self,
        engine: Engine,
        *config_args: str,
        replicas: int = 2,
        sentinels: int = 3,
        down_after_ms: int = 1000,
        persistence: bool = True,
        hurried: bool = True,
        tls: Sequence[str] = (),
    ) -> None:
        """Describe a group; entering the context starts it.

        Args:
            engine: what everything runs.
            config_args: for the servers with data, as for a `Server`.
            replicas: how many the primary has.
            sentinels: how many watch; the greater half must agree.
            down_after_ms: after which silence one of them thinks the primary dead.
            persistence: whether servers keep their data over a restart.
            hurried: whether they act faster than in production.
            tls: settings of a certificate, as for a `Server`, for all of them.
        """
        self.engine = engine
        self.servers: list[Server] = []
        self.sentinels: list[Server] = []
        self._counts = (1 + replicas, sentinels)
        self._config_args = (*QUICK_SYNC, *config_args)
        self._down_after_ms = down_after_ms
        self._persistence = persistence
        self._hurried = hurried
        self._tls = tls
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *failure: object) -> None:
        self._stack.close()

    # --- looking at it

    @property
    def url(self) -> str:
        """Every Sentinel, running or not."""
        addresses = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis{'s' if self._tls else ''}+sentinel://{addresses}/{NAME}/0"

    def primary(self) -> Server:
        """Return who the Sentinels say it is; the newest, if they differ."""
        watching = [sentinel for sentinel in self.sentinels if sentinel.up]
        newest = max(watching, key=lambda sentinel: int(_ask(sentinel, "MASTER")["config-epoch"]))
        port = _primary_port(newest)
        found = [server for server in self.servers if server.port == port]
        assert found, f"{port} is none of ours"
        return found[0]

    def replicas(self) -> list[Server]:
        """Return the servers that run and are not the primary, whatever they take themselves for."""
        primary = self.primary()
        return [server for server in self.servers if server.up and server is not primary]

    def await_healthy(self) -> None:
        """Wait until all that run agree on a primary that runs, and all others replicate it.

        A server that is down is no illness, unless it is thought to be the primary.
        """
        wait_until(
            self._check,
            description="the group is healthy",
            timeout_s=_HEALTHY_WITHIN_S,
            ignoring=(AssertionError, redis.RedisError),
        )

    # --- faults

    def fail_over(self) -> Server:
        """Replace the primary by plan, and return the new one once every Sentinel names it.

        The old one may take writes for longer: see `await_healthy`.
        """
        old = self.primary()
        leader = next(sentinel for sentinel in self.sentinels if sentinel.up)
        wait_until(
            lambda: leader.raw.execute_command("SENTINEL", "FAILOVER", NAME),
            description="the failover is begun",
            timeout_s=_HEALTHY_WITHIN_S,
            ignoring=(redis.ResponseError,),  # INPROG, NOGOODSLAVE: one is just ending
        )
        wait_until(
            lambda: all(_primary_port(sentinel) != old.port for sentinel in self.sentinels if sentinel.up),
            description="the Sentinels name a new primary",
            timeout_s=_HEALTHY_WITHIN_S,
        )
        return self.primary()

    def kill_primary(self) -> Server:
        """End it as a crash would, and return it; `await_healthy` waits for the next one."""
        primary = self.primary()
        primary.kill()
        return primary

    def restart(self, server: Server) -> None:
        """Start a server or Sentinel again, where it was; stop it first if it runs.

        What was primary comes back as one, until the Sentinels see it.
        """
        server.restart()
        if server in self.sentinels:
            self._hurry(server)

    def pause(self, server: Server) -> None:
        """Freeze a server or Sentinel."""
        server.pause()

    def resume(self, server: Server) -> None:
        """Let it go on; it may take itself for the primary for a moment more."""
        server.resume()

    def _start(self) -> None:
        count, sentinel_count = self._counts
        for _ in range(count):
            server = Server(self.engine, *self._config_args, persistence=self._persistence, tls=self._tls)
            self.servers.append(self._stack.enter_context(server))
        primary, *replicas = self.servers
        for replica in replicas:  # not on the command line: a restart must not bring it back
            replica.raw.replicaof("127.0.0.1", primary.port)
            replica.raw.config_rewrite()
        wait_until(lambda: all(_follows(replica, primary) for replica in replicas), description="replicas are online")
        for _ in range(sentinel_count):
            sentinel = self._stack.enter_context(Server(self.engine, "--sentinel", persistence=False, tls=self._tls))
            self.sentinels.append(sentinel)
            self._hurry(sentinel)
            command = sentinel.raw.execute_command
            command("SENTINEL", "MONITOR", NAME, "127.0.0.1", primary.port, sentinel_count // 2 + 1)
            command("SENTINEL", "SET", NAME, "down-after-milliseconds", self._down_after_ms)
            command("SENTINEL", "SET", NAME, "failover-timeout", 5000)
        self.await_healthy()

    def _hurry(self, sentinel: Server) -> None:
        if self._hurried:
            settings = [text for setting in _HURRIED.items() for text in setting]
            sentinel.raw.execute_command("SENTINEL", "DEBUG", *settings)

    def _check(self) -> bool:
        watching = [sentinel for sentinel in self.sentinels if sentinel.up]
        primary, replicas = self.primary(), self.replicas()
        assert primary.up, "the primary is dead"
        assert primary.raw.execute_command("ROLE")[0] == "master", "the primary does not know that it is"
        for replica in replicas:
            assert _follows(replica, primary), f"{replica.port} does not follow the primary"
        for sentinel in watching:
            who = f"Sentinel {sentinel.port}"
            master = _ask(sentinel, "MASTER")
            assert int(master["port"]) == primary.port, f"{who} names another primary"
            assert master["flags"] == "master", f"{who} thinks its primary {master['flags']}"
            followers = {int(known["port"]) for known in _ask(sentinel, "REPLICAS") if _is_following(known, primary)}
            assert followers == {replica.port for replica in replicas}, f"{who} has seen {followers} follow"
            others = {int(known["port"]) for known in _ask(sentinel, "SENTINELS") if _is_well(known)}
            assert others == {other.port for other in watching} - {sentinel.port}, f"{who} knows just {others}"
        return True


def _ask(sentinel: Server, what: str) -> Any:
    return sentinel.raw.execute_command("SENTINEL", what, NAME)


def _primary_port(sentinel: Server) -> int:
    """Return whom it sends clients to; not always whom `SENTINEL MASTER` shows."""
    return int(_ask(sentinel, "GET-MASTER-ADDR-BY-NAME")[1])


def _follows(replica: Server, primary: Server) -> bool:
    role: list[Any] = replica.raw.execute_command("ROLE")
    return role[0] == "slave" and role[2:4] == [primary.port, "connected"]


def _is_well(known: dict[str, str]) -> bool:
    return not {"s_down", "o_down", "disconnected"} & set(known["flags"].split(","))


def _is_following(known: dict[str, str], primary: Server) -> bool:
    link = (known["role-reported"], known["master-link-status"], int(known["master-port"]))
    return _is_well(known) and link == ("slave", "ok", primary.port)
