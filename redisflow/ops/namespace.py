"""What all operations share: key names, limits, the check of inputs, the reading of refusals."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, NoReturn
from uuid import UUID

import attrs

from redisflow.codec import StoredFlow
from redisflow.errors import (
    AlreadyTerminal,
    CancelPending,
    FlowError,
    FlowExists,
    FlowNotFound,
    IllegalTransition,
    InvalidData,
    OutcomeUnknown,
    RevisionMismatch,
)
from redisflow.flow import TERMINAL, Flow, FlowStatus
from redisflow.keys import Keyspace, Partition, require_partitions, require_prefix
from redisflow.waits import require_aware, to_us

DEFAULT_MAX_PAYLOAD_BYTES = 2**20


def spaced(statuses: Iterable[FlowStatus]) -> bytes:
    """Statuses as the scripts look them up: each between spaces."""
    return "".join(f" {status} " for status in statuses).encode()


TERMINAL_SPACED = spaced(TERMINAL)


@attrs.define
class Namespace:
    """One prefix on one server.

    Attributes:
        partitions: as the caller gave it; `None` takes what the namespace has.
        max_payload_bytes: limit of what one call may store, encoded.
        keyspace: known once connected.
    """

    prefix: str = attrs.field(converter=require_prefix)
    partitions: int | None = attrs.field(default=None, converter=attrs.converters.optional(require_partitions))
    max_payload_bytes: int = DEFAULT_MAX_PAYLOAD_BYTES
    _keyspace: Keyspace | None = None

    @property
    def keyspace(self) -> Keyspace:
        """The key names; operations run only after `upkeep.connect` has set them."""
        if self._keyspace is None:
            msg = "an operation ran before the namespace was connected"
            raise AssertionError(msg)
        return self._keyspace

    def connected(self, partitions: int) -> None:
        """Note the partition count the namespace has."""
        self._keyspace = Keyspace.of(self.prefix, partitions)

    def require_room(self, what: str, pieces: Iterable[bytes]) -> None:
        """Refuse what is larger than one call may store."""
        size = sum(map(len, pieces))
        if size > self.max_payload_bytes:
            raise InvalidData(f"{what} is {size} bytes encoded; the limit is {self.max_payload_bytes}")


@attrs.frozen
class Target:
    """The flow a call is about: its id, and what the caller holds of it."""

    flow_id: UUID
    base: StoredFlow | None = None

    @property
    def member(self) -> bytes:
        """The id as keys and sets have it."""
        return str(self.flow_id).encode()


def target_of(flow: Flow | UUID | str) -> Target:
    """Read a flow argument: a Flow, a UUID or its text.

    Raises:
        InvalidData: none of the three.
    """
    if isinstance(flow, Flow):
        base = flow._base  # noqa: SLF001 - the operations are what it is kept for
        if base is None:
            return Target(flow_id_of(flow.id))
        if isinstance(base, StoredFlow):
            return Target(base.flow_id, base)
    return Target(flow_id_of(flow))


def flow_id_of(flow: Flow | UUID | str) -> UUID:
    """Read a flow id given as a Flow, a UUID or its text."""
    if isinstance(flow, UUID):
        return flow
    if isinstance(flow, Flow):
        return flow_id_of(flow.id)
    if isinstance(flow, str):
        try:
            return UUID(flow)
        except ValueError:
            raise InvalidData(f"not a flow id: {flow!r}; expected a UUID") from None
    raise InvalidData(f"expected a Flow, a UUID or its text, not {type(flow).__name__}")


def op_id_of(op_id: object) -> str:
    """Read an operation id: 32 hexadecimal digits, a UUID or 16 bytes. `None` makes a new one."""
    if op_id is None:
        return os.urandom(16).hex()
    if isinstance(op_id, UUID):
        return op_id.hex
    if isinstance(op_id, bytes) and len(op_id) == 16:  # noqa: PLR2004 - the size of an operation id
        return op_id.hex()
    if isinstance(op_id, str):
        try:
            return UUID(hex=op_id).hex
        except ValueError:
            pass
    raise InvalidData(f"op_id must be 32 hexadecimal digits, a UUID or 16 bytes, not {op_id!r}")


def whole_number(name: str, number: object) -> int:
    """Return `number` if it is an int."""
    if isinstance(number, bool) or not isinstance(number, int):
        raise InvalidData(f"{name} must be a whole number, not {number!r}")
    return number


def limit_of(limit: object) -> int | None:
    """Read a limit: `None` is none, below 1 is nothing."""
    return None if limit is None else max(0, whole_number("limit", limit))


def seconds_of(name: str, seconds: object) -> float | None:
    """Read a timeout in seconds: `None` is for ever."""
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds >= 0:
        raise InvalidData(f"{name} must be a number of seconds, 0 or more, or None, not {seconds!r}")
    return float(seconds)


def score_before(name: str, moment: datetime | None) -> bytes:
    """The upper bound, exclusive, of a score: a time, or everything."""
    return b"+inf" if moment is None else b"(%d" % to_us(require_aware(name, moment))


def status_of(status: object) -> FlowStatus:
    """Read a status given as a FlowStatus or its text."""
    try:
        return FlowStatus(status)  # type: ignore[arg-type]  # what is no status raises
    except ValueError:
        choices = ", ".join(FlowStatus)
        raise InvalidData(f"not a flow status: {status!r}; one of {choices}") from None


def expectation(target: Target, revision: object) -> tuple[bytes, bytes]:
    """What the stored flow must be, as revision and etag; empty for anything.

    Revision numbers are used again after a failover that lost writes, so a compare with a version the caller
    holds is with its etag too.
    """
    if revision is None:
        return b"", b""
    if whole_number("expected_revision", revision) < 0:
        raise InvalidData(f"expected_revision must be 0 or more, not {revision!r}")
    held = target.base is not None and target.base.revision == revision
    return b"%d" % revision, target.base.etag if held and target.base is not None else b""  # type: ignore[str-bytes-safe]


def raise_refusal(
    reply: Sequence[Any], flow_id: UUID, op_id: str, *, expected: object = None, to: FlowStatus | None = None
) -> NoReturn:
    """Raise the error a script's refusal stands for."""
    tag, *facts = reply
    raise refusal(tag, facts, flow_id, op_id, expected=expected, to=to)


