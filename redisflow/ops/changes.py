"""The lifecycle's verbs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Mapping
from typing import Any

import attrs

from redisflow.calls import NO_COPY, Call
from redisflow.codec import (
    WHOLE_STATE,
    failure_stamp,
    pack,
    pack_plain,
)
from redisflow.errors import InvalidData, shown
from redisflow.flow import (
    CANCEL,
    FAIL,
    FINISH,
    REQUEST_CANCEL,
    RESUME,
    SET_WAITING,
    START_RUNNING,
    UPDATE_DELTAS,
    UPDATE_STATE,
    Flow,
    FlowRef,
    Verb,
)
from redisflow.ops.fields import (
    Change,
    entering_wait,
    flat,
    found,
    merging,
    state_field,
)
from redisflow.ops.namespace import (
    Namespace,
    Target,
    expectation,
    is_drawn,
    op_id_of,
    raise_refusal,
    target_of,
    whole_number,
)
from redisflow.waits import AnyWait, require_name

NO_CHANGE = Change()
OTHER_KEYS = [b"OTHER_KEYS"]  # a reply
# A change stores what its payload says, at most so many times as long: an integer of 9 bytes has 20 digits, a
# waiter's names stand in two fields.
_FIELDS_TO_PAYLOAD = 3


@attrs.define(eq=False)  # not frozen: that takes three times as long to make, and this lives for one call
class Transition:
    """One verb about to run on one flow: builds the call, and reads its reply.

    Attributes:
        expected: what the flow must be, as by `expectation`.
        op, brought: the operation's id, and whether the caller brought it.
        next_revision: one more than the revision of the caller's copy.
        reply: what the script answered.
    """

    target: Target
    verb: Verb
    change: Change
    payload: bytes
    expected: bytes
    op: str
    brought: bool
    next_revision: bytes = b""
    reply: Any = None

    @classmethod
    def of(
        cls,
        namespace: Namespace,
        flow: FlowRef,
        verb: Verb,
        change: Change,
        payload: bytes,
        *,
        expected_revision: object,
        op_id: object,
    ) -> Transition:
        """Check and assemble one of the lifecycle's verbs."""
        target = target_of(flow)
        if _FIELDS_TO_PAYLOAD * len(payload) > namespace.max_payload_bytes:
            namespace.require_room("the event's payload", [payload])
            namespace.require_room("the change", change.fields.values())
        expected = b"" if expected_revision is None else expectation(target, expected_revision)
        return cls(target, verb, change, payload, expected, op_id_of(op_id), op_id is not None)

    def run(self, namespace: Namespace) -> Generator[Call, Any, Flow]:
        """Call the script. Returns the flow after the change."""
        reply = yield self.call(namespace)
        if reply == OTHER_KEYS:
            # The caller's copy was of another status: nothing was done yet, and all keys will do.
            reply = yield self.call(namespace, narrow=False)
        self.reply = reply
        return self.read(reply)

    def call(self, namespace: Namespace, *, narrow: bool = True) -> Call:
        """The script call: with just the keys for the status of the caller's copy, or with all."""
        change, verb = self.change, self.verb
        flow_id, member, base = self.target
        held_version, copy_status, held = b"", None, NO_COPY
        if base is not None:
            held = base.fields
            held_version = base.held
            self.next_revision = b"%d" % (base.revision + 1)
            if narrow and held.get(b"cancel_requested", b"0") == b"0":
                copy_status = held.get(b"status")
            if WHOLE_STATE in held and change.merge == b"patch":
                change = attrs.evolve(change, merge=b"over")
        scripts = namespace.appending.transitions
        script = scripts.get((verb, copy_status)) or scripts[verb, None]
        partition = namespace.keyspace.partition_of(flow_id)
        args = [member, held_version, self.next_revision, self.payload]
        for name in verb.takes:
            args.append(getattr(change, name))  # noqa: PERF401 - mostly one: a comprehension costs more
        if change.unset or change.increments:
            args += change.unset
            args += flat({field: b"%d" % delta for field, delta in change.increments.items()})
        for pair in change.fields.items():
            args += pair
        keys = script.keys(partition, member, brought=self.brought)
        narrow = copy_status is not None
        return Call(
            script.script,
            partition.slot,
            keys,
            args,
            flow_id,
            self.op,
            self.expected,
            narrow,
            namespace.owner,
            held,
            self.brought,
            partition.seen(member) if self.brought else b"",
            self.brought and is_drawn(self.op),
        )

    def read(self, reply: Any) -> Flow:
        """The flow after the change, or the refusal raised."""
        if type(reply) is bytes:
            return self._applied(reply)
        match reply:
            case [b"OK", updated_at, _]:
                return self._applied(updated_at)
            case [b"SAME"] if self.target.base is not None:
                return Flow.from_stored(self.target.base)
            case [b"FLOW", stored, *_]:
                return found(self.target, stored)
        return raise_refusal(reply, self.target.flow_id, self.op, expected=self.expected, to=self.verb.target)

    def _applied(self, updated_at: bytes) -> Flow:
        base = self.target.base
        if base is None:
            raise AssertionError  # only a caller who holds a copy is told of it in short
        return Flow.from_stored(self.change.applied(base, self.verb.target, self.next_revision, self.op, updated_at))


