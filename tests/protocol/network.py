"""Connections in virtual time: packets that are delayed, lost, cut short, unanswered, or delivered long after.

Within one connection order holds, and nothing is doubled, as over TCP. When a connection breaks, its sender hears so,
and what is still on the way may arrive at any time, or never.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from random import random
from typing import Any

import attrs

from redisflow.calls import Lost, Packet, Refusal
from redisflow.codec import unpack
from tests.protocol.model import Server

LATEST_S = 60.0  # how much later a packet may arrive; far less than a tombstone lasts
_START_US = 1_700_000_000_000_000
_REFUSALS = ("BUSY", "READONLY", "LOADING")
_RESET = "the connection was reset"


class Clock:
    """Virtual time, and what happens when."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.behind_us = 0  # how far the server's clock has been set back
        self._agenda: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0

    def read(self) -> float:
        """Return the time, as a `Policy` asks for it."""
        return self.now_s

    def at(self, when_s: float, act: Callable[..., None], *args: Any) -> None:
        """Enter something in the agenda."""
        self._number += 1
        heapq.heappush(self._agenda, (when_s, self._number, act, args))

    def run(self, most: int) -> bool:
        """Let happen what is in the agenda, at most so much. Returns whether that was all."""
        agenda = self._agenda
        for _ in range(most):
            if not agenda:
                return True
            self.now_s, _, act, args = heapq.heappop(agenda)
            act(*args)
        return False


class Shipment:
    """A packet on its way, and what becomes of it.

    Attributes:
        receive: takes the replies, or the loss.
        sender: what sent it, for the server's record of effects.
        replies: those of the server, once the packet was executed.
        is_over: whether the sender has heard of it, or hears of nothing any more.
    """

    __slots__ = ("is_over", "packet", "receive", "replies", "sender")

    def __init__(self, packet: Packet, sender: Any, receive: Callable[[Any], None]) -> None:
        self.packet = packet
        self.sender = sender
        self.receive = receive
        self.replies: Sequence[Any] | None = None
        self.is_over = False

    def answer(self, said: Any) -> None:
        """Hand the replies, or the loss, to the sender."""
        if not self.is_over:
            self.is_over = True
            self.receive(said)


class Connection:
    """One connection.

    Attributes:
        under_way: what was sent over it and has not been answered.
        arrived_s, answered_s: when the last packet arrives, and when the last reply does.
    """

    __slots__ = ("answered_s", "arrived_s", "is_open", "under_way")

    def __init__(self) -> None:
        self.under_way: list[Shipment] = []
        self.arrived_s = self.answered_s = 0.0
        self.is_open = True


@attrs.define
class Weather:
    """How the network fares.

    Attributes:
        trouble: how likely it is that a packet meets with trouble, until `calm_s`.
        late: how likely it is that what was on the way arrives all the same.
        outage: from when until when no packet gets through.
        refusing: from when until when the server refuses in passing, most of the time.
    """

    trouble: float = 0.0
    late: float = 0.5
    calm_s: float = 0.0
    outage: tuple[float, float] = (0.0, 0.0)
    refusing: tuple[float, float] = (0.0, 0.0)


