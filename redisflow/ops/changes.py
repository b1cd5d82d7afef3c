"""Creation and the lifecycle's verbs: every change of a flow."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any
from uuid import UUID, uuid4

import attrs

from redisflow import scripts
from redisflow.calls import Call
from redisflow.codec import (
    INT64_MAX,
    INT64_MIN,
    STATE_PREFIX,
    WHOLE_STATE,
    StoredFlow,
    encode,
    event_time,
    failure_stamp,
    pack,
    read_flow,
    stamped,
    unpack,
)
from redisflow.errors import FlowNotFound, InvalidData, RevisionMismatch
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
    FlowEvent,
    FlowStatus,
    Verb,
)
from redisflow.ops.namespace import (
    TERMINAL_SPACED,
    Namespace,
    Target,
    expectation,
    flow_id_of,
    op_id_of,
    partition_of,
    raise_refusal,
    spaced,
    status_of,
    target_of,
    whole_number,
)
from redisflow.ops.reads import get
from redisflow.waits import Wait, parse_wait, require_name, to_us, wire_form

GOAL_LIMIT_BYTES = 64 * 1024
_IDENTITY = ("id", "controller_id", "goal", "owner_session_key", "requester_origin", "created_at")
_NO_STAMP = (b"", b"", b"")

Fields = dict[bytes, bytes]


# --- creation ------------------------------------------------------------------------------------------


def create(  # noqa: PLR0913 - the public signature of creation
    namespace: Namespace,
    *,
    mirrored: bool,
    controller_id: str,
    goal: str,
    owner_session_key: str,
    requester_origin: str,
    current_step: str,
    state: Any,  # noqa: ANN401 - the caller's
    flow_id: UUID | str | None,
    exist_ok: bool,
    op_id: object,
) -> Generator[Call, Any, Flow]:
    """Create a flow: `created`, or running at once where it mirrors work that has begun elsewhere."""
    op = op_id_of(op_id)
    target = Target(uuid4() if flow_id is None else flow_id_of(flow_id))
    owner = require_name("owner_session_key", owner_session_key)
    status = FlowStatus.RUNNING if mirrored else FlowStatus.CREATED
    fields = {
        b"controller_id": require_name("controller_id", controller_id),
        b"goal": require_name("goal", goal, limit=GOAL_LIMIT_BYTES),
        b"owner_session_key": owner,
        b"requester_origin": require_name("requester_origin", requester_origin),
        b"current_step": require_name("current_step", current_step),
        b"status": status.value.encode(),
        b"cancel_requested": b"0",
    }
    state_fields = _state_fields("state", {} if state is None else state)
    fields |= state_fields
    origin = {"controller_id": controller_id, "goal": goal, "current_step": current_step}
    events = [b"created", pack("payload", origin)]
    if mirrored:
        events += [START_RUNNING.kind.encode(), pack("payload", {})]
    namespace.require_room("state", state_fields.values())

    partition = partition_of(namespace, target)
    reply = yield Call(
        scripts.CREATE,
        partition.slot,
        (
            partition.flow(target.member),
            partition.events(target.member),
            partition.owner(owner),
            partition.status(status),
        ),
        (
            *_op_args(op, op_id),
            target.member,
            owner if exist_ok else b"",
            b"%d" % (len(events) // 2),
            *events,
            *_flat(fields),
        ),
        subject=f"flow {target.flow_id}",
        op_id=op,
    )
    match reply:
        case [b"OK", revision, created_at]:
            fields |= {b"revision": b"%d" % revision, b"etag": op.encode()}
            fields |= {b"created_at": created_at, b"updated_at": created_at}
            return Flow.from_stored(StoredFlow(target.flow_id, fields))
        case [b"FLOW", flat]:
            return _found(target.flow_id, flat)
    return raise_refusal(reply, target.flow_id, op)


# --- verbs ---------------------------------------------------------------------------------------------


@attrs.frozen
class Change:
    """What a verb does beside moving the status: the same for the script and for the caller's copy.

    Attributes:
        fields: hash fields to set.
        merge: what becomes of the state: nothing, `patch` or `replace`.
        unset, increments: state fields to delete, and to add to.
        due_at, waiter: the index entries of a new wait; empty for none.
        wake: have an engine look at the flow at once, if it stays waiting.
        stamp: a field whose value holds the time of the change: name, head, tail.
    """

    fields: Fields = attrs.field(factory=dict)
    merge: bytes = b""
    unset: Sequence[bytes] = ()
    increments: Mapping[bytes, int] = attrs.field(factory=dict)
    due_at: bytes = b""
    waiter: bytes = b""
    wake: bytes = b""
    stamp: tuple[bytes, bytes, bytes] = _NO_STAMP

    def applied(self, base: StoredFlow, target: FlowStatus | None, op: str, reply: Sequence[bytes]) -> StoredFlow:
        """What the script made of `base`, which was current."""
        _, revision, updated_at, _ = reply
        fields = dict(base.fields)
        if target is not None and fields[b"status"] == b"waiting":
            fields.pop(b"wait", None)
            fields.pop(b"waiter", None)
        if self.merge == b"replace":
            fields = {field: value for field, value in fields.items() if not _is_state(field)}
        elif self.merge:
            fields.pop(WHOLE_STATE, None)
        for field in self.unset:
            fields.pop(field, None)
        for field, delta in self.increments.items():
            fields[field] = b"%d" % (int(fields.get(field, b"0")) + delta)
        fields.update(self.fields)
        if target is not None:
            fields[b"status"] = target.value.encode()
        fields[b"revision"] = revision
        fields[b"etag"] = op.encode()
        fields[b"updated_at"] = updated_at
        name, head, tail = self.stamp
        if name:
            fields[name] = stamped(head, updated_at, tail)
        return StoredFlow(base.flow_id, fields)


NO_CHANGE = Change()


@attrs.frozen
class Transition:
    """One verb about to run on one flow: builds the call, and reads its reply."""

    target: Target
    verb: Verb
    change: Change
    payload: bytes
    op: str
    brought_op: bool
    expected: tuple[bytes, bytes]
    sources: bytes

    @classmethod
    def of(  # noqa: PLR0913 - what a verb is made of
        cls,
        namespace: Namespace,
        target: Target,
        verb: Verb,
        change: Change,
        payload: bytes,
        *,
        expected_revision: object,
        op_id: object,
        sources: bytes | None = None,
    ) -> Transition:
        """Check and assemble a verb."""
        namespace.require_room("the change", (payload, *change.fields.values()))
        return cls(
            target,
            verb,
            change,
            payload,
            op_id_of(op_id),
            op_id is not None,
            expectation(target, expected_revision),
            _SOURCES[verb] if sources is None else sources,
        )

    def call(self, namespace: Namespace) -> Call:
        """The script call."""
        partition = partition_of(namespace, self.target)
        member, verb, change, base = self.target.member, self.verb, self.change, self.target.base
        increments = {field: b"%d" % delta for field, delta in change.increments.items()}
        return Call(
            scripts.TRANSITION_ALLOW_OOM if verb.allow_oom else scripts.TRANSITION,
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
                b"" if base is None else base.etag,
                verb.kind.encode(),
                self.payload,
                self.sources,
                b"" if verb.target is None else verb.target.value.encode(),
                TERMINAL_SPACED,
                verb.when_cancel_pending.encode(),
                verb.when_terminal.encode(),
                change.merge,
                change.due_at,
                change.waiter,
                change.wake,
                *change.stamp,
                b"%d" % len(change.unset),
                b"%d" % len(increments),
                *change.unset,
                *_flat(increments),
                *_flat(change.fields),
            ),
            subject=f"flow {self.target.flow_id}",
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
            return _found(self.target.flow_id, reply[1])
        return raise_refusal(
            reply, self.target.flow_id, self.op, expected=self.expected[0] or b"0", to=self.verb.target
        )


_SOURCES = {
    verb: spaced(verb.sources)
    for verb in (START_RUNNING, SET_WAITING, RESUME, FINISH, FAIL, CANCEL, REQUEST_CANCEL, UPDATE_STATE)
}


def _run(
    namespace: Namespace, flow: Flow | UUID | str, verb: Verb, change: Change, payload: bytes, **options: object
) -> Generator[Call, Any, Flow]:
    transition = Transition.of(namespace, target_of(flow), verb, change, payload, **options)  # type: ignore[arg-type]  # the two every verb takes
    reply = yield transition.call(namespace)
    return transition.read(reply)


_EMPTY_PAYLOAD = pack("payload", {})


def start_running(namespace: Namespace, flow: Flow | UUID | str, **options: object) -> Generator[Call, Any, Flow]:
    """Created or waiting → running."""
    return _run(namespace, flow, START_RUNNING, NO_CHANGE, _EMPTY_PAYLOAD, **options)


def set_waiting(
    namespace: Namespace, flow: Flow | UUID | str, wait: Wait | Mapping[str, Any], **options: object
) -> Generator[Call, Any, Flow]:
    """Running → waiting."""
    wire, change = _entering_wait(wait)
    payload = pack("wait", {"wait": wire}, extra_depth=1)
    return _run(namespace, flow, SET_WAITING, change, payload, **options)


def resume(
    namespace: Namespace, flow: Flow | UUID | str, state_patch: Any, **options: object  # noqa: ANN401 - the caller's
) -> Generator[Call, Any, Flow]:
    """Waiting → running, the patch merged."""
    payload = pack("state_patch", {"state_patch": state_patch}, extra_depth=1)
    return _run(namespace, flow, RESUME, merging("state_patch", state_patch), payload, **options)


def finish(
    namespace: Namespace, flow: Flow | UUID | str, final_state: Any, **options: object  # noqa: ANN401 - the caller's
) -> Generator[Call, Any, Flow]:
    """Running → finished, the patch merged."""
    payload = pack("final_state", {"final_state": final_state}, extra_depth=1)
    return _run(namespace, flow, FINISH, merging("final_state", final_state), payload, **options)


def fail(
    namespace: Namespace, flow: Flow | UUID | str, reason: str, **options: object
) -> Generator[Call, Any, Flow]:
    """Running or waiting → failed, the reason and the server's time in the state."""
    if not isinstance(reason, str):
        raise InvalidData(f"reason must be a string, not {type(reason).__name__}")
    payload = pack("reason", {"reason": reason})
    # A state that is not a mapping is replaced by the failure, as any patch that is one would.
    change = Change(merge=b"patch", stamp=failure_stamp(reason))
    return _run(namespace, flow, FAIL, change, payload, **options)


