"""Values to bytes and back: state, flows, events and steps.

A value is msgpack, except an integer, which is decimal text so that the server can increment it. No msgpack
value of another type begins with a digit or `-`, so the first byte tells them apart.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

import attrs
import msgpack

from redisflow.errors import InvalidData, shown
from redisflow.flow import Flow, FlowEvent, FlowStatus, FlowStep, FlowStepStatus, StepRuntime
from redisflow.waits import from_us, to_rfc3339

MAX_DEPTH: Final = 64
INT64_MIN: Final = -(2**63)
INT64_MAX: Final = 2**63 - 1
_MIN_DATETIME, _MAX_DATETIME = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
_SMALL = 2**63
_INTEGER_STARTS = frozenset(b"-0123456789")

WHOLE_STATE: Final = b"s"
STATE_PREFIX: Final = b"s:"
OP_DIGITS: Final = 32  # of an operation id


class _Refused(Exception):
    """What is wrong with a value, and the path to it."""

    def __init__(self, reason: str, *path: object) -> None:
        super().__init__(reason, *path)
        self.reason = reason
        self.path = path

    def inside(self, where: object) -> _Refused:
        """The same, of a value that holds the refused one."""
        return _Refused(self.reason, where, *self.path)


def _plain(value: Any, room: int) -> Any:  # noqa: C901, PLR0911 - one case and return per type
    """Return `value` made of nothing but types that msgpack carries there and back."""
    match value:
        case str():
            return _text(value)
        case None | bool() | bytes():
            return value
        case int():
            if INT64_MIN <= value <= INT64_MAX:
                return int(value)
            raise _Refused("an integer beyond 64 bits")
        case float():
            if math.isfinite(value):
                return float(value)
            raise _Refused(f"{value}, which is not a finite number")
        case dict() | list() | tuple() | Mapping() if room == 0:
            raise _Refused(f"nesting deeper than {MAX_DEPTH} levels")
        case dict() | Mapping():
            return _plain_mapping(value, room - 1)
        case list() | tuple():
            return _plain_sequence(value, room - 1)
        case datetime():
            return _instant(value)
    raise _Refused(f"a {type(value).__name__}, which cannot be stored")


def _plain_mapping(mapping: Mapping[object, object], room: int) -> dict[str, Any]:
    made = {}
    for key, value in mapping.items():
        if not isinstance(key, str):
            raise _Refused(f"a mapping with the key {shown(key)}; keys must be strings")
        try:
            made[_text(key)] = _plain(value, room)
        except _Refused as refused:
            raise refused.inside(key) from None
    return made


def _plain_sequence(sequence: Sequence[object], room: int) -> list[Any]:
    made = []
    for index, value in enumerate(sequence):
        try:
            made.append(_plain(value, room))
        except _Refused as refused:
            raise refused.inside(index) from None
    return made


def _text(value: str) -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _Refused("text with a lone surrogate") from None
    return value


def _instant(value: datetime) -> datetime:
    if value.utcoffset() is None:
        raise _Refused("a naive datetime; give it a time zone")
    if not _MIN_DATETIME <= value <= _MAX_DATETIME:
        raise _Refused("a datetime beyond the years 1 to 9999 in UTC")
    return value


def plain(what: str, value: Any) -> Any:
    """Return `value` made of nothing but types that msgpack carries there and back.

    Args:
        what: what the value is, for the error.
        value: None, bool, int of 64 bits, finite float, str, bytes, list, tuple, mapping with str keys, aware
            datetime.

    Raises:
        InvalidData: anything else, or more than 64 levels of nesting; the message says where.
    """
    try:
        return _plain(value, MAX_DEPTH)
    except _Refused as refused:
        where = "".join(f"[{shown(step)}]" for step in refused.path)
        raise InvalidData(f"{what}{where} holds {refused.reason}") from None


class _Packer(threading.local):
    """A packer for each thread: to make one costs more than to use it, and it has a buffer of its own."""

    def __init__(self) -> None:
        self.pack: Callable[[Any], bytes] = msgpack.Packer(datetime=True).pack


_packer = _Packer()


def pack_plain(value: Any) -> bytes:
    """Encode a plain value as msgpack, integers included."""
    return _packer.pack(value)


def encode_plain(value: Any) -> bytes:
    """Encode a plain value as one field: integers as decimal text, all else as msgpack."""
    return b"%d" % value if type(value) is int else _packer.pack(value)


def plain_fields(what: str, mapping: Mapping[Any, Any]) -> tuple[dict[str, Any], dict[bytes, bytes]]:
    """Make a mapping plain, and encode each entry as the state field of its name.

    Raises:
        InvalidData: as `plain` does.
    """
    values, fields = {}, {}
    prefix, pack = STATE_PREFIX, _packer.pack
    for name, value in mapping.items():
        # Most entries are a name with a text or an integer: told apart here, they cost no further call.
        kind = type(value)
        if kind is int and -_SMALL < value < _SMALL:
            encoded = b"%d" % value
        elif kind is str and value.isascii():
            encoded = pack(value)
        else:
            encoded = b""
        if not encoded or type(name) is not str or not name.isascii():
            [(name, value)] = plain(what, {name: value}).items()  # noqa: PLW2901 - what it was is of no more use
            encoded = encode_plain(value)
        values[name] = value
        fields[prefix + name.encode()] = encoded
    return values, fields


def pack(what: str, value: Any) -> bytes:
    """Check a value and encode it as msgpack. Raises InvalidData as `plain` does."""
    return pack_plain(plain(what, value))


def _no_extension(code: int, _: bytes) -> Any:
    msg = f"unknown extension type {code}"
    raise ValueError(msg)


def unpack(packed: bytes) -> Any:
    """Decode msgpack. Raises ValueError for bytes that make no sense."""
    try:
        return msgpack.unpackb(packed, timestamp=3, ext_hook=_no_extension, strict_map_key=True)
    except (ValueError, OverflowError, TypeError, RecursionError, MemoryError, msgpack.UnpackException) as error:
        raise ValueError(str(error) or type(error).__name__) from error


def decode(encoded: bytes) -> Any:
    """Decode the value of one field. Raises ValueError for bytes that make no sense."""
    if encoded and encoded[0] in _INTEGER_STARTS:
        value = _integer(encoded)
        if not INT64_MIN <= value <= INT64_MAX:
            msg = "an integer beyond 64 bits"
            raise ValueError(msg)
        return value
    return unpack(encoded)


def _integer(encoded: bytes) -> int:
    """Read canonical decimal text: no spaces, underscores, plus or leading zeros."""
    value = int(encoded)
    if b"%d" % value != encoded:
        msg = f"not an integer: {encoded[:40]!r}"
        raise ValueError(msg)
    return value


# --- flows ---------------------------------------------------------------------------------------------


def _bit(encoded: bytes) -> bool:
    if encoded not in {b"0", b"1"}:
        msg = f"neither 0 nor 1: {encoded[:40]!r}"
        raise ValueError(msg)
    return encoded == b"1"


def _wait(packed: bytes) -> Mapping[str, Any]:
    wait = unpack(packed)
    if not isinstance(wait, dict):
        msg = "not a mapping"
        raise ValueError(msg)  # noqa: TRY004 - the bytes are wrong, not a caller's type
    return wait


def _natural(encoded: bytes) -> int:
    value = _integer(encoded)
    if value < 0:
        msg = f"below zero: {value}"
        raise ValueError(msg)
    return value


def _when(encoded: bytes) -> datetime:
    return from_us(_natural(encoded))


_DECODERS: dict[str, Callable[[bytes], Any]] = {
    "controller_id": bytes.decode,
    "goal": bytes.decode,
    "owner_session_key": bytes.decode,
    "requester_origin": bytes.decode,
    "current_step": bytes.decode,
    "wait": _wait,
    "status": lambda encoded: FlowStatus(encoded.decode()),
    "cancel_requested": _bit,
    "revision": _natural,
    "etag": lambda encoded: encoded[:OP_DIGITS].decode(),  # a fence may follow
    "created_at": _when,
    "updated_at": _when,
}


# What most flows are without has no field.
_WHERE_ABSENT = {"wait": None, "cancel_requested": False}


@attrs.define(eq=False)  # not frozen, though nothing changes one: every operation makes one, and it takes longer
class StoredFlow:
    """The hash of a flow as the server has it; decodes what is asked for."""

    flow_id: UUID
    member: bytes
    fields: Mapping[bytes, bytes]

    @classmethod
    def of(cls, flow_id: UUID, flat: Sequence[bytes]) -> StoredFlow:
        """Take the reply of HGETALL."""
        return cls(flow_id, str(flow_id).encode(), pairs(flat))

    @property
    def revision(self) -> int:
        """The revision of this version. Raises InvalidData as `read` does."""
        try:
            return int(self.fields[b"revision"])
        except (KeyError, ValueError):
            return int(self.read("revision"))

    @property
    def version(self) -> bytes:
        """What names this version among all, those a failover has lost too: the operation that made it, and when.

        Raises InvalidData as `read` does.
        """
        fields = self.fields
        if b"etag" not in fields:
            self.read("etag")
        return b"%b %b" % (fields[b"etag"][:OP_DIGITS], fields.get(b"updated_at", b""))

    @property
    def held(self) -> bytes:
        """This version, and the flow's fence if it has one, as the transition script compares them.

        Raises InvalidData as `read` does.
        """
        fields = self.fields
        if b"etag" not in fields:
            self.read("etag")
        return b"%b %b" % (fields[b"etag"], fields.get(b"updated_at", b""))

    def read(self, name: str) -> Any:
        """Decode the attribute `name`.

        Raises:
            InvalidData: the stored bytes make no sense; names flow and field.
        """
        if name == "id":
            return self.flow_id
        if name == "state":
            return self._read_state()
        encoded = self.fields.get(name.encode())
        if encoded is None:
            if name in _WHERE_ABSENT:
                return _WHERE_ABSENT[name]
            raise InvalidData(f"flow {self.flow_id} has no field {name!r}: its hash is damaged")
        return self._decoded(name, _DECODERS[name], encoded)

    def _read_state(self) -> Any:
        if (whole := self.fields.get(WHOLE_STATE)) is not None:
            return self._decoded("s", decode, whole)
        state = {}
        for field, encoded in self.fields.items():
            if field.startswith(STATE_PREFIX):
                name = field.decode(errors="replace")
                key = self._decoded(name, bytes.decode, field[len(STATE_PREFIX) :])
                state[key] = self._decoded(name, decode, encoded)
        return state

    def _decoded(self, name: str, decoder: Callable[[bytes], Any], encoded: bytes) -> Any:
        try:
            return decoder(encoded)
        except (ValueError, OverflowError) as error:
            raise InvalidData(f"flow {self.flow_id}, field {name!r}: stored bytes make no sense: {error}") from error


def pairs(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    """Turn the server's flat list of fields and values into a dict."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def read_flow(flow_id: UUID, flat: Sequence[bytes]) -> Flow | None:
    """Decode a whole flow from the reply of HGETALL; `None` for an empty one, or a tombstone.

    Raises:
        InvalidData: the stored bytes make no sense; names flow and field.
    """
    stored = StoredFlow.of(flow_id, flat)
    if not flat or b"gone" in stored.fields:
        return None
    flow = Flow.from_stored(stored)
    for attribute in attrs.fields(Flow):
        getattr(flow, attribute.name)
    return flow


