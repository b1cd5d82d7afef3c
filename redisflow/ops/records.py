"""The audit trail and observed steps: what is recorded of a flow beside its changes."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import suppress
from typing import Any, TypeVar
from uuid import uuid4

from redisflow.calls import Call, Read, command
from redisflow.codec import event_time, pack, read_event, read_step, step_head, step_tail, unpack
from redisflow.errors import InvalidData, shown
from redisflow.flow import FlowEvent, FlowRef, FlowStep, FlowStepStatus, StepObservation, StepRuntime
from redisflow.ops.namespace import (
    Namespace,
    Target,
    expectation,
    flow_id_of,
    if_own,
    is_drawn,
    keys_of,
    limit_of,
    op_id_of,
    partition_of,
    raise_refusal,
    target_of,
)
from redisflow.waits import require_name

E = TypeVar("E", FlowStepStatus, StepRuntime)

TASK_LIMIT_BYTES = 64 * 1024
EVENTS_PAGE = 500


def append_event(
    namespace: Namespace,
    flow: FlowRef,
    kind: str,
    payload: Any,
    *,
    expected_revision: object,
    op_id: object,
) -> Generator[Call, Any, FlowEvent]:
    """Append an audit entry alone."""
    target = target_of(flow)
    op = op_id_of(op_id)
    kind_bytes = require_name("kind", kind)
    packed = pack("payload", {} if payload is None else payload)
    namespace.require_room("payload", [packed])
    expected = expectation(target, expected_revision)
    partition = partition_of(namespace, target)
    reply = yield Call(
        namespace.appending.append_event,
        partition.slot,
        keys_of(partition, target, op_id),
        (kind_bytes, packed),
        target.flow_id,
        op,
        expected,
        owner=namespace.owner,
        copy=target.copy,
        brought=op_id is not None,
        seen=b"" if op_id is None else partition.seen(target.member),
        doubtful=op_id is not None and is_drawn(op),
    )
    if reply[0] != b"OK":
        raise_refusal(reply, target.flow_id, op, expected=expected)
    event_id = reply[1].decode()
    return FlowEvent(
        id=event_id,
        flow_id=target.flow_id,
        revision=int(reply[2]),
        kind=kind,
        payload=unpack(packed),
        at=event_time(event_id),
        op_id=op,
    )


def list_events(namespace: Namespace, flow_id: FlowRef, limit: int | None) -> Generator[Read, Any, list[FlowEvent]]:
    """The last events, newest first."""
    target = Target.at(flow_id_of(flow_id))
    limit = limit_of(limit)
    if limit == 0:
        return []
    bound = () if limit is None else (b"COUNT", limit)
    partition = partition_of(namespace, target)
    newest = command(partition, b"XREVRANGE", partition.events(target.member), b"+", b"-", *bound)
    (entries,) = yield Read([if_own(namespace, target, newest)])
    return [read_event(target.flow_id, entry) for entry in entries]


class Trail:
    """Every event of a flow, oldest first, a page at a time."""

    def __init__(self, namespace: Namespace, flow_id: FlowRef, after: str | None) -> None:
        """Check the inputs; `after` is the id of the last event not wanted."""
        self._namespace = namespace
        self._target = Target.at(flow_id_of(flow_id))
        self._start = b"-" if after is None else b"(" + require_event_id(after)
        self._done = False

    def next_page(self) -> Generator[Read, Any, list[FlowEvent] | None]:
        """The next events; `None` after the last."""
        if self._done:
            return None
        namespace, target = self._namespace, self._target
        partition = partition_of(namespace, target)
        stream = partition.events(target.member)
        behind = command(partition, b"XRANGE", stream, self._start, b"+", b"COUNT", EVENTS_PAGE)
        (entries,) = yield Read([if_own(namespace, target, behind)])
        self._done = len(entries) < EVENTS_PAGE
        if not entries:
            return None
        self._start = b"(" + entries[-1][0]
        return [read_event(self._target.flow_id, entry) for entry in entries]


def require_event_id(event_id: object) -> bytes:
    """Return an event id as the server takes it.

    Raises:
        InvalidData: not `<milliseconds>` or `<milliseconds>-<sequence>`.
    """
    if isinstance(event_id, str):
        milliseconds, dash, sequence = event_id.partition("-")
        if _is_uint64(milliseconds) and (_is_uint64(sequence) or not dash):
            return event_id.encode()
    raise InvalidData(f"not an event id: {shown(event_id)}; expected '<milliseconds>-<sequence>'")


def _is_uint64(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) < 2**64


# --- steps ---------------------------------------------------------------------------------------------


def record_step_observation(
    namespace: Namespace,
    observation: StepObservation,
    *,
    runtime: StepRuntime | str,
    expected_revision: object,
    op_id: object,
) -> Generator[Call, Any, FlowStep]:
    """Upsert the step `(flow_id, run_id)`, whatever the flow's status."""
    if not isinstance(observation, StepObservation):
        raise InvalidData(f"expected a StepObservation, not {type(observation).__name__}")
    target = target_of(observation.flow_id)
    op = op_id_of(op_id)
    run_id = require_name("run_id", observation.run_id)
    require_name("task", observation.task, limit=TASK_LIMIT_BYTES)
    child = observation.child_session_key
    if child is not None:
        require_name("child_session_key", child)
    status = _member("step status", FlowStepStatus, observation.status)
    runtime = _member("step runtime", StepRuntime, runtime)
    tail = step_tail(observation.run_id, observation.task, runtime, status, observation.result)
    namespace.require_room("result", [tail])
    payload = {"run_id": observation.run_id, "status": status.value, "runtime": runtime.value}
    expected = expectation(target, expected_revision)
    partition = partition_of(namespace, target)
    reply = yield Call(
        namespace.appending.observe_step,
        partition.slot,
        keys_of(partition, target, op_id, partition.steps(target.member)),
        (
            run_id,
            step_head(uuid4()),
            pack("child_session_key", child),
            tail,
            b"step_observed",
            pack("payload", payload),
        ),
        target.flow_id,
        op,
        expected,
        owner=namespace.owner,
        copy=target.copy,
        brought=op_id is not None,
        seen=b"" if op_id is None else partition.seen(target.member),
        doubtful=op_id is not None and is_drawn(op),
    )
    if reply[0] != b"OK":
        raise_refusal(reply, target.flow_id, op, expected=expected)
    return read_step(target.flow_id, reply[1])


