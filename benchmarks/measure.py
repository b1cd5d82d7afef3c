"""Repeats, medians, ratios; a raw connection; the server's CPU time."""

from __future__ import annotations

import gc
import socket
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar

import attrs
import hiredis

if TYPE_CHECKING:
    import redis

T = TypeVar("T")
Command = tuple[bytes, ...]


@attrs.frozen
class Plan:
    """How much to measure: repeats of each row, and full or quick sizes."""

    repeats: int
    quick: bool = False

    def size(self, full: int) -> int:
        """A count, a tenth of it where it must go quickly."""
        return full // 10 if self.quick else full


@attrs.frozen
class Row:
    """A line of the result: what one thing cost beside another, in the same run.

    Attributes:
        ratios: subject / yardstick, one per repeat; their median is the result, free of drift between repeats.
        at_most, at_least: the target, where there is one.
    """

    name: str
    yardstick_name: str
    unit: str
    subject: float
    yardstick: float
    ratios: tuple[float, ...]
    at_most: float | None = None
    at_least: float | None = None

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def middle_half(self) -> tuple[float, float]:
        """The quartiles of the ratios: how much to trust their median."""
        low, _, high = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return low, high

    @property
    def target(self) -> str:
        """The target as text; empty where there is none."""
        if self.at_most is not None:
            return f"≤ {self.at_most}"
        return "" if self.at_least is None else f"≥ {self.at_least}"

    @property
    def met(self) -> bool | None:
        """Whether the target is met; `None` where there is none."""
        if self.at_most is not None:
            return self.ratio <= self.at_most
        return None if self.at_least is None else self.ratio >= self.at_least


def compare(
    name: str,
    yardstick_name: str,
    pairs: Sequence[tuple[float, float]],
    *,
    unit: str,
    at_most: float | None = None,
    at_least: float | None = None,
) -> Row:
    """Make a row of (subject, yardstick) pairs, each taken in one repeat."""
    return Row(
        name,
        yardstick_name,
        unit,
        statistics.median(subject for subject, _ in pairs),
        statistics.median(yardstick for _, yardstick in pairs),
        tuple(subject / yardstick for subject, yardstick in pairs),
        at_most,
        at_least,
    )


def interleaved(repeats: int, *contestants: Callable[[], T]) -> list[tuple[T, ...]]:
    """Run A B C, A B C, … after a warm-up round. Returns the results by round.

    The machine is shared: what disturbs one contestant for seconds disturbs its neighbours in the round too.
    """
    for contestant in contestants:
        contestant()
    rounds = []
    for _ in range(repeats):
        gc.collect()
        rounds.append(tuple(contestant() for contestant in contestants))
    return rounds


def pack(commands: Sequence[Command]) -> bytes:
    """The bytes of commands, as any client sends them."""
    return b"".join(hiredis.pack_command(command) for command in commands)  # type: ignore[arg-type]  # hiredis means tuple[…, ...]


class RawConnection:
    """A socket and a reply parser: no client between the server and what is measured of it."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = hiredis.Reader()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, *command: bytes) -> Any:
        """Send one command, return its reply."""
        return self.exchange(pack([command]), 1)[0]

    def exchange(self, packed: bytes, count: int) -> list[Any]:
        """Send commands, read `count` replies; an error among them is raised."""
        self._socket.sendall(packed)
        replies: list[Any] = []
        while len(replies) < count:
            reply = self._reader.gets()
            if reply is False:
                received = self._socket.recv(65536)
                if not received:
                    raise ConnectionError("the server closed the connection")
                self._reader.feed(received)
            elif isinstance(reply, hiredis.ReplyError):
                raise reply
            else:
                replies.append(reply)
        return replies


class ServerCpu:
    """The CPU time of the thread that runs commands, user and system, from INFO."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def _used_s(self) -> float:
        cpu = self._client.info("cpu")
        suffix = "_main_thread" if "used_cpu_user_main_thread" in cpu else ""
        return float(cpu["used_cpu_user" + suffix]) + float(cpu["used_cpu_sys" + suffix])

    def spent_s(self, work: Callable[[], None]) -> float:
        """Seconds the server spends on `work`."""
        before = self._used_s()
        work()
        return self._used_s() - before
