"""Bytes as a source of choices: the same bytes make the same values, and a changed byte a like one."""

from __future__ import annotations

from collections import UserDict, deque
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from types import MappingProxyType
from typing import Any, TypeVar
from uuid import UUID

import msgpack

from redisflow import FlowStatus

T = TypeVar("T")

NAMES = [
    "n", "m", "kind", "at", "deadline", "topic", "s", "", "\0", "a\0b", "\n", "{", "}", "{}", "{x}", "}{", "|", "a|b",
    ":", "*", " ", "\u00fc", "\U0001f600", "\ud800", "a\udfff", "\ufeff", "\u202e",
    "x" * 1024, "x" * 1025, "\u00fc" * 513,
]  # fmt: skip
TEXTS = [
    *NAMES, "timer", "external_event", "manual", "own", "2030-01-01T00:00:00Z", "2030-01-01T00:00:00",
    "1969-12-31T23:59:59Z", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "running", "waiting", "-", "0-0",
    "18446744073709551616", "1-1", "00000000-0000-0000-0000-000000000007", "0" * 32, "-1", "007", "\u0663",
]  # fmt: skip
INTEGERS = [0, 1, -1, 7, 99, 100, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64, 10**400, 10**5000]
FLOATS = [0.0, -0.0, 1.0, 1.5, -1.0, 1e308, 5e-324, float("nan"), float("inf"), float("-inf")]
ZONES = [None, UTC, timezone(timedelta(hours=23, minutes=59)), timezone(-timedelta(hours=23, seconds=1))]
MOMENTS = [
    datetime(1, 1, 1), datetime(9999, 12, 31, 23, 59, 59, 999_999), datetime(1969, 12, 31, 23, 59, 59, 999_999),
    datetime(1970, 1, 1), datetime(2030, 1, 1, fold=1),
]  # fmt: skip
NUMBERS = [
    b"", b"0", b"1", b"3", b"-1", b"-0", b"007", b"1_0", b"+1", b" 1", b"1.5", b"nan", b"inf", b"-inf", b"1e300",
    b"9" * 19, b"9" * 20, b"9" * 5000, b"1700000000000000", b"253402300800000000", "\u0663".encode(),
]  # fmt: skip
_DEEP = [1, 2, 62, 63, 64, 65, 200, 1100]  # the last beyond what Python recurses


