"""Clients and their calls, carried out step by step in virtual time by the library's own delivery."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable
from random import random
from typing import Any

from redisflow.calls import Lost, Packet, Pause, Together
from redisflow.delivery import Fences, Policy, deliver
from redisflow.ops.namespace import Namespace
from tests.protocol.network import Clock, Connection, Network, Shipment

# Takes what a generator of steps came to: its result, or the error it raised.
OnEnd = Callable[[Any, BaseException | None], None]


_LONG_S = 5.0  # longer than any run


class Client:
    """A manager: a namespace, a policy with the fences it was told, connections, and what its callers want together.

    Attributes:
        shares: whether its calls share a connection, as in asyncio, or have one each, as with threads.
        gathers: whether its callers settle together.
    """

    def __init__(
        self, number: int, namespace: Namespace, clock: Clock, network: Network, *, deadline_s: float, shares: bool
    ) -> None:
        self.number = number
        self.namespace = namespace
        self.clock = clock
        self.network = network
        self.policy = Policy(deadline_s, fences=Fences(), clock=clock.read)
        self.shares = shares
        self.gathers = True
        self.gatherings: dict[Hashable, Gathering] = {}
        self._connections: list[Connection] = []

    def connection(self) -> Connection:
        """Return an open connection: the one that is shared, or one that carries nothing."""
        self._connections = [connection for connection in self._connections if connection.is_open]
        for connection in self._connections:
            if self.shares or not connection.under_way:
                return connection
        connection = self.network.open()
        self._connections.append(connection)
        return connection


class Run:
    """A generator of steps that is being carried out.

    Attributes:
        sender: stands in the server's record of what its packets did.
    """

    __slots__ = ("_client", "_leads", "_on_end", "_steps", "is_over", "sender")

    def __init__(self, client: Client, sender: Any, steps: Generator[Any, Any, Any], on_end: OnEnd) -> None:
        self._client = client
        self._steps = steps
        self._on_end = on_end
        self._leads: Gathering | None = None
        self.sender = sender
        self.is_over = False

    def start(self) -> None:
        """Take the first step."""
        self.resume(None)

    def resume(self, said: Any) -> None:
        """Go on with what the last step came to."""
        if self.is_over:
            return
        self._leads = None
        try:
            step = self._steps.throw(said) if isinstance(said, BaseException) else self._steps.send(said)
        except StopIteration as stop:
            self.is_over = True
            self._on_end(stop.value, None)
        except Exception as error:  # noqa: BLE001 - whatever it is, a check judges it
            self.is_over = True
            self._on_end(None, error)
        else:
            self._take(step)

    def _take(self, step: Any) -> None:
        client = self._client
        if type(step) is Packet:
            client.network.send(client.connection(), Shipment(step, self.sender, self.resume))
        elif type(step) is Pause:
            client.clock.at(client.clock.now_s + step.seconds, self.resume, None)
        else:
            assert type(step) is Together
            key = step.key if client.gathers else object()
            gathering = client.gatherings.get(key)
            if gathering is None:
                gathering = client.gatherings[key] = Gathering(client)
            self._leads = gathering
            gathering.join(step, self)

    def cancel(self) -> None:
        """End it as a cancelled task ends: its packets stay on their way."""
        if not self.is_over:
            self.is_over = True
            self._steps.close()
            if self._leads is not None:
                self._leads.leave(self)


class Gathering:
    """What callers want together: those that come while a run is under way are served by the next.

    The first of those that are served carries the run out. If it is cancelled, the run ends, and another begins.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._waiting: list[tuple[Together, Run]] = []
        self._served: list[tuple[Together, Run]] = []
        self._run: Run | None = None

    def join(self, step: Together, caller: Run) -> None:
        """Wait for a run that begins from now on, at most until the caller's deadline."""
        self._waiting.append((step, caller))
        clock = self._client.clock
        if step.until_s < clock.now_s + _LONG_S:
            clock.at(max(step.until_s, clock.now_s), self._give_up, caller, step)
        if self._run is None:
            if random() < 0.6:
                self._begin()
            else:  # others may come before the run begins
                clock.at(clock.now_s + 0.005 * random(), self._begin)

    def leave(self, caller: Run) -> None:
        """Wait no more for one that was cancelled."""
        self._waiting = [(step, other) for step, other in self._waiting if other is not caller]
        if self._run is not None and self._served and self._served[0][1] is caller:
            self._run.cancel()
            self._run = None
            self._waiting = self._served[1:] + self._waiting
            self._served = []
            self._begin()
        self._served = [(step, other) for step, other in self._served if other is not caller]

    def _give_up(self, caller: Run, step: Together) -> None:
        # The first carries the run out and is never late for it.
        for wanted in (self._waiting, self._served[1:]):
            if any(one is step for one, _ in wanted):
                self._waiting = [pair for pair in self._waiting if pair[0] is not step]
                self._served = [pair for pair in self._served if pair[0] is not step]
                caller.resume(Lost("others were still being served", sent=False))
                return

    def _begin(self) -> None:
        if self._run is not None or not self._waiting:
            return
        self._served, self._waiting = self._waiting, []
        first = self._served[0][0]
        items = [item for step, _ in self._served for item in step.items]
        self._run = Run(self._client, self._served[0][1].sender, first.run(items), self._end)
        self._run.start()

    def _end(self, result: Any, error: BaseException | None) -> None:
        served, self._served, self._run = self._served, [], None
        for _, caller in served:
            caller.resume(result if error is None else error)
        self._begin()


def delivered(client: Client, sender: Any, op: Generator[Any, Any, Any], on_end: OnEnd) -> Run:
    """Begin to carry an operation out. The run is still to be started."""
    return Run(client, sender, deliver(op, client.policy), on_end)
