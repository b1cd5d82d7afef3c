"""Changes to lose the replies of, and what their resends look like on the wire."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID

import attrs

from redisflow import ExternalEvent, Flow, FlowManager, FlowStatus, Manual, StepObservation, WaitEngine
from redisflow.scripts import SETTLE

IDENTITY: dict[str, Any] = {"controller_id": "c", "goal": "g", "owner_session_key": "o", "requester_origin": "r"}
_OP_DIGITS = 32


def sent(command: list[bytes]) -> tuple[UUID, bytes, bytes] | None:
    """Return flow, op and attempt of a call: empty for the first attempt on a new flow. `None` for another command."""
    if command[0] not in {b"EVALSHA", b"EVAL"}:
        return None
    argv = command[3 + int(command[2]) :]
    if len(argv) < 2 or len(argv[0]) != _OP_DIGITS:
        return None  # the probe at connect, a read, or the settling of a flow
    op, attempt = argv[0], argv[1].partition(b"|")[0]
    return UUID(command[3].rpartition(b":")[2].decode()), op, attempt


def settles(command: list[bytes]) -> bool:
    """Tell whether a command settles a flow."""
    return command[0] in {b"EVALSHA", b"EVAL"} and command[1] in {SETTLE.source.sha, SETTLE.source.text}


def prepared(flows: FlowManager, status: FlowStatus) -> Flow:
    """A flow in that status; a waiting one waits for an event."""
    flow = flows.create_managed(**IDENTITY, state={"n": 0})
    if status is not FlowStatus.CREATED:
        flow = flows.start_running(flow)
    return flows.set_waiting(flow, ExternalEvent("t", "c")) if status is FlowStatus.WAITING else flow


Verb = Callable[[FlowManager, Flow, str | None], Any]
VERBS: dict[str, tuple[FlowStatus, str, Verb]] = {
    "start_running": (FlowStatus.CREATED, "started", lambda m, f, op: m.start_running(f, op_id=op)),
    "set_waiting": (FlowStatus.RUNNING, "waiting", lambda m, f, op: m.set_waiting(f, Manual(), op_id=op)),
    "resume": (FlowStatus.WAITING, "resumed", lambda m, f, op: m.resume(f, {"a": 1}, op_id=op)),
    "finish": (FlowStatus.RUNNING, "finished", lambda m, f, op: m.finish(f, {"a": 1}, op_id=op)),
    "fail": (FlowStatus.RUNNING, "failed", lambda m, f, op: m.fail(f, "broken", op_id=op)),
    "cancel": (FlowStatus.WAITING, "cancelled", lambda m, f, op: m.cancel(f, op_id=op)),
    "request_cancel": (FlowStatus.RUNNING, "cancel_requested", lambda m, f, op: m.request_cancel(f, op_id=op)),
    "update_state": (
        FlowStatus.RUNNING,
        "state_updated",
        lambda m, f, op: m.update_state(f, {"a": 1}, increment={"n": 5}, op_id=op),
    ),
    "update_and_append": (
        FlowStatus.RUNNING,
        "rewritten",
        lambda m, f, op: m.update_and_append(attrs.evolve(f, current_step="s"), "rewritten", op_id=op),
    ),
    "mutate": (
        FlowStatus.RUNNING,
        "mutated",
        lambda m, f, op: m.mutate(f.id, lambda seen: attrs.evolve(seen, current_step="s"), kind="mutated", op_id=op),
    ),
    "append_event": (FlowStatus.RUNNING, "note", lambda m, f, op: m.append_event(f, "note", op_id=op)),
    "record_step_observation": (
        FlowStatus.RUNNING,
        "step_observed",
        lambda m, f, op: m.record_step_observation(StepObservation(f.id, "run", "task", "running"), op_id=op),
    ),
    "try_resume_external": (
        FlowStatus.WAITING,
        "resumed",
        lambda m, f, op: WaitEngine(m).try_resume_external(f.id, "t", "c", {"x": 1}, op_id=op),
    ),
}