_EMPTY_PAYLOAD = pack("payload", {})


def start_running(namespace: Namespace, flow: FlowRef, **options: object) -> Generator[Call, Any, Flow]:
    """Created or waiting → running."""
    return Transition.of(namespace, flow, START_RUNNING, NO_CHANGE, _EMPTY_PAYLOAD, **options).run(namespace)


def set_waiting(namespace: Namespace, flow: FlowRef, wait: AnyWait, **options: object) -> Generator[Call, Any, Flow]:
    """Running → waiting."""
    wire, change = entering_wait(wait)
    return Transition.of(namespace, flow, SET_WAITING, change, pack_plain({"wait": wire}), **options).run(namespace)


def resume(namespace: Namespace, flow: FlowRef, state_patch: Any, **options: object) -> Generator[Call, Any, Flow]:
    """Waiting → running, the patch merged."""
    patch, change = merging("state_patch", state_patch)
    return Transition.of(namespace, flow, RESUME, change, pack_plain({"state_patch": patch}), **options).run(namespace)


def finish(namespace: Namespace, flow: FlowRef, final_state: Any, **options: object) -> Generator[Call, Any, Flow]:
    """Running → finished, the patch merged."""
    patch, change = merging("final_state", final_state)
    return Transition.of(namespace, flow, FINISH, change, pack_plain({"final_state": patch}), **options).run(namespace)


def fail(namespace: Namespace, flow: FlowRef, reason: str, **options: object) -> Generator[Call, Any, Flow]:
    """Running or waiting → failed, the reason and the server's time in the state."""
    if not isinstance(reason, str):
        raise InvalidData(f"reason must be a string, not {type(reason).__name__}")
    payload = pack("reason", {"reason": reason})
    # Merged as a patch would be: a state that is not a mapping gives way to it.
    field, head, tail = failure_stamp(reason)
    change = Change(merge=b"patch", stamp_field=field, stamp_head=head, stamp_tail=tail)
    return Transition.of(namespace, flow, FAIL, change, payload, **options).run(namespace)


def request_cancel(namespace: Namespace, flow: FlowRef, **options: object) -> Generator[Call, Any, Flow]:
    """Set the sticky flag; on a flow that has it or has ended, change nothing."""
    change = Change(fields={b"cancel_requested": b"1"}, wake=b"1")
    return Transition.of(namespace, flow, REQUEST_CANCEL, change, _EMPTY_PAYLOAD, **options).run(namespace)


def cancel(namespace: Namespace, flow: FlowRef, **options: object) -> Generator[Call, Any, Flow]:
    """Any live status → cancelled."""
    return Transition.of(namespace, flow, CANCEL, NO_CHANGE, _EMPTY_PAYLOAD, **options).run(namespace)


def update_state(
    namespace: Namespace,
    flow: FlowRef,
    patch: Any,
    *,
    next_step: str | None,
    increment: Mapping[str, int] | None,
    unset: Iterable[str],
    expected_revision: object,
    op_id: object,
) -> Generator[Call, Any, Flow]:
    """Merge into the state and move the step; the status stays."""
    patch, change = merging("patch", patch)
    payload: dict[str, Any] = {"patch": patch, "next_step": next_step}
    if increment is not None or unset != ():
        change, more = _with_deltas(change, {} if increment is None else increment, unset)
        payload |= more
    if next_step is not None:
        change.fields[b"current_step"] = require_name("next_step", next_step)
    verb = UPDATE_DELTAS if change.unset or change.increments else UPDATE_STATE
    transition = Transition.of(
        namespace, flow, verb, change, pack_plain(payload), expected_revision=expected_revision, op_id=op_id
    )
    return transition.run(namespace)


def _with_deltas(change: Change, increment: object, unset: object) -> tuple[Change, dict[str, Any]]:
    """Add what else is done to the state, and say it in the event."""
    if not isinstance(increment, Mapping):
        raise InvalidData(f"increment must map keys to whole numbers, not {type(increment).__name__}")
    for key, delta in increment.items():
        whole_number(f"increment[{shown(key)}]", delta)
    if not isinstance(unset, Iterable) or isinstance(unset, str | bytes):
        raise InvalidData("unset must be the keys to remove, as in unset=['tmp']")
    keys = list(unset)
    if not increment and not keys:
        return change, {}
    change = attrs.evolve(
        change,
        merge=change.merge or b"patch",
        unset=[state_field(key) for key in keys],
        increments={state_field(key): delta for key, delta in increment.items()},
    )
    _require_disjoint(change)
    return change, ({"increment": dict(increment)} if increment else {}) | ({"unset": keys} if keys else {})


def _require_disjoint(change: Change) -> None:
    """One key, one thing done to it: there is no order in which two would be right."""
    if change.merge == b"replace":
        raise InvalidData("increment and unset need a patch that is a mapping, or none")
    named = Counter([*change.unset, *change.increments, *change.fields])
    if twice := sorted(field[2:].decode() for field, times in named.items() if times > 1):
        raise InvalidData(f"patch, increment and unset must name different keys; named twice: {', '.join(twice)}")