class Draw:
    """Makes values of bytes from front to back. At their end it goes on with zeros: the first of every choice."""

    def __init__(self, source: bytes) -> None:
        self._source = source
        self._at = 0

    def byte(self) -> int:
        """From 0 to 255."""
        self._at += 1
        return self._source[self._at - 1] if self._at <= len(self._source) else 0

    def pick(self, choices: Sequence[T]) -> T:
        """One of the choices, at most 256."""
        return choices[self.byte() % len(choices)]

    def chance(self) -> bool:
        """False at the end."""
        return bool(self.byte() & 1)

    def raw(self) -> bytes:
        """So many of the bytes as the next one says."""
        length = self.byte()
        piece = self._source[self._at : self._at + length]
        self._at += length
        return piece

    # --- what a caller passes

    def name(self) -> Any:
        """What stands where a name should: mostly text."""
        match self.byte() % 8:
            case 0:
                return "n"
            case 1 | 2 | 3:
                return self.pick(TEXTS)
            case 4 | 5 | 6:
                return self.text()
        return self.value(2)

    def text(self) -> str:
        """Any text, surrogates too."""
        return self.raw().decode("utf-8", "surrogateescape")

    def integer(self) -> int:
        """A noted one, or any of up to 255 bytes."""
        return self.pick(INTEGERS) if self.chance() else int.from_bytes(self.raw(), signed=True)

    def moment(self) -> datetime:
        """Any, mostly at an edge."""
        if self.chance():
            moment = self.pick(MOMENTS)
        else:
            moment = datetime(1 + self.integer() % 9999, 1 + self.byte() % 12, 1 + self.byte() % 28, self.byte() % 24)
        return moment.replace(tzinfo=self.pick(ZONES))

    def mapping(self, room: int) -> dict[Any, Any]:
        """Keys of every kind, mostly text."""
        made: dict[Any, Any] = {}
        odd = self.pick(ODD_KEYS)() if self.byte() % 16 == 15 else None
        for _ in range(self.byte() % 5):
            key = self.pick(NAMES) if self.chance() else self.text()
            made[key if odd is None else odd] = self.value(room - 1)
            odd = None
        return made

    def value(self, room: int = 4) -> Any:  # noqa: C901, PLR0911, PLR0912 - a case and a return per kind
        """Anything, nested up to `room` levels by choice, and further in one piece."""
        kind = self.byte() % 16
        match kind:
            case 0:
                return None
            case 1:
                return self.chance()
            case 2 | 3:
                return self.integer()
            case 4:
                return self.pick(FLOATS)
            case 5:
                return self.pick(TEXTS)
            case 6:
                return self.text()
            case 7:
                return self.raw()
            case 8:
                return self.moment()
            case 9:
                return self.pick(ODDITIES)()
        if room <= 0:
            return []
        match kind:
            case 10 | 11 | 12:
                return self.mapping(room)
            case 13:
                return [self.value(room - 1) for _ in range(self.byte() % 5)]
            case 14:
                return self.pick(CONTAINERS)(self, room)
        return nested(self.value(0), self.pick(_DEEP), self.pick(WRAPPERS))

    # --- what a server answers

    def damaged(self, sound: bytes) -> bytes:  # noqa: PLR0911 - a return per kind of damage
        """Bytes in place of sound ones: cut, changed, something else altogether, or as they were."""
        match self.byte() % 8:
            case 0:
                return sound
            case 1 | 2:
                return self.raw()
            case 3:
                return self.pick(NUMBERS)
            case 4:
                return sound[: self.byte()]
            case 5:
                place = self.byte() % (len(sound) + 1)
                return sound[:place] + bytes([self.byte()]) + sound[place + 1 :]
            case 6:
                return self.packed()
        return self.pick(TEXTS).encode("utf-8", "surrogatepass")

    def packed(self) -> bytes:
        """Sound msgpack, of what the library would not have stored too."""
        match self.byte() % 4:
            case 0:
                return self.pick([b"\x91", b"\x81\xa1k", b"\x81\xc4\x01k", b"\x81\xc0"]) * self.pick(
                    [1, 64, 500, 600, 1100]
                )
            case 1:
                return bytes(msgpack.packb(msgpack.ExtType(self.byte() % 128, self.raw())))
            case 2:
                data = self.raw()
                return bytes([0xC7, len(data), 0xFF]) + data
        try:
            return bytes(msgpack.packb(self.value(), datetime=True))
        except (ValueError, TypeError, OverflowError):
            return b"\xc1"


def nested(value: Any, levels: int, wrap: Callable[[Any], Any]) -> Any:
    """The value in so many levels of something."""
    for _ in range(levels):
        value = wrap(value)
    return value


def _endless() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


WRAPPERS: list[Callable[[Any], Any]] = [lambda v: [v], lambda v: {"k": v}, lambda v: (v,)]
CONTAINERS: list[Callable[[Draw, int], Any]] = [
    lambda draw, room: tuple(draw.value(room - 1) for _ in range(draw.byte() % 4)),
    lambda draw, room: MappingProxyType(draw.mapping(room)),
    lambda draw, room: UserDict(draw.mapping(room)),
    lambda draw, room: deque([draw.value(room - 1)]),
]
ODD_KEYS: list[Callable[[], Any]] = [
    lambda: 1, lambda: True, lambda: b"k", lambda: 1.5, lambda: 10**5000, lambda: ("t",),
    lambda: nested((), 1100, lambda v: (v,)), lambda: FlowStatus.RUNNING, lambda: UUID(int=7), lambda: b"\0" * 5000,
]  # fmt: skip
ODDITIES: list[Callable[[], Any]] = [
    lambda: {1}, frozenset, lambda: range(3), object, lambda: ..., lambda: 1j, lambda: Exception,
    lambda: bytearray(b"x"), lambda: memoryview(b"x"), lambda: date(2030, 1, 1), lambda: timedelta(1),
    lambda: Decimal(1), lambda: FlowStatus.RUNNING, lambda: UUID(int=7), lambda: iter(()), _endless,
    lambda: msgpack.Timestamp(1, 2), lambda: msgpack.ExtType(1, b"x"),
]  # fmt: skip
