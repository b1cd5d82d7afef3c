"""The lifecycle's verbs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

import attrs

from redisflow import scripts
from redisflow.calls import Call
from redisflow.codec import (
    INT64_MAX,
    INT64_MIN,
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
    UPDATE_STATE,
    Flow,
    FlowRef,
    FlowStatus,
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
    TERMINAL_SPACED,
    Namespace,
    Target,
    expectation,
    op_id_of,
    partition_of,
    raise_refusal,
    spaced,
    target_of,
    whole_number,
)
from redisflow.waits import AnyWait, require_name

NO_CHANGE = Change()


def row(verb: Verb, sources: Iterable[FlowStatus] | None = None) -> tuple[bytes, ...]:
    """A verb as the transition script gets it: kind, sources, target, terminal, when_pending, when_terminal."""
    return (
        verb.kind.encode(),
        spaced(verb.sources if sources is None else sources),
        b"" if verb.target is None else verb.target.value.encode(),
        TERMINAL_SPACED,
        verb.when_cancel_pending.encode(),
        verb.when_terminal.encode(),
    )


_VERBS = (START_RUNNING, SET_WAITING, RESUME, FINISH, FAIL, CANCEL, REQUEST_CANCEL, UPDATE_STATE)
_ROWS = {verb.kind: row(verb) for verb in _VERBS}


@attrs.frozen(eq=False)
class Transition:
    """One verb about to run on one flow: builds the call, and reads its reply.

    Attributes:
        row: the verb as the script gets it.
        expected: the revision and etag the flow must have; empty for any.
        op, brought_op: the operation's id, and whether it is the caller's.
    """

    target: Target
    verb: Verb
    row: tuple[bytes, ...]
    change: Change
    payload: bytes
    expected: tuple[bytes, bytes]
    op: str
    brought_op: bool

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
        namespace.require_room("the change", (payload, *change.fields.values()))
        expected = expectation(target, expected_revision)
        return cls(target, verb, _ROWS[verb.kind], change, payload, expected, op_id_of(op_id), op_id is not None)

    def call(self, namespace: Namespace) -> Call:
        """The script call."""
        target, change = self.target, self.change
        partition, member = partition_of(namespace, target), target.member
        return Call(
            scripts.TRANSITION_ALLOW_OOM if self.verb.allow_oom else scripts.TRANSITION,
            partition.slot,
            (
                partition.flow(member),
                partition.events(member),
                partition.due,
                partition.waiters,
                *partition.statuses,
            ),
            (
                self.op.encode(),
                b"",
                b"1" if self.brought_op else b"",
                member,
                *self.expected,
                b"" if target.base is None else target.base.etag,
                *self.row,
                self.payload,
                change.merge,
                change.due_at,
                change.waiter,
                change.wake,
                *change.stamp,
                b"%d" % len(change.unset),
                b"%d" % len(change.increments),
                *change.unset,
                *flat({field: b"%d" % delta for field, delta in change.increments.items()}),
                *flat(change.fields),
            ),
            flow_id=target.flow_id,
            op_id=self.op,
        )

    def read(self, reply: Sequence[Any]) -> Flow:
        """The flow after the change, or the refusal raised."""
        base = self.target.base
        if reply[0] == b"OK" and base is not None:
            return Flow.from_stored(self.change.applied(base, self.verb.target, self.op, reply))
        if reply[0] == b"SAME" and base is not None:
            return Flow.from_stored(base)
        if reply[0] == b"FLOW":
            return found(self.target.flow_id, reply[1])
        return raise_refusal(reply, self.target.flow_id, self.op, expected=self.expected[0], to=self.verb.target)


def _run(
    namespace: Namespace, flow: FlowRef, verb: Verb, change: Change, payload: bytes, **options: Any
) -> Generator[Call, Any, Flow]:
    transition = Transition.of(namespace, target_of(flow), verb, change, payload, **options)
    reply = yield transition.call(namespace)
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
    change = Change(merge=b"patch", stamp=failure_stamp(reason))
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
    if increment or unset:
        change, more = _with_deltas(change, {} if increment is None else increment, unset)
        payload |= more
    if next_step is not None:
        change.fields[b"current_step"] = require_name("next_step", next_step)
    return _run(namespace, flow, UPDATE_STATE, change, pack_plain(payload), **options)


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
