"""The lifecycle's verbs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Mapping
from typing import Any

import attrs

from redisflow.calls import Call
from redisflow.codec import (
    INT64_MAX,
    INT64_MIN,
    WHOLE_STATE,
    failure_stamp,
    pack,
    pack_plain,
    plain,
)
from redisflow.errors import InvalidData
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
    look_of,
    op_id_of,
    partition_of,
    raise_refusal,
    target_of,
    whole_number,
)
from redisflow.scripts import TRANSITIONS
from redisflow.waits import AnyWait, require_name

NO_CHANGE = Change()


@attrs.frozen(eq=False)
class Transition:
    """One verb about to run on one flow: builds the call, and reads its reply.

    Attributes:
        expected: what the flow must be, as by `expectation`.
        op, look: the operation's id, and whether a first attempt must look for it.
        narrow: give the script just the keys for the status of the caller's copy.
    """

    target: Target
    verb: Verb
    change: Change
    payload: bytes
    expected: bytes
    op: str
    look: bytes
    narrow: bool = True

    @classmethod
    def of(
        cls,
        namespace: Namespace,
        target: Target,
        verb: Verb,
        change: Change,
        payload: bytes,
        *,
        expected_revision: object,
        op_id: object,
    ) -> Transition:
        """Check and assemble one of the lifecycle's verbs."""
        namespace.require_room("the event's payload", [payload])
        namespace.require_room("the change", change.fields.values())
        expected = expectation(target, expected_revision)
        return cls(target, verb, change, payload, expected, op_id_of(op_id), look_of(op_id))

    def run(self, namespace: Namespace) -> Generator[Call, Any, Any]:
        """Call the script. Returns its reply."""
        reply = yield self.call(namespace)
        if reply == [b"OTHER_KEYS"]:
            # The caller's copy was of another status: nothing was done yet, and all keys will do.
            reply = yield attrs.evolve(self, narrow=False).call(namespace)
        return reply

    def call(self, namespace: Namespace) -> Call:
        """The script call."""
        target, change, verb = self.target, self.change, self.verb
        partition, member, base = partition_of(namespace, target), target.member, target.base
        if change.merge == b"patch" and base is not None and WHOLE_STATE in base.fields:
            change = attrs.evolve(change, merge=b"over")
        copy_status = base.status if self.narrow and base is not None and not base.cancel_requested else None
        script = TRANSITIONS.get((verb, copy_status)) or TRANSITIONS[verb, None]
        statuses = script.sources if verb.target is None else (*script.sources, verb.target)
        return Call(
            script.script,
            partition.slot,
            (
                partition.flow(member),
                partition.events(member),
                *[partition.status(status) for status in statuses],
                *((partition.due, partition.waiters) if script.touches_waits else ()),
            ),
            (
                member,
                b"" if base is None else base.etag,
                b"" if base is None else b"%d" % (base.revision + 1),
                self.payload,
                *[getattr(change, name) for name in verb.takes],
                *change.unset,
                *flat({field: b"%d" % delta for field, delta in change.increments.items()}),
                *flat(change.fields),
            ),
            target.flow_id,
            self.op,
            self.look,
            self.expected,
        )

    def read(self, reply: Any) -> Flow:
        """The flow after the change, or the refusal raised."""
        match reply:
            case bytes() as updated_at:
                return self._applied(updated_at)
            case [b"OK", updated_at, _]:
                return self._applied(updated_at)
            case [b"SAME"] if self.target.base is not None:
                return Flow.from_stored(self.target.base)
            case [b"FLOW", stored, *_]:
                return found(self.target, stored)
        return raise_refusal(reply, self.target.flow_id, self.op, expected=self.expected, to=self.verb.target)

    def _applied(self, updated_at: bytes) -> Flow:
        if self.target.base is None:
            raise AssertionError  # only a caller who holds a copy is told of it in short
        return Flow.from_stored(self.change.applied(self.target.base, self.verb.target, self.op, updated_at))


