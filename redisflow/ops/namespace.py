"""What all operations share: key names, limits, the check of inputs, the reading of refusals."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, NamedTuple, NoReturn
from uuid import UUID

import attrs

from redisflow.calls import NO_COPY, Command
from redisflow.codec import INT64_MAX, INT64_MIN, StoredFlow
from redisflow.errors import (
    AlreadyTerminal,
    CancelPending,
    FlowError,
    FlowNotFound,
    IllegalTransition,
    InvalidData,
    OutcomeUnknown,
    RevisionMismatch,
    shown,
)
from redisflow.flow import Flow, FlowRef, FlowStatus
from redisflow.keys import Keyspace, Partition, require_partitions, require_prefix
from redisflow.scripts import READ_OWN, UNTRIMMED, Appending
from redisflow.waits import MICROSECOND, require_aware, require_name, to_us

log = logging.getLogger("redisflow")

DEFAULT_MAX_PAYLOAD_BYTES = 2**20
LONGEST_S = 10**9  # some 30 years: what waits longer waits for ever, and the system's timers take no more
_OP_IDS_AT_ONCE = 256


@attrs.define(eq=False)
class _Joined:
    """What connecting finds out about a namespace: shared by those that are made from it."""

    keyspace: Keyspace = attrs.field(init=False)


@attrs.define
class Namespace:
    """One prefix on one server.

    Attributes:
        partitions: as the caller gave it; `None` takes what the namespace has.
        max_payload_bytes: limit of what one call may store, encoded.
        appending: the scripts that append to a trail, and trim it or not.
        owner: to whom the caller is bound: there are no others' flows. Empty for all.
        keyspace: known once connected.
    """

    prefix: str = attrs.field(converter=require_prefix)
    partitions: int | None = attrs.field(default=None, converter=attrs.converters.optional(require_partitions))
    max_payload_bytes: int = DEFAULT_MAX_PAYLOAD_BYTES
    appending: Appending = UNTRIMMED
    owner: bytes = b""
    _joined: _Joined = attrs.field(factory=_Joined)

    @property
    def keyspace(self) -> Keyspace:
        """The key names; operations run only after `upkeep.connect` has set them."""
        return self._joined.keyspace

    def connected(self, partitions: int) -> None:
        """Note the partition count the namespace has."""
        self._joined.keyspace = Keyspace.of(self.prefix, partitions)

    def for_owner(self, owner: str) -> Namespace:
        """The same namespace with just one owner's flows in it.

        Raises:
            InvalidData: it is bound to another owner.
        """
        name = require_name("owner", owner)
        if self.owner not in {b"", name}:
            raise InvalidData(f"a view of the flows of {self.owner.decode()!r} has none of {shown(owner)}")
        return attrs.evolve(self, owner=name)

    def require_room(self, what: str, pieces: Iterable[bytes]) -> None:
        """Refuse what is larger than one call may store."""
        size = sum(map(len, pieces))
        if size > self.max_payload_bytes:
            raise InvalidData(f"{what} is {size} bytes encoded; the limit is {self.max_payload_bytes}")


class Target(NamedTuple):
    """The flow a call is about: its id, the id as keys and sets have it, and what the caller holds of it."""

    flow_id: UUID
    member: bytes
    base: StoredFlow | None = None

    @property
    def copy(self) -> Mapping[bytes, bytes]:
        """The hash fields of the caller's copy; empty without one."""
        return NO_COPY if self.base is None else self.base.fields

    @classmethod
    def at(cls, flow_id: UUID) -> Target:
        """The flow of an id, of which the caller holds nothing."""
        return cls(flow_id, str(flow_id).encode())


def targets_of(members: Iterable[bytes]) -> list[Target]:
    """The flows of an index. An entry that is no id is left out and logged."""
    targets = []
    for member in members:
        try:
            targets.append(Target.at(UUID(member.decode())))
        except ValueError:
            log.warning("left out an index entry that is no flow id: %r", member[:60])
    return targets


