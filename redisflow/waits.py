"""What a waiting flow waits for, and its wire form.

The wire form is what is stored, and what the verbs accept as well:

    {"kind": "timer", "at": "2026-04-23T15:00:00Z"}
    {"kind": "external_event", "topic": "approvals", "correlation_id": "42"}
    {"kind": "manual"}

each with an optional `"deadline"`. A mapping of any other kind is the caller's own: it is stored, and no
engine touches it.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, Self

import attrs

from redisflow.errors import InvalidData, shown

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
NAME_LIMIT_BYTES = 1024


def to_us(moment: datetime) -> int:
    """Microseconds since the epoch of an aware datetime."""
    return (moment - EPOCH) // MICROSECOND


def from_us(us: int) -> datetime:
    """The UTC datetime of microseconds since the epoch."""
    return EPOCH + timedelta(microseconds=us)


def to_rfc3339(moment: datetime) -> str:
    """RFC 3339 text in UTC, to the microsecond."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def require_aware(name: str, moment: object) -> datetime:
    """Return `moment` in UTC.

    Raises:
        InvalidData: not a datetime, one without a time zone, or one before the epoch.
    """
    if not isinstance(moment, datetime):
        raise InvalidData(f"{name} must be a datetime, not {type(moment).__name__}")
    if moment.tzinfo is None or moment.utcoffset() is None:
        raise InvalidData(f"{name} is naive: give it a time zone, as in datetime.now(UTC)")
    try:
        moment = moment.astimezone(UTC)
    except OverflowError:
        raise InvalidData(f"{name} is beyond the years 1 to 9999 in UTC") from None
    if moment < EPOCH:
        raise InvalidData(f"{name} is before 1970")
    return moment


def require_name(name: str, text: object, *, limit: int = NAME_LIMIT_BYTES, nul: bool = True) -> bytes:
    """Return `text` as UTF-8.

    Raises:
        InvalidData: not a string, empty, longer than `limit` bytes, not encodable, or holding a NUL
            where `nul` is False.
    """
    if not isinstance(text, str):
        raise InvalidData(f"{name} must be a string, not {type(text).__name__}")
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        raise InvalidData(f"{name} holds a lone surrogate and cannot be stored as UTF-8") from None
    if not encoded:
        raise InvalidData(f"{name} is empty")
    if len(encoded) > limit:
        raise InvalidData(f"{name} is {len(encoded)} bytes long; the limit is {limit}")
    if not nul and b"\0" in encoded:
        raise InvalidData(f"{name} holds a NUL character")
    return encoded


def _instant(name: str, raw: object) -> datetime:
    """Read a wire time: RFC 3339 text or an aware datetime."""
    if isinstance(raw, str):
        try:
            raw = datetime.fromisoformat(raw)
        except ValueError:
            raise InvalidData(f"{name} is not an RFC 3339 time: {shown(raw)}") from None
    return require_aware(name, raw)


def _aware(_: object, attribute: attrs.Attribute[datetime], moment: object) -> None:
    require_aware(f"wait {attribute.name}", moment)


def _aware_or_none(_: object, attribute: attrs.Attribute[datetime | None], moment: object) -> None:
    if moment is not None:
        require_aware(f"wait {attribute.name}", moment)


@attrs.frozen(kw_only=True)
class Wait:
    """What every wait has: its `kind` and an optional `deadline` (an aware datetime).

    A wait that ends by its deadline resumes its flow with `state["wait_timed_out"]` set to the wait.
    """

    kind: ClassVar[str]

    deadline: datetime | None = attrs.field(default=None, validator=_aware_or_none)

    @property
    def due(self) -> datetime | None:
        """When an engine must look at it: the earliest time that ends it, if time does."""
        return self.deadline

    @property
    def waiter(self) -> bytes:
        """The prefix of its entry in the waiters index: empty unless it waits for an event."""
        return b""

    def timed_out(self, now: datetime) -> bool:
        """Whether at `now` its deadline has ended it."""
        return self.deadline is not None and self.deadline <= now

    def to_wire(self) -> dict[str, Any]:
        """The mapping that is stored."""
        wire = {"kind": self.kind, **self._own_fields()}
        if self.deadline is not None:
            wire["deadline"] = to_rfc3339(self.deadline)
        return wire

    def _own_fields(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Self:
        """Parse the mapping form of this kind."""
        known = {field.name for field in attrs.fields(cls)}
        fields = {name: wire[name] for name in known if name in wire}
        for name in ("at", "deadline"):
            if fields.get(name) is not None:
                fields[name] = _instant(f"wait {name}", fields[name])
        try:
            return cls(**fields)
        except TypeError:
            missing = ", ".join(sorted(known - fields.keys() - {"deadline"}))
            raise InvalidData(f"wait of kind {cls.kind!r} lacks {missing}") from None


@attrs.frozen
class Timer(Wait):
    """Wait until a moment: `at` is an aware datetime."""

    kind = "timer"

    at: datetime = attrs.field(validator=_aware)

    @property
    def due(self) -> datetime:
        """When it fires, or its deadline if that is earlier."""
        return self.at if self.deadline is None else min(self.at, self.deadline)

    def timed_out(self, now: datetime) -> bool:
        """Whether its deadline has ended it before it fired."""
        return super().timed_out(now) and self.due < self.at

    def _own_fields(self) -> dict[str, Any]:
        return {"at": to_rfc3339(self.at)}


@attrs.frozen
class ExternalEvent(Wait):
    """Wait for an event of `topic` with `correlation_id`: strings of 1 to 1,024 bytes, no NUL."""

    kind = "external_event"

    topic: str
    correlation_id: str

    def __attrs_post_init__(self) -> None:
        self.waiter  # noqa: B018 - building the index entry is the check of both names

    @property
    def waiter(self) -> bytes:
        """The prefix of its entry in the waiters index."""
        topic = require_name("wait topic", self.topic, nul=False)
        correlation_id = require_name("wait correlation_id", self.correlation_id, nul=False)
        return topic + b"\0" + correlation_id + b"\0"

    def _own_fields(self) -> dict[str, Any]:
        return {"topic": self.topic, "correlation_id": self.correlation_id}


@attrs.frozen
class Manual(Wait):
    """Wait until somebody calls `resume`."""

    kind = "manual"


KINDS: dict[str, type[Wait]] = {cls.kind: cls for cls in (Timer, ExternalEvent, Manual)}


def parse_wait(wait: object) -> Timer | ExternalEvent | Manual | None:
    """Parse a wire mapping; `None` for a kind that is the caller's own.

    Raises:
        InvalidData: not a mapping with a `kind`, or a known kind with malformed fields.
    """
    if isinstance(wait, Wait):
        return wait  # type: ignore[return-value]  # Wait itself is never instantiated
    if not isinstance(wait, Mapping):
        raise InvalidData(f"a wait is a Timer, an ExternalEvent, a Manual or a mapping, not {type(wait).__name__}")
    kind = wait.get("kind")
    if not isinstance(kind, str) or not kind:
        raise InvalidData("a wait mapping needs a 'kind': a non-empty string")
    known = KINDS.get(kind)
    return None if known is None else known.from_wire(wait)  # type: ignore[return-value]  # as above


def wire_form(wait: Wait | Mapping[str, Any]) -> Mapping[str, Any]:
    """The mapping to store for a wait given in either form; one already a mapping is stored as it is."""
    return wait.to_wire() if isinstance(wait, Wait) else wait


# A wait as an argument, in either form.
AnyWait = Timer | ExternalEvent | Manual | Mapping[str, Any]