def refusal(
    tag: bytes, facts: Sequence[bytes], flow_id: UUID, op_id: str, *, expected: object, to: FlowStatus | None
) -> FlowError:
    """The error a script's refusal stands for."""
    match tag:
        case b"ABSENT":
            return FlowNotFound(flow_id)
        case b"EXISTS":
            return FlowExists(flow_id)
        case b"UNKNOWN":
            return OutcomeUnknown(op_id, f"flow {flow_id}: its trail no longer reaches back to the first attempt")
        case b"STALE":
            return RevisionMismatch(flow_id, int(expected), int(facts[0]))  # type: ignore[call-overload]  # STALE answers a number
        case b"TERMINAL":
            return AlreadyTerminal(flow_id, FlowStatus(facts[0].decode()))
        case b"PENDING":
            return CancelPending(flow_id)
        case b"ILLEGAL" if to is not None:
            return IllegalTransition(flow_id, FlowStatus(facts[0].decode()), to)
        case b"NOT_INTEGER":
            key = facts[0][2:].decode(errors="replace")
            return InvalidData(f"flow {flow_id}: state[{key!r}] cannot be incremented: no 64-bit integer, or none after")
        case b"NOT_MAPPING":
            return InvalidData(f"flow {flow_id}: increment needs a state that is a mapping")
        case b"CORRUPT":
            field = facts[0].decode(errors="replace")
            return InvalidData(f"flow {flow_id}, field {field!r}: stored bytes make no sense")
    return InvalidData(f"flow {flow_id}: the script answered {tag!r}")


def partition_of(namespace: Namespace, target: Target) -> Partition:
    """The partition of a flow."""
    return namespace.keyspace.partition_of(target.flow_id)