def target_of(flow: FlowRef) -> Target:
    """Read a flow argument: a Flow, a UUID or its text.

    Raises:
        InvalidData: none of the three.
    """
    if isinstance(flow, Flow):
        base = flow._base  # noqa: SLF001 - the operations are what it is kept for
        if base is None:
            return Target.at(flow_id_of(flow.id))
        if isinstance(base, StoredFlow):
            return Target(base.flow_id, base.member, base)
    return Target.at(flow_id_of(flow))


def flow_id_of(flow: FlowRef) -> UUID:
    """Read a flow id given as a Flow, a UUID or its text."""
    if isinstance(flow, UUID):
        return flow
    if isinstance(flow, Flow):
        return flow_id_of(flow.id)
    if isinstance(flow, str):
        try:
            return UUID(flow)
        except ValueError:
            raise InvalidData(f"not a flow id: {shown(flow)}; expected a UUID") from None
    raise InvalidData(f"expected a Flow, a UUID or its text, not {type(flow).__name__}")


def op_id_of(op_id: object) -> str:
    """Read an operation id: 32 hexadecimal digits, a UUID or 16 bytes. `None` makes a new one."""
    if op_id is None:
        try:
            return _unused_op_ids.pop()
        except IndexError:
            return _more_op_ids()
    if isinstance(op_id, UUID):
        return op_id.hex
    if isinstance(op_id, bytes) and len(op_id) == 16:  # noqa: PLR2004 - the size of an operation id
        return op_id.hex()
    if isinstance(op_id, str):
        try:
            return UUID(hex=op_id).hex
        except ValueError:
            pass
    raise InvalidData(f"op_id must be 32 hexadecimal digits, a UUID or 16 bytes, not {shown(op_id)}")


# Ids that the library draws bear this mark, where no UUID of a known version has it. They are in no index: one that a
# caller brings back, to settle an OutcomeUnknown, has to be looked for in the trail.
_DRAWN, _DRAWN_AT = "f10f", 12


def is_drawn(op_id: str) -> bool:
    """Tell whether the library drew an id. One in 65,536 random ids looks like it: that costs a search, no more."""
    return op_id.startswith(_DRAWN, _DRAWN_AT)


_unused_op_ids: list[str] = []
os.register_at_fork(after_in_child=_unused_op_ids.clear)  # or parent and child would use the same


def _more_op_ids() -> str:
    """Ask the system for random bytes, many at a time. Returns one id, keeps the others."""
    digits = os.urandom(14 * _OP_IDS_AT_ONCE).hex()
    first, *others = (
        digits[start : start + _DRAWN_AT] + _DRAWN + digits[start + _DRAWN_AT : start + 28]
        for start in range(0, len(digits), 28)
    )
    _unused_op_ids.extend(others)
    return first


def whole_number(name: str, number: object) -> int:
    """Return `number` if it is an int of 64 bits: the server takes no other."""
    number = _integer(name, number)
    if not INT64_MIN <= number <= INT64_MAX:
        raise InvalidData(f"{name} is beyond 64 bits")
    return number


def _integer(name: str, number: object) -> int:
    if isinstance(number, bool) or not isinstance(number, int):
        raise InvalidData(f"{name} must be a whole number, not {shown(number)}")
    return number


def limit_of(limit: object) -> int | None:
    """Read a limit: `None` is none, below 1 is nothing."""
    return None if limit is None else min(max(0, _integer("limit", limit)), INT64_MAX)


def seconds_of(name: str, seconds: object) -> float | None:
    """Read a timeout in seconds: `None` is for ever."""
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds >= 0:
        raise InvalidData(f"{name} must be a number of seconds, 0 or more, or None, not {shown(seconds)}")
    return float(min(seconds, LONGEST_S))


def span_us(name: str, span: object) -> int:
    """Read a span of time, in microseconds."""
    if not isinstance(span, timedelta):
        raise InvalidData(f"{name} must be a timedelta, not {type(span).__name__}")
    if span < timedelta(0):
        raise InvalidData(f"{name} must not be negative: {span}")
    return span // MICROSECOND


