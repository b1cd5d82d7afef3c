"""What flows are kept on while things break, and what can break there.

A stage is a context. Its faults are contexts too: entered, something is broken; left, it is mended again.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, Self

from redisflow.keys import DEFAULT_PARTITIONS, Keyspace
from tests.chaos.findings import Finding
from tests.support.clock import COMPILER, SteppedClock
from tests.support.clusters import Cluster, Node
from tests.support.proxy import CUT_REPLY, CUT_REQUEST, DROP, HANG, HANG_REPLY, PASS, Fault, FaultProxy, Plan, delay
from tests.support.sentinels import Sentinels
from tests.support.servers import Engine, Server
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    import redis

SOCKET_TIMEOUT_S = 1.0
PREFIX = "chaos"
Broken = AbstractContextManager[object]


def some(chance: Random, fault: Fault, share: float) -> Plan:
    """Give that share of script calls the fault."""

    def plan(command: list[bytes]) -> Fault:
        return fault if command[0] in {b"EVALSHA", b"EVAL"} and chance.random() < share else PASS

    return plan


_NETWORK = {
    "reply cut": (CUT_REPLY, 0.05),
    "request cut": (CUT_REQUEST, 0.05),
    "connection dropped": (DROP, 0.02),
    "hung": (HANG, 0.002),
    "reply hung": (HANG_REPLY, 0.002),
    "delayed": (delay(0.02), 0.1),
}


class Stage(ABC):
    """What they have in common.

    Attributes:
        durability: what the writers ask for.
        losable: whether a failover may lose what replicas have not confirmed.
        comes_back: whether the store is always back well within the deadline, so that no outcome stays unknown.
        pauses_s: the least and the longest time between two faults.
        url: for the writers.
        kills: how often a server was killed.
        late: how many commands reached the server after their callers had given them up.
        findings: what the stage itself has seen that must not be.
    """

    durability: ClassVar[str] = "local"
    losable: ClassVar[bool] = False
    comes_back: ClassVar[bool] = False
    pauses_s: ClassVar[tuple[float, float]] = (0.05, 0.3)

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.url = ""
        self.kills = 0
        self.late = 0
        self.findings: list[Finding] = []
        self.stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, *failure: object) -> None:
        self.stack.close()

    @abstractmethod
    def start(self) -> None:
        """Start what there is."""

    @abstractmethod
    def faults(self) -> dict[str, Callable[[Random], Broken]]:
        """What can break, by name."""

    def await_healthy(self) -> None:  # noqa: B027 - a lone server is well as soon as it has started
        """Wait until nothing is broken any more."""

    @abstractmethod
    def clients(self) -> Sequence[redis.Redis]:
        """A client of each server that takes changes."""

    def killed(self, server: Server) -> None:
        """Kill a server."""
        server.kill()
        self.kills += 1

    @contextmanager
    def network(self, proxies: Callable[[Random], Sequence[FaultProxy]], what: str, chance: Random) -> Iterator[None]:
        """Trouble on the way."""
        hit = proxies(chance)
        for proxy in hit:
            proxy.plan = some(Random(chance.random()), *_NETWORK[what])
        try:
            yield
        finally:
            for proxy in hit:
                proxy.plan = lambda _: PASS
                if what in {"hung", "reply hung"}:
                    proxy.sever()

    @contextmanager
    def severed(self, proxies: Callable[[Random], Sequence[FaultProxy]], chance: Random) -> Iterator[None]:
        """Every connection closed at once."""
        for proxy in proxies(chance):
            proxy.sever()
        yield

    @contextmanager
    def paused(self, pick: Callable[[Random], Server], chance: Random) -> Iterator[None]:
        """A server that answers nothing."""
        server = pick(chance)
        server.pause()
        try:
            yield
        finally:
            server.resume()

    @contextmanager
    def flushed(self, chance: Random) -> Iterator[None]:  # noqa: ARG002 - all of them
        """Scripts forgotten."""
        for client in self.clients():
            client.script_flush()
        yield

    @contextmanager
    def full(self, chance: Random) -> Iterator[None]:  # noqa: ARG002 - all of them
        """The memory limit hit."""
        clients = self.clients()
        for client in clients:
            client.config_set("maxmemory", 1)
        try:
            yield
        finally:
            for client in clients:
                client.config_set("maxmemory", 0)


class Standalone(Stage):
    """One server with an append-only file, behind a proxy."""

    def start(self) -> None:
        """Start it."""
        self.clock: SteppedClock | None = None
        if COMPILER:
            folder = self.stack.enter_context(TemporaryDirectory(prefix="rf-"))
            self.clock = self.stack.enter_context(SteppedClock(Path(folder)))
        environment = self.clock.environment if self.clock else None
        # With `everysec` the server puts writing off for up to two seconds while the disk is slow, and acknowledges.
        settings = ("--appendfsync", "always")
        self.server = self.stack.enter_context(Server(self.engine, *settings, environment=environment))
        self.proxy = self.stack.enter_context(FaultProxy(self.server.port))
        self.url = f"{self.proxy.url}?socket_timeout={SOCKET_TIMEOUT_S}"

    def faults(self) -> dict[str, Callable[[Random], Broken]]:
        """Network, server, memory."""
        return {
            **{what: partial(self.network, lambda _: [self.proxy], what) for what in _NETWORK},
            "connections closed": partial(self.severed, lambda _: [self.proxy]),
            "server paused": partial(self.paused, lambda _: self.server),
            "server killed": self.crashed,
            "server restarted": self.restarted,
            "scripts flushed": self.flushed,
            "memory full": self.full,
            **({"clock stepped": self.stepped} if self.clock else {}),
        }

    def clients(self) -> Sequence[redis.Redis]:
        """Past the proxy."""
        return [self.server.client()]

    @contextmanager
    def crashed(self, chance: Random) -> Iterator[None]:
        """Killed, and started again at once; several times."""
        for _ in range(chance.randint(5, 40)):
            self.killed(self.server)
            known = len(self.server.log)
            self.server.start()
            if "Truncating the AOF" in self.server.log[known:]:
                self._rewrite()
            time.sleep(chance.uniform(0, 0.1))
        yield

    def _rewrite(self) -> None:
        """Write the append-only file anew: older servers leave half of a torn change in it, for the next start."""
        raw = self.server.raw
        raw.bgrewriteaof()
        wait_until(
            lambda: not any(raw.info("persistence")[f"aof_rewrite_{state}"] for state in ("scheduled", "in_progress")),
            description="the append-only file is written anew",
        )

    @contextmanager
    def stepped(self, chance: Random) -> Iterator[None]:
        """The server's clock off by up to two hours, and right again: no clock tells what was applied."""
        assert self.clock is not None
        self.clock.step(chance.randint(-7200, 7200))
        try:
            yield
        finally:
            self.clock.step(0)

    @contextmanager
    def restarted(self, chance: Random) -> Iterator[None]:  # noqa: ARG002 - there is just one
        """Shut down and started again."""
        self.server.restart()
        yield