def _run(
    namespace: Namespace, flow: FlowRef, verb: Verb, change: Change, payload: bytes, **options: Any
) -> Generator[Call, Any, Flow]:
    transition = Transition.of(namespace, target_of(flow), verb, change, payload, **options)
    reply = yield from transition.run(namespace)
    return transition.read(reply)


_EMPTY_PAYLOAD = pack("payload", {})


def start_running(namespace: Namespace, flow: FlowRef, **options: object) -> Generator[Call, Any, Flow]:
    """Created or waiting → running."""
    return _run(namespace, flow, START_RUNNING, NO_CHANGE, _EMPTY_PAYLOAD, **options)


def set_waiting(namespace: Namespace, flow: FlowRef, wait: AnyWait, **options: object) -> Generator[Call, Any, Flow]:
    """Running → waiting."""
    wire, change = entering_wait(wait)
    return _run(namespace, flow, SET_WAITING, change, pack_plain({"wait": wire}), **options)


def resume(namespace: Namespace, flow: FlowRef, state_patch: Any, **options: object) -> Generator[Call, Any, Flow]:
    """Waiting → running, the patch merged."""
    patch = plain("state_patch", state_patch)
    return _run(namespace, flow, RESUME, merging(patch), pack_plain({"state_patch": patch}), **options)


def finish(namespace: Namespace, flow: FlowRef, final_state: Any, **options: object) -> Generator[Call, Any, Flow]:
    """Running → finished, the patch merged."""
    patch = plain("final_state", final_state)
    return _run(namespace, flow, FINISH, merging(patch), pack_plain({"final_state": patch}), **options)


def fail(namespace: Namespace, flow: FlowRef, reason: str, **options: object) -> Generator[Call, Any, Flow]:
    """Running or waiting → failed, the reason and the server's time in the state."""
    if not isinstance(reason, str):
        raise InvalidData(f"reason must be a string, not {type(reason).__name__}")
    payload = pack("reason", {"reason": reason})
    # Merged as a patch would be: a state that is not a mapping gives way to it.
    field, head, tail = failure_stamp(reason)
    change = Change(merge=b"patch", stamp_field=field, stamp_head=head, stamp_tail=tail)
    return _run(namespace, flow, FAIL, change, payload, **options)


def request_cancel(namespace: Namespace, flow: FlowRef, **options: object) -> Generator[Call, Any, Flow]:
    """Set the sticky flag; on a flow that has it or has ended, change nothing."""
    change = Change(fields={b"cancel_requested": b"1"}, wake=b"1")
    return _run(namespace, flow, REQUEST_CANCEL, change, _EMPTY_PAYLOAD, **options)


def cancel(namespace: Namespace, flow: FlowRef, **options: object) -> Generator[Call, Any, Flow]:
    """Any live status → cancelled."""
    return _run(namespace, flow, CANCEL, NO_CHANGE, _EMPTY_PAYLOAD, **options)


def update_state(
    namespace: Namespace,
    flow: FlowRef,
    patch: Any,
    *,
    next_step: str | None,
    increment: Mapping[str, int] | None,
    unset: Iterable[str],
    **options: object,
) -> Generator[Call, Any, Flow]:
    """Merge into the state and move the step; the status stays."""
    patch = plain("patch", patch)
    change = merging(patch)
    payload: dict[str, Any] = {"patch": patch, "next_step": next_step}
    if increment is not None or unset != ():
        change, more = _with_deltas(change, {} if increment is None else increment, unset)
        payload |= more
    if next_step is not None:
        change.fields[b"current_step"] = require_name("next_step", next_step)
    verb = UPDATE_DELTAS if change.unset or change.increments else UPDATE_STATE
    return _run(namespace, flow, verb, change, pack_plain(payload), **options)


def _with_deltas(change: Change, increment: object, unset: object) -> tuple[Change, dict[str, Any]]:
    """Add what else is done to the state, and say it in the event."""
    if not isinstance(increment, Mapping):
        raise InvalidData(f"increment must map keys to whole numbers, not {type(increment).__name__}")
    for key, delta in increment.items():
        if not INT64_MIN <= whole_number(f"increment[{key!r}]", delta) <= INT64_MAX:
            raise InvalidData(f"increment[{key!r}] is beyond 64 bits")
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
