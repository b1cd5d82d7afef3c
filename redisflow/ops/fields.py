"""A flow's hash fields: what a value becomes, and what a change does to them here as in the script."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from redisflow.codec import (
    OP_DIGITS,
    STATE_PREFIX,
    WHOLE_STATE,
    StoredFlow,
    encode_plain,
    pack_plain,
    pairs,
    plain,
    plain_fields,
    stamped,
)
from redisflow.errors import InvalidData, shown
from redisflow.flow import (
    Flow,
    FlowStatus,
)
from redisflow.ops.namespace import Target
from redisflow.waits import AnyWait, parse_wait, to_us, wire_form

Fields = dict[bytes, bytes]
TIMED_OUT = "wait_timed_out"  # the state key of a wait that its deadline has ended


@attrs.define(eq=False)
class Change:
    """What a verb does beside moving the status: the same for the script and for the caller's copy.

    Attributes:
        fields: hash fields to set.
        kind: of the event, where the verb does not say it.
        merge: what becomes of the state: nothing, `patch`, `over` or `replace`.
        unset, increments: state fields to delete, and to add to.
        due_at, waiter: the index entries of a new wait; empty for none.
        wake: have an engine look at the flow at once, if it stays waiting.
        stamp_field, stamp_head, stamp_tail: a field whose value is head, time of the change, tail.
    """

    fields: Fields = attrs.field(factory=dict)
    merge: bytes = b""
    kind: bytes = b""
    unset: Sequence[bytes] = ()
    increments: Mapping[bytes, int] = attrs.field(factory=dict)
    due_at: bytes = b""
    waiter: bytes = b""
    wake: bytes = b""
    stamp_field: bytes = b""
    stamp_head: bytes = b""
    stamp_tail: bytes = b""

    @property
    def n_unset(self) -> bytes:
        """How many fields to delete."""
        return b"%d" % len(self.unset)

    @property
    def n_increment(self) -> bytes:
        """How many fields to add to."""
        return b"%d" % len(self.increments)

    def applied(
        self, base: StoredFlow, target: FlowStatus | None, revision: bytes, op: str, updated_at: bytes
    ) -> StoredFlow:
        """What the script made of `base`, which was current."""
        old = base.fields
        if self.merge == b"replace":
            old = {field: value for field, value in old.items() if not is_state(field)}
        etag = op.encode() + old[b"etag"][OP_DIGITS:]  # with the fence, if there is one
        fields = {**old, **self.fields, b"revision": revision, b"etag": etag, b"updated_at": updated_at}
        if target is not None:
            fields[b"status"] = target.value.encode()
            if old[b"status"] == b"waiting":
                self._remove(fields, b"wait", b"waiter")
        if self.merge and WHOLE_STATE in old:
            self._remove(fields, WHOLE_STATE)
        if self.unset:
            self._remove(fields, *self.unset)
        for field, delta in self.increments.items():
            fields[field] = b"%d" % (int(old.get(field, b"0")) + delta)
        if self.stamp_field:
            fields[self.stamp_field] = stamped(self.stamp_head, updated_at, self.stamp_tail)
        return StoredFlow(base.flow_id, base.member, fields)

    def _remove(self, fields: dict[bytes, bytes], *names: bytes) -> None:
        """Take out what was there before and is not set anew."""
        for name in names:
            if name not in self.fields:
                fields.pop(name, None)


def flat(fields: Mapping[bytes, bytes]) -> Iterable[bytes]:
    """Fields and values as a script's arguments."""
    for pair in fields.items():
        yield from pair


def found(target: Target, stored: Sequence[bytes]) -> Flow:
    """The flow in a script's reply. What was applied was applied, even where other fields are damaged."""
    return Flow.from_stored(StoredFlow(target.flow_id, target.member, pairs(stored)))


def is_state(field: bytes) -> bool:
    """Whether a hash field holds state."""
    return field == WHOLE_STATE or field.startswith(STATE_PREFIX)


def state_field(key: object) -> bytes:
    """The hash field of a top-level state key."""
    if not isinstance(key, str):
        raise InvalidData(f"state keys must be strings, not {shown(key)}")
    try:
        return STATE_PREFIX + key.encode()
    except UnicodeEncodeError:
        raise InvalidData(f"state key {shown(key)} holds a lone surrogate") from None


def state_fields(what: str, state: Any) -> tuple[Any, Fields]:
    """A whole state, or a patch, made plain, and its hash fields.

    Raises:
        InvalidData: as `codec.plain` does.
    """
    if isinstance(state, Mapping):
        return plain_fields(what, state)
    state = plain(what, state)
    return state, {WHOLE_STATE: encode_plain(state)}


def merging(what: str, patch: Any) -> tuple[Any, Change]:
    """The patch made plain, and its shallow merge: keys into keys, anything else in place of the whole state."""
    if patch is None:
        return None, Change()
    patch, fields = state_fields(what, patch)
    return patch, Change(fields, b"patch" if isinstance(patch, dict) else b"replace")


def entering_wait(wait: AnyWait) -> tuple[Any, Change]:
    """The wire form of a wait, and what stores and indexes it."""
    condition = parse_wait(wait)
    wire = plain("wait", wire_form(wait))
    if condition is not None and condition.deadline is not None:
        plain("wait", {TIMED_OUT: wire})  # as the state will hold it
    fields = {b"wait": pack_plain(wire)}
    if condition is None:
        return wire, Change(fields)
    if condition.waiter:
        fields[b"waiter"] = condition.waiter
    due_at = b"" if condition.due is None else b"%d" % to_us(condition.due)
    return wire, Change(fields, due_at=due_at, waiter=condition.waiter)
