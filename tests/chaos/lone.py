"""One server behind one proxy, which is always there: packets come late, connections end, scripts are forgotten.

Socket timeouts are short, so that attempts are given up often, and arrive all the same.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from tests.chaos.findings import Breach, Finding
from tests.chaos.stages import PREFIX, Broken, Stage
from tests.support.proxy import CUT_REPLY, DROP, PASS, Fault, FaultProxy, Plan, aim, late
from tests.support.servers import Server

if TYPE_CHECKING:
    import redis

SOCKET_TIMEOUT_S = 0.2
_SCRIPTS = {b"EVALSHA", b"EVAL"}
_LONGEST_S = 6.0  # for which a packet is held back, if it is not until the end


class Lone(Stage):
    """One server, always there, and a proxy before it."""

    comes_back = True

    def start(self) -> None:
        """Start it."""
        self.server = self.stack.enter_context(Server(self.engine))
        self.proxy = self.stack.enter_context(FaultProxy(self.server.port))
        self.url = f"{self.proxy.url}?socket_timeout={SOCKET_TIMEOUT_S}"
        self._client = self.server.client()

    def clients(self) -> Sequence[redis.Redis]:
        """Past the proxy."""
        return [self._client]

    def await_healthy(self) -> None:
        """Deliver what is still held back: all calls have returned, so none of it may be applied."""
        self.proxy.plan = lambda _: PASS
        before = self._trails()
        self.proxy.deliver()
        self.late, after = self.proxy.delivered, self._trails()
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) != after.get(key):
                sentence = f"{key!r} had {before.get(key)} events, and has {after.get(key)}"
                self.findings.append(Finding(Breach.LATE, None, sentence))

    def _trails(self) -> dict[bytes, int]:
        keys = sorted(self._client.scan_iter(match=f"{{{PREFIX}:*:events:*", count=1000))
        pipe = self._client.pipeline(transaction=False)
        for key in keys:
            pipe.xlen(key)
        return dict(zip(keys, pipe.execute(), strict=True))

    @contextmanager
    def planned(self, plan_of: Callable[[Random], Plan], chance: Random) -> Iterator[None]:
        """Trouble on the way by a plan."""
        self.proxy.plan = plan_of(Random(chance.random()))
        try:
            yield
        finally:
            self.proxy.plan = lambda _: PASS

    @contextmanager
    def once(self, fault: Fault, chance: Random) -> Iterator[None]:
        """That fault for one script, and what shares its connection."""
        with self.planned(lambda _: aim(fault), chance):
            yield

    @contextmanager
    def held_back(self, share: float, chance: Random) -> Iterator[None]:
        """That share of scripts held back, some of them to the end; at times all that is held arrives now."""
        with self.planned(lambda drawn: _late(drawn, share), chance):
            yield
        if chance.random() < 0.3:
            self.proxy.deliver()

    @contextmanager
    def cut_in_bursts(self, chance: Random) -> Iterator[None]:
        """Every connection closed, several times."""
        for _ in range(chance.randint(1, 3)):
            self.proxy.sever()
            time.sleep(chance.uniform(0.05, 0.5))
        yield

    @contextmanager
    def flushed_in_bursts(self, chance: Random) -> Iterator[None]:
        """Scripts forgotten again and again."""
        with self._again_and_again(self._client.script_flush, chance.uniform(0.0005, 0.01)):
            yield

    @contextmanager
    def pushed_out(self, chance: Random) -> Iterator[None]:
        """Hundreds of other scripts sent in full: servers keep the last 500 of those."""
        with self._again_and_again(partial(_send_scripts, self._client, chance), 0.02):
            yield

    @contextmanager
    def flushed_within_packets(self, chance: Random) -> Iterator[None]:
        """Scripts forgotten between two commands that were sent together; replies lost as well."""
        drawn, client = Random(chance.random()), self._client

        def plan(command: list[bytes]) -> Fault:
            if command[0] in _SCRIPTS and drawn.random() < 0.1:
                client.script_flush()
            return CUT_REPLY if command[0] in _SCRIPTS and drawn.random() < 0.01 else PASS

        with self.planned(lambda _: plan, chance):
            yield

    @contextmanager
    def _again_and_again(self, what: Callable[[], object], pause_s: float) -> Iterator[None]:
        over = threading.Event()

        def work() -> None:
            while not over.wait(pause_s):
                what()

        worker = threading.Thread(target=work)
        worker.start()
        try:
            yield
        finally:
            over.set()
            worker.join()


def _late(chance: Random, share: float) -> Plan:
    def plan(command: list[bytes]) -> Fault:
        if command[0] not in _SCRIPTS or chance.random() >= share:
            return PASS
        seconds = math.inf if chance.random() < 0.3 else chance.uniform(SOCKET_TIMEOUT_S, _LONGEST_S)
        return late(seconds, cut=chance.random() < 0.5)

    return plan


def _send_scripts(client: redis.Redis, chance: Random) -> None:
    pipe = client.pipeline(transaction=False)
    for _ in range(600):
        pipe.eval(f"return {chance.getrandbits(60)}", 0)
    pipe.execute()


class LatePackets(Lone):
    """Packets that come late."""

    def faults(self) -> dict[str, Callable[[Random], Broken]]:
        """Mostly packets held back."""
        here = [self.proxy]
        return {
            "few held back": partial(self.held_back, 0.01),
            "some held back": partial(self.held_back, 0.05),
            "many held back": partial(self.held_back, 0.3),
            **{what: partial(self.network, lambda _: here, what) for what in ("reply cut", "request cut")},
            "connections closed": self.cut_in_bursts,
            "server paused": partial(self.paused, lambda _: self.server),
        }


class Forgetful(Lone):
    """A server that forgets scripts."""

    def faults(self) -> dict[str, Callable[[Random], Broken]]:
        """Mostly scripts forgotten."""
        here = [self.proxy]
        return {
            "scripts flushed in bursts": self.flushed_in_bursts,
            "scripts flushed within packets": self.flushed_within_packets,
            "scripts pushed out": self.pushed_out,
            "few held back": partial(self.held_back, 0.01),
            **{what: partial(self.network, lambda _: here, what) for what in ("reply cut", "connection dropped")},
        }


class Doubtful(Lone):
    """A server that often leaves callers in doubt."""

    def faults(self) -> dict[str, Callable[[Random], Broken]]:
        """Whatever loses attempts."""
        here = [self.proxy]
        return {
            "many held back": partial(self.held_back, 0.4),
            "some held back": partial(self.held_back, 0.05),
            "reply hung": partial(self.network, lambda _: here, "reply hung"),
            "server paused": partial(self.paused, lambda _: self.server),
            "connections closed": self.cut_in_bursts,
        }


class Crowded(Lone):
    """A server that many callers of one flow come to, whose connections end every few seconds."""

    pauses_s = (0.5, 2.0)

    def faults(self) -> dict[str, Callable[[Random], Broken]]:
        """One thing at a time, so that most calls go through at the second attempt."""
        return {
            "connections closed": partial(self.severed, lambda _: [self.proxy]),
            "connections closed in bursts": self.cut_in_bursts,
            "one reply cut": partial(self.once, CUT_REPLY),
            "one connection dropped": partial(self.once, DROP),
            "one held back": partial(self.once, late()),
        }