def _member(what: str, kind: type[E], value: object) -> E:
    if isinstance(value, str):
        with suppress(ValueError):
            return kind(value)
    raise InvalidData(f"not a {what}: {shown(value)}; one of {', '.join(kind)}")


def list_steps(namespace: Namespace, flow_id: FlowRef) -> Generator[Read, Any, list[FlowStep]]:
    """Every step of a flow, oldest first."""
    target = Target.at(flow_id_of(flow_id))
    partition = partition_of(namespace, target)
    every = command(partition, b"HVALS", partition.steps(target.member))
    (packed,) = yield Read([if_own(namespace, target, every)])
    steps = [read_step(target.flow_id, value) for value in packed]
    return sorted(steps, key=lambda step: (step.created_at, step.run_id))


def find_step_by_run_id(namespace: Namespace, flow_id: FlowRef, run_id: str) -> Generator[Read, Any, FlowStep | None]:
    """One step of a flow; `None` if that run was never observed."""
    target = Target.at(flow_id_of(flow_id))
    partition = partition_of(namespace, target)
    one = command(partition, b"HMGET", partition.steps(target.member), require_name("run_id", run_id))
    ((packed,),) = yield Read([if_own(namespace, target, one)])
    return None if packed is None else read_step(target.flow_id, packed)