def request_cancel(namespace: Namespace, flow: Flow | UUID | str, **options: object) -> Generator[Call, Any, Flow]:
    """Set the sticky flag; on a flow that has it or has ended, change nothing."""
    change = Change(fields={b"cancel_requested": b"1"}, wake=b"1")
    return _run(namespace, flow, REQUEST_CANCEL, change, _EMPTY_PAYLOAD, **options)


def cancel(namespace: Namespace, flow: Flow | UUID | str, **options: object) -> Generator[Call, Any, Flow]:
    """Any live status → cancelled."""
    return _run(namespace, flow, CANCEL, NO_CHANGE, _EMPTY_PAYLOAD, **options)


def update_state(  # noqa: PLR0913 - the public signature
    namespace: Namespace,
    flow: Flow | UUID | str,
    patch: Any,  # noqa: ANN401 - the caller's
    *,
    next_step: str | None,
    increment: Mapping[str, int] | None,
    unset: Iterable[str],
    **options: object,
) -> Generator[Call, Any, Flow]:
    """Merge into the state and move the step; the status stays."""
    change = merging("patch", patch)
    payload: dict[str, Any] = {"patch": patch, "next_step": next_step}
    if next_step is not None:
        change.fields[b"current_step"] = require_name("next_step", next_step)
    if increment:
        payload["increment"] = _require_increment(increment)
    if isinstance(unset, str | bytes):
        raise InvalidData("unset must be the keys to remove, as in unset=['tmp'], not one string")
    if keys := list(unset):
        payload["unset"] = keys
    change = attrs.evolve(
        change,
        merge=change.merge or (b"patch" if increment else b""),
        unset=[_state_field(key) for key in keys],
        increments={_state_field(key): delta for key, delta in (increment or {}).items()},
    )
    _require_disjoint(change)
    return _run(namespace, flow, UPDATE_STATE, change, pack("patch", payload, extra_depth=1), **options)


