"""Repeats, medians, rows and curves; a raw connection; the server's CPU time."""

from __future__ import annotations

import gc
import math
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


def _floats(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(values)


def _points(points: Sequence[Sequence[Any]]) -> tuple[tuple[float | str, float], ...]:
    return tuple((x, y) for x, y in points)


@attrs.frozen
class Row:
    """A line of the result: what one thing cost, beside another in the same run or by itself.

    Attributes:
        yardstick_name, yardstick: what it is held against; `None` where the figure stands for itself.
        results: one per repeat. Subject / yardstick, free of drift between repeats; without a yardstick the subject.
        at_most, at_least: the target of their median, where there is one.
    """

    name: str
    yardstick_name: str | None
    unit: str
    subject: float
    yardstick: float | None
    results: tuple[float, ...] = attrs.field(converter=_floats)
    at_most: float | None = None
    at_least: float | None = None

    @property
    def result(self) -> float:
        return statistics.median(self.results)

    @property
    def middle_half(self) -> tuple[float, float]:
        """The quartiles of the results: how much to trust their median."""
        if len(self.results) == 1:
            return self.results[0], self.results[0]
        low, _, high = statistics.quantiles(self.results, n=4, method="inclusive")
        return low, high

    @property
    def target(self) -> str:
        """The target as text; empty where there is none."""
        unit = "" if self.yardstick_name else f" {self.unit}"
        if self.at_most is not None:
            return f"≤ {number(self.at_most)}{unit}"
        return "" if self.at_least is None else f"≥ {number(self.at_least)}{unit}"

    @property
    def met(self) -> bool | None:
        """Whether the target is met; `None` where there is none."""
        if self.at_most is not None:
            return self.result <= self.at_most
        return None if self.at_least is None else self.result >= self.at_least


@attrs.frozen
class Curve:
    """One line of a picture; a topic may yield it beside rows.

    Attributes:
        figure: the picture's title, "Rate against concurrency". Curves with the same one are drawn together, and
            name their axes alike.
        label: what this line is, for the legend.
        x_name, y_name: the axes, units included: "flows", "ms per call".
        points: (x, y) by ascending x, each y a median of the repeats. An x is a number, or a text such as "p99" for
            an axis of even steps. An axis is drawn logarithmic where its numbers span much.
    """

    figure: str
    label: str
    x_name: str
    y_name: str
    points: tuple[tuple[float | str, float], ...] = attrs.field(converter=_points)


def number(value: float) -> str:
    """A number as a reader wants it: three digits, or all of a large one."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


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


def alone(
    name: str,
    figures: Sequence[float],
    *,
    unit: str,
    at_most: float | None = None,
    at_least: float | None = None,
) -> Row:
    """Make a row of figures that stand for themselves, one of each repeat; a target is in their unit."""
    return Row(name, None, unit, statistics.median(figures), None, figures, at_most, at_least)


def percentile(samples: Sequence[float], percent: float) -> float:
    """The sample that `percent` of all do not exceed."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


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

    def used_s(self) -> float:
        """Seconds it has spent so far."""
        cpu = self._client.info("cpu")
        suffix = "_main_thread" if "used_cpu_user_main_thread" in cpu else ""
        return float(cpu["used_cpu_user" + suffix]) + float(cpu["used_cpu_sys" + suffix])

    def spent_s(self, work: Callable[[], None]) -> float:
        """Seconds the server spends on `work`."""
        before = self.used_s()
        work()
        return self.used_s() - before