def failure_stamp(reason: str) -> tuple[bytes, bytes, bytes]:
    """The state field of a failure, and what stands in it before and after its time."""
    head = b"\x82\xa2at\xbb"  # a map of two, the key "at", and the header of a text of 27 bytes
    tail = msgpack.packb("reason") + pack("reason", reason)
    return STATE_PREFIX + b"failure", head, tail


def stamped(head: bytes, updated_at: bytes, tail: bytes) -> bytes:
    """The value the transition script makes of a stamp at `updated_at`."""
    return head + to_rfc3339(from_us(int(updated_at))).encode() + tail


# --- events --------------------------------------------------------------------------------------------


def event_time(event_id: str) -> datetime:
    """The time in an event id."""
    return from_us(int(event_id.partition("-")[0]) * 1000)


def read_event(flow_id: UUID, entry: Sequence[Any]) -> FlowEvent:
    """Decode one stream entry.

    Raises:
        InvalidData: the stored bytes make no sense; names flow and entry.
    """
    event_id = entry[0].decode()
    try:
        fields = pairs(entry[1])
        return FlowEvent(
            id=event_id,
            flow_id=flow_id,
            revision=_integer(fields[b"rev"]),
            kind=fields[b"kind"].decode(),
            payload=unpack(fields[b"payload"]),
            at=event_time(event_id),
            op_id=fields[b"op"].decode(),
        )
    except (ValueError, KeyError, OverflowError) as error:
        raise InvalidData(f"flow {flow_id}, event {event_id}: stored bytes make no sense: {error}") from error