def _require_increment(increment: object) -> dict[str, int]:
    if not isinstance(increment, Mapping):
        raise InvalidData(f"increment must map keys to whole numbers, not {type(increment).__name__}")
    for key, delta in increment.items():
        if not INT64_MIN <= whole_number(f"increment[{key!r}]", delta) <= INT64_MAX:
            raise InvalidData(f"increment[{key!r}] is beyond 64 bits")
    return dict(increment)


def _require_disjoint(change: Change) -> None:
    """One key, one thing done to it: there is no order in which two would be right."""
    if (change.unset or change.increments) and change.merge == b"replace":
        raise InvalidData("increment and unset need a patch that is a mapping, or none")
    named = [*change.unset, *change.increments, *(field for field in change.fields if _is_state(field))]
    if twice := {field for field in named if named.count(field) > 1}:
        keys = ", ".join(sorted(field[2:].decode() for field in twice))
        raise InvalidData(f"patch, increment and unset must name different keys; named twice: {keys}")


# --- the primitive -------------------------------------------------------------------------------------


def update_and_append(  # noqa: PLR0913 - the public signature
    namespace: Namespace,
    flow: Flow,
    kind: str,
    payload: Any,  # noqa: ANN401 - the caller's
    *,
    expected_revision: object,
    op_id: object,
) -> Generator[Call, Any, tuple[Flow, FlowEvent]]:
    """Write the mutable fields of `flow` if its revision is still the stored one."""
    if not isinstance(flow, Flow):
        raise InvalidData(f"update_and_append takes a Flow, not {type(flow).__name__}")
    require_name("kind", kind)
    target = target_of(flow)
    status = status_of(flow.status)
    verb = Verb(kind, status, when_cancel_pending="allow" if status is FlowStatus.CANCELLED else "refuse")
    packed = pack("payload", {} if payload is None else payload)
    revision = whole_number("flow.revision", flow.revision)
    transition = Transition.of(
        namespace,
        target,
        verb,
        _rewriting(flow, target, status),
        packed,
        expected_revision=revision,
        op_id=op_id,
        sources=spaced({*verb.sources, *(() if status.is_terminal else (status,))}),
    )
    expected_etag = require_name("flow.etag", flow.etag)
    if expected_revision is not None and whole_number("expected_revision", expected_revision) != revision:
        raise RevisionMismatch(target.flow_id, expected_revision, revision)  # type: ignore[arg-type]  # checked above
    transition = attrs.evolve(transition, expected=(b"%d" % revision, expected_etag))
    reply = yield transition.call(namespace)
    updated = transition.read(reply)
    event_revision, event_id = (reply[1], reply[3]) if reply[0] == b"OK" else (reply[3], reply[2])
    return updated, FlowEvent(
        id=event_id.decode(),
        flow_id=target.flow_id,
        revision=int(event_revision),
        kind=kind,
        payload=unpack(packed),
        at=event_time(event_id.decode()) if event_id else updated.updated_at,
        op_id=transition.op,
    )