class Network:
    """Carries packets of all clients to one server."""

    def __init__(self, clock: Clock, server: Server, weather: Weather, tell: Callable[[str], None] | None) -> None:
        self.clock = clock
        self.server = server
        self.weather = weather
        self._tell = tell
        self._connections: list[Connection] = []

    def open(self) -> Connection:
        """Open a connection."""
        connection = Connection()
        self._connections.append(connection)
        return connection

    def send(self, connection: Connection, shipment: Shipment) -> None:
        """Send a packet; sooner or later its sender is answered, at the latest a second later."""
        now_s, weather = self.clock.now_s, self.weather
        trouble = weather.trouble if now_s < weather.calm_s else 0.0
        if weather.outage[0] <= now_s < weather.outage[1]:
            trouble = 1.0
        is_troubled = trouble > 0.0 and random() < trouble
        if is_troubled and random() < 0.15:
            self.clock.at(now_s + 0.01 * random(), shipment.answer, Lost("cannot connect", sent=False))
            return
        connection.under_way.append(shipment)
        delay_s = 0.02 * random()
        if is_troubled:
            self.clock.at(now_s + 0.04 * random(), self.break_off, connection)
        arrives_s = max(connection.arrived_s, now_s + delay_s)
        connection.arrived_s = arrives_s
        self.clock.at(arrives_s, self._arrive, connection, shipment)

    def _arrive(self, connection: Connection, shipment: Shipment) -> None:
        if not connection.is_open:
            return  # what becomes of it was settled when the connection broke
        self._execute(shipment, shipment.packet.commands)
        answered_s = max(connection.answered_s, self.clock.now_s + 0.01 * random())
        connection.answered_s = answered_s
        self.clock.at(answered_s, self._return, connection, shipment)

    def _return(self, connection: Connection, shipment: Shipment) -> None:
        if connection.is_open:
            connection.under_way.remove(shipment)
            shipment.answer(shipment.replies)

    def break_off(self, connection: Connection) -> None:
        """Break a connection. What is still on the way arrives later, up to some command, or never."""
        if not connection.is_open:
            return
        connection.is_open = False
        self._connections.remove(connection)
        late_s = self.clock.now_s
        is_cut = False
        for shipment in connection.under_way:
            if shipment.replies is None and not is_cut:
                if random() >= self.weather.late:
                    is_cut = True
                else:
                    late_s += self._lateness()
                    commands = shipment.packet.commands
                    if len(commands) > 1 and random() < 0.3:
                        commands, is_cut = commands[: int(random() * len(commands))], True
                    self.clock.at(late_s, self._execute, shipment, commands)
            shipment.answer(Lost(_RESET, sent=True))

    def _lateness(self) -> float:
        kind = random()
        if kind < 0.4:
            return 0.05 * random()
        return random() if kind < 0.8 else LATEST_S * random()

    def restart(self) -> None:
        """Restart the server: it forgets its scripts, and all connections break."""
        self._say("the server restarts")
        self.server.forget_scripts()
        for connection in self._connections.copy():
            self.break_off(connection)

    def _execute(self, shipment: Shipment, commands: Iterable[Sequence[bytes]]) -> None:
        server, clock = self.server, self.clock
        server.now_s = clock.now_s
        server.now_us = _START_US + int(clock.now_s * 1e6) - clock.behind_us
        server.sender = shipment.sender
        replies: list[Any] = []
        first, last = self.weather.refusing
        refusal = None
        if first <= clock.now_s < last:
            code = _REFUSALS[int(random() * 3)]
            refusal = Refusal(code, f"{code} for a moment")
        for command in commands:
            # A server may come to its senses, or lose them, in the middle of a packet.
            is_refused = refusal is not None and random() < 0.6
            replies.append(refusal if is_refused else server.execute(command))
            if self._tell is not None:
                self._say(f"  executes {described(command)} of {shipment.sender} → {shown(replies[-1])}")
        shipment.replies = replies

    def _say(self, what: str) -> None:
        if self._tell is not None:
            self._tell(what)


def described(command: Sequence[bytes]) -> str:
    """Return a command as a story has it: without the script's text and the keys but the first."""
    if command[0] not in {b"EVALSHA", b"EVAL"}:
        return b" ".join(command).decode(errors="replace")
    n_keys = int(command[2])
    args = command[3 + n_keys :]
    shown_args = " ".join(shown(arg) for arg in args[:6])
    return f"{command[0].decode()} {command[3].decode(errors='replace')} {shown_args}"


def shown(value: Any) -> str:
    """Return a value cut short."""
    if isinstance(value, bytes):
        text = value.decode("ascii", errors="replace")
        if not text.isprintable():
            return _unpacked(value)
        if len(text) == 32:
            text = f"op…{text[12:16]}…{text[-4:]}"
        return repr(text if len(text) <= 60 else f"{text[:60]}…")
    if isinstance(value, Refusal):
        return value.message
    if isinstance(value, list):
        return f"[{', '.join(shown(part) for part in value[:14])}]"
    return str(value)


def _unpacked(value: bytes) -> str:
    """Return a payload as the mapping that it is, anything else by its size."""
    try:
        payload = unpack(value)
    except ValueError:
        payload = None
    return str(payload) if isinstance(payload, dict) else f"<{len(value)} bytes>"