def score_before(name: str, moment: datetime | None) -> bytes:
    """The upper bound, exclusive, of a score: a time, or everything."""
    return b"+inf" if moment is None else b"(%d" % to_us(require_aware(name, moment))


def status_of(status: object) -> FlowStatus:
    """Read a status given as a FlowStatus or its text."""
    if isinstance(status, str):  # of anything else the enumeration's own error would want the `repr`
        with suppress(ValueError):
            return FlowStatus(status)
    raise InvalidData(f"not a flow status: {shown(status)}; one of {', '.join(FlowStatus)}")


def expectation(target: Target, revision: object) -> bytes:
    """What the stored flow must be, as the scripts compare it; empty for anything.

    Revision numbers are used again after a failover that lost writes, so a compare with a version the caller
    holds is with all that names it.
    """
    if revision is None:
        return b""
    number = whole_number("expected_revision", revision)
    if number < 0:
        raise InvalidData(f"expected_revision must be 0 or more, not {number}")
    base = target.base
    return b"%d" % number if base is None or base.revision != number else b"%d %b" % (number, base.version)


def raise_refusal(
    reply: Sequence[Any], flow_id: UUID, op_id: str, *, expected: bytes = b"", to: FlowStatus | None = None
) -> NoReturn:
    """Raise the error a script's refusal stands for.

    Args:
        reply: the tag and its facts.
        flow_id: the flow refused.
        op_id: the operation refused.
        expected: what the flow had to be, as by `expectation`.
        to: the status it should have reached.
    """
    tag, *facts = reply
    fact = facts[0].decode(errors="replace") if facts else ""
    errors: dict[bytes, Callable[[], FlowError]] = {
        b"ABSENT": lambda: FlowNotFound(flow_id),
        b"DELETED": lambda: FlowNotFound(flow_id),
        b"UNKNOWN": lambda: OutcomeUnknown(op_id, f"flow {flow_id}: the records that would tell are gone"),
        b"STALE": lambda: RevisionMismatch(flow_id, int(expected.partition(b" ")[0]), int(fact)),
        b"TERMINAL": lambda: AlreadyTerminal(flow_id, FlowStatus(fact)),
        b"PENDING": lambda: CancelPending(flow_id),
        b"ILLEGAL": lambda: IllegalTransition(flow_id, FlowStatus(fact), to or FlowStatus(fact)),
        b"NOT_INTEGER": lambda: InvalidData(
            f"flow {flow_id}: state[{fact[2:]!r}] cannot be incremented: it is no 64-bit integer, or its sum is not"
        ),
        b"NOT_MAPPING": lambda: InvalidData(f"flow {flow_id}: increment and unset need a state that is a mapping"),
        b"OTHER_OP": lambda: InvalidData(f"flow {flow_id}: op_id {op_id} was used before, for {fact!r}; use a new one"),
        b"CORRUPT": lambda: InvalidData(f"flow {flow_id}, field {fact!r}: stored bytes make no sense"),
    }
    raise errors[tag]()  # noqa: RSE102 - the parentheses call what makes the error


def partition_of(namespace: Namespace, target: Target) -> Partition:
    """The partition of a flow."""
    return namespace.keyspace.partition_of(target.flow_id)


def keys_of(partition: Partition, target: Target, op_id: object, *others: bytes) -> tuple[bytes, ...]:
    """Return the KEYS of a script that adds to a flow's record. `op_id` is the one that the caller brought, if any."""
    seen = () if op_id is None else (partition.seen(target.member),)
    return (partition.flow(target.member), partition.events(target.member), *others, *seen)


def if_own(namespace: Namespace, target: Target, plain: Command) -> Command:
    """A read of a key of a flow. To a bound caller the server answers of another's flow as of none."""
    if not namespace.owner:
        return plain
    name, key, *args = plain.args
    flow_key = partition_of(namespace, target).flow(target.member)
    run = (b"EVALSHA", READ_OWN.source.sha, b"2", flow_key, key, namespace.owner, name, *args)
    return Command(plain.slot, run, READ_OWN, b"%b %b" % (name, key))