def _rewriting(flow: Flow, target: Target, status: FlowStatus) -> Change:
    """The change that makes the stored flow what `flow` is."""
    base = target.base
    if base is not None:
        for name in _IDENTITY:
            if getattr(flow, name) != base.read(name):
                raise InvalidData(f"flow {target.flow_id}: {name} never changes after creation")
    change = Change()
    if status is FlowStatus.WAITING:
        if flow.wait is None:
            raise InvalidData(f"flow {target.flow_id}: a waiting flow needs a wait")
        _, change = _entering_wait(flow.wait)
    change.fields[b"current_step"] = require_name("current_step", flow.current_step)
    if flow.cancel_requested:
        change.fields[b"cancel_requested"] = b"1"
        change = attrs.evolve(change, wake=b"1")
    state = _state_fields("state", flow.state)
    current = base is not None and base.etag == flow.etag.encode() and base.revision == flow.revision
    if base is not None and current and WHOLE_STATE not in base.fields and WHOLE_STATE not in state:
        # The compare makes sure that the base is what is stored: send what differs from it.
        old = {field: value for field, value in base.fields.items() if _is_state(field)}
        change.fields.update({field: value for field, value in state.items() if old.get(field) != value})
        return attrs.evolve(change, unset=[field for field in old if field not in state])
    change.fields.update(state)
    return attrs.evolve(change, merge=b"replace")