class Replicated(Stage):
    """A primary and two replicas, watched by three Sentinels."""

    durability = "all"
    losable = True

    def start(self) -> None:
        """Start them."""
        self.group = self.stack.enter_context(Sentinels(self.engine))
        self.url = f"{self.group.url}?socket_timeout={SOCKET_TIMEOUT_S}"

    def faults(self) -> dict[str, Callable[[Random], Broken]]:
        """Servers and failovers."""
        return {
            "primary killed": self.primary_killed,
            "replica killed": self.replica_killed,
            "primary paused": partial(self.paused, lambda _: self.group.primary()),
            "planned failover": self.handed_over,
            "scripts flushed": self.flushed,
        }

    def clients(self) -> Sequence[redis.Redis]:
        """The primary's."""
        return [self.group.primary().client()]

    def await_healthy(self) -> None:
        """All agree, and replicate."""
        self.group.await_healthy()

    @contextmanager
    def primary_killed(self, chance: Random) -> Iterator[None]:  # noqa: ARG002 - there is just one
        """A replica takes over; the old primary comes back."""
        old = self.group.primary()
        self.killed(old)
        try:
            wait_until(lambda: self.group.primary() is not old, description="a replica takes over", timeout_s=30)
            yield
        finally:
            old.start()
            self.group.await_healthy()

    @contextmanager
    def replica_killed(self, chance: Random) -> Iterator[None]:
        """One replica away for a while."""
        replica = chance.choice(self.group.replicas())
        self.killed(replica)
        try:
            yield
        finally:
            replica.start()
            self.group.await_healthy()

    @contextmanager
    def handed_over(self, chance: Random) -> Iterator[None]:  # noqa: ARG002 - Sentinel chooses
        """A failover as an operator orders it."""
        self.group.fail_over()
        yield
        self.group.await_healthy()


