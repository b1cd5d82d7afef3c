"""The primitive under the verbs: write a whole flow back, if it is still the version that was read."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import attrs

from redisflow.calls import Call
from redisflow.codec import (
    OP_DIGITS,
    WHOLE_STATE,
    StoredFlow,
    event_time,
    pack,
    unpack,
)
from redisflow.errors import FlowNotFound, InvalidData, RevisionMismatch, shown
from redisflow.flow import (
    REWRITES,
    Flow,
    FlowEvent,
    FlowRef,
    FlowStatus,
)
from redisflow.ops.changes import Transition
from redisflow.ops.fields import (
    Change,
    entering_wait,
    is_state,
    state_fields,
)
from redisflow.ops.namespace import (
    Namespace,
    Target,
    flow_id_of,
    op_id_of,
    status_of,
    target_of,
    whole_number,
)
from redisflow.ops.reads import get
from redisflow.waits import require_aware, require_name, to_us

_IDENTITY = ("id", "controller_id", "goal", "owner_session_key", "requester_origin", "created_at")


def update_and_append(
    namespace: Namespace,
    flow: Flow,
    kind: str,
    payload: Any,
    *,
    expected_revision: object,
    op_id: object,
) -> Generator[Call, Any, tuple[Flow, FlowEvent]]:
    """Write the mutable fields of `flow` if its revision is still the stored one."""
    if not isinstance(flow, Flow):
        raise InvalidData(f"update_and_append takes a Flow, not {type(flow).__name__}")
    require_name("kind", kind)
    target = target_of(flow)
    revision = whole_number("flow.revision", flow.revision)
    expected = b"%d %b" % (revision, _version(flow, target))
    asked = revision if expected_revision is None else whole_number("expected_revision", expected_revision)
    if asked != revision:
        expected = b"%d -" % asked  # no version of a flow is both: the script refuses
    packed = pack("payload", {} if payload is None else payload)
    change = attrs.evolve(_rewriting(flow, target), kind=kind.encode())
    namespace.require_room("payload", [packed])
    namespace.require_room("the flow", change.fields.values())
    transition = Transition(
        target=target,
        verb=REWRITES[status_of(flow.status)],
        change=change,
        payload=packed,
        expected=expected,
        op=op_id_of(op_id),
        brought=op_id is not None,
    )
    updated = yield from transition.run(namespace)
    reply = transition.reply
    event_revision, event_id = (revision + 1, reply[2]) if reply[0] == b"OK" else (int(reply[3]), reply[2])
    return updated, FlowEvent(
        id=event_id.decode(),
        flow_id=target.flow_id,
        revision=event_revision,
        kind=kind,
        payload=unpack(packed),
        at=event_time(event_id.decode()) if event_id else updated.updated_at,
        op_id=transition.op,
    )


def _version(flow: Flow, target: Target) -> bytes:
    """What names the version that `flow` is of, as the scripts compare it."""
    etag, base = require_name("flow.etag", flow.etag), target.base
    if b"|" in etag:  # what stands behind it in the conditions is whose flow it must be
        raise InvalidData(f"flow.etag is none: {shown(flow.etag)}")
    if base is not None and _is_of(base, flow):
        return base.version
    return b"%b %d" % (etag, to_us(require_aware("flow.updated_at", flow.updated_at)))


def _is_of(base: StoredFlow, flow: Flow) -> bool:
    """Whether a flow that the caller may have altered is still of the version it was read as."""
    return base.fields.get(b"etag", b"")[:OP_DIGITS] == flow.etag.encode() and base.revision == flow.revision


def _rewriting(flow: Flow, target: Target) -> Change:
    """The change that makes the stored flow what `flow` is."""
    base = target.base
    if base is not None:
        for name in _IDENTITY:
            if getattr(flow, name) != base.read(name):
                raise InvalidData(f"flow {target.flow_id}: {name} never changes after creation")
    change = Change()
    if status_of(flow.status) is FlowStatus.WAITING:
        if flow.wait is None:
            raise InvalidData(f"flow {target.flow_id}: a waiting flow needs a wait")
        _, change = entering_wait(flow.wait)
    change.fields[b"current_step"] = require_name("current_step", flow.current_step)
    if flow.cancel_requested:
        change.fields[b"cancel_requested"] = b"1"
        change = attrs.evolve(change, wake=b"1")
    _, state = state_fields("state", flow.state)
    if base is not None and _is_of(base, flow) and WHOLE_STATE not in base.fields and WHOLE_STATE not in state:
        # The compare makes sure that the base is what is stored: send what differs from it.
        old = {field: value for field, value in base.fields.items() if is_state(field)}
        change.fields.update({field: value for field, value in state.items() if old.get(field) != value})
        return attrs.evolve(change, merge=b"patch", unset=[field for field in old if field not in state])
    change.fields.update(state)
    return attrs.evolve(change, merge=b"replace")


def mutate(
    namespace: Namespace,
    flow_id: FlowRef,
    fn: Callable[[Flow], Flow],
    *,
    kind: str,
    payload: Any,
    retries: int,
    expected_revision: int | None,
    op_id: object,
) -> Generator[Any, Any, Flow]:
    """Read, apply `fn`, compare and write; again from the read when another writer won."""
    target = Target.at(flow_id_of(flow_id))
    for left in range(max(0, whole_number("retries", retries)), -1, -1):
        flow = yield from get(namespace, target.flow_id)
        if flow is None:
            raise FlowNotFound(target.flow_id)
        changed: object = fn(flow)
        if not isinstance(changed, Flow) or changed.id != target.flow_id:
            raise InvalidData(f"flow {target.flow_id}: fn must return that flow, changed, not {type(changed).__name__}")
        try:
            updated, _ = yield from update_and_append(
                namespace, changed, kind, payload, expected_revision=expected_revision, op_id=op_id
            )
        except RevisionMismatch:
            if left == 0 or expected_revision is not None:
                raise
        else:
            return updated
    raise AssertionError  # the last round returned or raised