def mutate(  # noqa: PLR0913 - the public signature
    namespace: Namespace,
    flow_id: UUID | str | Flow,
    fn: Callable[[Flow], Flow],
    *,
    kind: str,
    payload: Any,  # noqa: ANN401 - the caller's
    retries: int,
    expected_revision: int | None,
    op_id: object,
) -> Generator[Any, Any, Flow]:
    """Read, apply `fn`, compare and write; again from the read when another writer won."""
    target = Target(flow_id_of(flow_id))
    for left in range(max(0, whole_number("retries", retries)), -1, -1):
        flow = yield from get(namespace, target.flow_id)
        if flow is None:
            raise FlowNotFound(target.flow_id)
        changed = fn(flow)
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


# --- pieces --------------------------------------------------------------------------------------------


def _op_args(op: str, brought: object) -> tuple[bytes, bytes, bytes]:
    """What every changing script gets first: op, span_ms of a first attempt, deep."""
    return op.encode(), b"", b"" if brought is None else b"1"


def _flat(fields: Mapping[bytes, bytes]) -> Iterable[bytes]:
    for pair in fields.items():
        yield from pair


def _found(flow_id: UUID, flat: Sequence[bytes]) -> Flow:
    flow = read_flow(flow_id, flat)
    if flow is None:
        raise FlowNotFound(flow_id)
    return flow


def _is_state(field: bytes) -> bool:
    return field == WHOLE_STATE or field.startswith(STATE_PREFIX)


def _state_field(key: object) -> bytes:
    if not isinstance(key, str):
        raise InvalidData(f"state keys must be strings, not {key!r}")
    try:
        return STATE_PREFIX + key.encode()
    except UnicodeEncodeError:
        raise InvalidData(f"state key {key!r} holds a lone surrogate") from None


def _state_fields(what: str, state: Any) -> Fields:  # noqa: ANN401 - the caller's
    """The hash fields of a whole state, or of a patch."""
    if not isinstance(state, Mapping):
        return {WHOLE_STATE: encode(what, state)}
    # One level of the depth limit is the mapping itself.
    return {_state_field(key): encode(f"{what}[{key!r}]", value, extra_depth=-1) for key, value in state.items()}


def merging(what: str, patch: Any) -> Change:  # noqa: ANN401 - the caller's
    """The shallow merge of a patch: keys into keys, anything else in place of the whole state."""
    if patch is None:
        return Change()
    return Change(fields=_state_fields(what, patch), merge=b"patch" if isinstance(patch, Mapping) else b"replace")


def _entering_wait(wait: Wait | Mapping[str, Any]) -> tuple[Mapping[str, Any], Change]:
    """The wire form of a wait, and what stores and indexes it."""
    condition = parse_wait(wait)
    wire = wire_form(wait)
    fields = {b"wait": pack("wait", wire)}
    if condition is None:
        return wire, Change(fields=fields)
    if condition.waiter:
        fields[b"waiter"] = condition.waiter
    due_at = b"" if condition.due is None else b"%d" % to_us(condition.due)
    return wire, Change(fields=fields, due_at=due_at, waiter=condition.waiter)