class Clustered(Stage):
    """Three primaries and three replicas, each behind a proxy."""

    durability = "all"
    losable = True

    def start(self) -> None:
        """Start them."""
        self.cluster = self.stack.enter_context(Cluster(self.engine, proxied=True))
        self.url = f"{self.cluster.url}/?socket_timeout={SOCKET_TIMEOUT_S}"
        self._empty_left = 2
        self._slots = [partition.slot for partition in Keyspace.of(PREFIX, DEFAULT_PARTITIONS).partitions]

    def faults(self) -> dict[str, Callable[[Random], Broken]]:
        """Network, nodes, failovers, slots."""
        return {
            **{what: partial(self.network, self._proxies, what) for what in _NETWORK},
            "connections closed": partial(self.severed, self._proxies),
            "primary killed": self.primary_killed,
            "replica killed": self.replica_killed,
            "primary paused": partial(self.paused, lambda chance: self._primary(chance).server),
            "planned failover": self.handed_over,
            "slots moved": self.resharded,
            "empty node added": self.grown,
            "scripts flushed": self.flushed,
        }

    def clients(self) -> Sequence[redis.Redis]:
        """Past the proxies."""
        return self.cluster.clients()

    def await_healthy(self) -> None:
        """All agree, and replicate."""
        self.cluster.await_healthy()

    def _proxies(self, chance: Random) -> Sequence[FaultProxy]:
        proxies = [node.proxy for node in self.cluster.nodes if node.proxy is not None]
        return chance.sample(proxies, chance.randint(1, len(proxies)))

    def _primary(self, chance: Random) -> Node:
        """One with slots and a replica."""
        nodes = [node for node in self.cluster.primaries if self.cluster.replicas_of(node)]
        return chance.choice(nodes)

    @contextmanager
    def primary_killed(self, chance: Random) -> Iterator[None]:
        """Its replica takes over; it comes back as a replica."""
        old = self._primary(chance)
        (replica, *_) = self.cluster.replicas_of(old)
        self.killed(old.server)
        try:
            wait_until(lambda: replica.role == "primary", description="the replica takes over", timeout_s=30)
            yield
        finally:
            self.cluster.restart(old)
            self.cluster.await_healthy()

    @contextmanager
    def replica_killed(self, chance: Random) -> Iterator[None]:
        """One replica away for a while."""
        replica = chance.choice(self.cluster.replicas_of(self._primary(chance)))
        self.killed(replica.server)
        try:
            yield
        finally:
            self.cluster.restart(replica)
            self.cluster.await_healthy()

    @contextmanager
    def handed_over(self, chance: Random) -> Iterator[None]:
        """A failover as an operator orders it."""
        self.cluster.await_healthy()
        self.cluster.fail_over(chance.choice(self.cluster.replicas_of(self._primary(chance))))
        yield

    @contextmanager
    def resharded(self, chance: Random) -> Iterator[None]:
        """Slots that flows live in move to another node, a few keys at a time."""
        self.cluster.await_healthy()
        for slot in chance.sample(self._slots, 4):
            source = self.cluster.primary_of(slot)
            target = chance.choice([node for node in self.cluster.primaries if node is not source])
            self.cluster.move_slots([slot], source, target, keys_per_migrate=chance.randint(1, 50))
        yield

    @contextmanager
    def grown(self, chance: Random) -> Iterator[None]:  # noqa: ARG002 - one is like the other
        """A node more, without slots."""
        if self._empty_left:
            self._empty_left -= 1
            self.cluster.await_healthy()
            self.cluster.add_empty_node()
        yield


STAGES: dict[str, Callable[[Engine], Any]] = {"standalone": Standalone, "sentinel": Replicated, "cluster": Clustered}