# --- steps ---------------------------------------------------------------------------------------------

# A step is a msgpack array; lua/observe_step.lua keeps its first parts, whose lengths are fixed, as they are.
_STEP_FIELDS = 9


def step_head(step_id: UUID) -> bytes:
    """The array's header and the id, for a step that is new."""
    packed: bytes = bytes([0x90 + _STEP_FIELDS]) + msgpack.packb(step_id.bytes)
    return packed


def step_tail(run_id: str, task: str, runtime: StepRuntime, status: FlowStepStatus, result: Any) -> bytes:
    """The fields every observation replaces."""
    packed: bytes = (
        msgpack.packb(run_id)
        + msgpack.packb(task)
        + msgpack.packb(runtime.value)
        + msgpack.packb(status.value)
        + pack("result", result)
    )
    return packed


def read_step(flow_id: UUID, packed: bytes) -> FlowStep:
    """Decode one step.

    Raises:
        InvalidData: the stored bytes make no sense; names flow and step.
    """
    try:
        step_id, created_at, updated_at, child_session_key, run_id, task, runtime, status, result = unpack(packed)
        if not isinstance(step_id, bytes):
            raise TypeError("its id is not binary")  # noqa: TRY301 - one clause names every damage
        if not (isinstance(run_id, str) and isinstance(task, str) and isinstance(child_session_key, str | None)):
            raise TypeError("a name in it is no text")  # noqa: TRY301 - as above
        return FlowStep(
            id=UUID(bytes=step_id),
            flow_id=flow_id,
            runtime=StepRuntime(runtime),
            child_session_key=child_session_key,
            run_id=run_id,
            task=task,
            status=FlowStepStatus(status),
            result=result,
            created_at=from_us(int(created_at)),
            updated_at=from_us(int(updated_at)),
        )
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidData(f"flow {flow_id}, step {packed[:60]!r}: stored bytes make no sense: {error}") from error
