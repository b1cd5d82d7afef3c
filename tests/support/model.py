"""The domain rules of docs/concepts.md once more, in plain Python: what the library is held against.

Written from the rules alone; it shares no code with the library.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

import attrs

LEADS_TO = {
    "created": {"running", "cancelled"},
    "running": {"waiting", "finished", "failed", "cancelled"},
    "waiting": {"running", "failed", "cancelled"},
    "finished": set[str](),
    "failed": set[str](),
    "cancelled": set[str](),
}
TERMINAL = {status for status, targets in LEADS_TO.items() if not targets}


class Refused(Exception):
    """A refusal: the name of the library's exception, and the facts it must carry."""

    def __init__(self, name: str, **facts: Any) -> None:
        super().__init__(name, facts)
        self.name = name
        self.facts = facts


@attrs.define
class ModelEvent:
    """What one event must say."""

    revision: int
    kind: str
    payload: dict[str, Any]


@attrs.define
class ModelFlow:
    """A flow as it must be stored."""

    id: UUID
    identity: dict[str, str]
    current_step: str
    state: Any
    wait: dict[str, Any] | None = None
    status: str = "created"
    cancel_requested: bool = False
    revision: int = 0
    events: list[ModelEvent] = attrs.field(factory=list)
    steps: dict[str, dict[str, Any]] = attrs.field(factory=dict)
    ops: set[str] = attrs.field(factory=set)
    created_by: str | None = None
    # The creations and deletions of flows that had this id before; `None` if there were none.
    past: frozenset[str | None] | None = None
    # The server's, noted from what it answered:
    etag: str = ""
    created_at: datetime | None = None
    updated_at: datetime | None = None


@attrs.define
class Model:
    """A namespace."""

    flows: dict[UUID, ModelFlow] = attrs.field(factory=dict)
    pasts: dict[UUID, frozenset[str | None]] = attrs.field(factory=dict)  # of flows that were deleted

    def create(
        self, flow_id: UUID, identity: dict[str, str], state: Any, *, mirrored: bool, exist_ok: bool, op: str | None
    ) -> None:
        """Create, or find what may be found."""
        found = self.flows.get(flow_id)
        past = self.pasts.get(flow_id) if found is None else found.past
        if found is not None:
            same_owner = found.identity["owner_session_key"] == identity["owner_session_key"]
            if (op and op == found.created_by) or (exist_ok and same_owner):
                return
            raise Refused("FlowExists", flow_id=flow_id)
        if op and past and op in past:
            raise Refused("FlowNotFound", flow_id=flow_id)
        flow = ModelFlow(flow_id, identity, "init", {} if state is None else state, ops={op} if op else set())
        flow.created_by, flow.past = op, past
        self.pasts.pop(flow_id, None)
        origin = {"controller_id": identity["controller_id"], "goal": identity["goal"], "current_step": "init"}
        flow.events.append(ModelEvent(0, "created", origin))
        if mirrored:
            flow.status, flow.revision = "running", 1
            flow.events.append(ModelEvent(1, "started", {}))
        self.flows[flow_id] = flow

    def change(  # a verb is made of this much
        self,
        flow_id: UUID,
        kind: str,
        payload: dict[str, Any],
        edit: Callable[[ModelFlow], None] = lambda _: None,
        *,
        target: str | None = None,
        may_stay: bool = False,
        pending: str = "refuse",
        terminal: str = "refuse",
        expected: int | None = None,
        expected_etag: str | None = None,
        op: str | None = None,
    ) -> bool:
        """Run a verb; say whether it changed anything.

        Args:
            flow_id: which flow.
            kind: of the event.
            payload: of the event.
            edit: changes the flow beside its status; runs last, and may refuse.
            target: the status it leads to; `None` for the same.
            may_stay: whether `target` may also be the status it has.
            pending: `refuse`, `allow` or `ignore` a pending cancel.
            terminal: `refuse` or `ignore` an ended flow.
            expected: the revision the caller expects.
            expected_etag: the version the caller expects.
            op: the operation's id, if the caller brought one.
        """
        stored = self.audit(flow_id, expected=expected, expected_etag=expected_etag, op=op)
        if stored is None:
            return False
        if stored.status in TERMINAL:
            if terminal == "ignore":
                return False
            raise Refused("AlreadyTerminal", flow_id=flow_id, status=stored.status)
        if stored.cancel_requested and pending != "allow":
            if pending == "ignore":
                return False
            raise Refused("CancelPending", flow_id=flow_id)
        allowed = target is None or target in LEADS_TO[stored.status] or (may_stay and target == stored.status)
        if not allowed:
            raise Refused("IllegalTransition", flow_id=flow_id, source=stored.status, target=target)
        flow = copy.deepcopy(stored)
        if flow.status == "waiting" and target is not None:
            flow.wait = None
        edit(flow)
        flow.status = target or flow.status
        flow.revision += 1
        flow.events.append(ModelEvent(flow.revision, kind, payload))
        flow.ops |= {op} if op else set()
        self.flows[flow_id] = flow
        return True

    def audit(
        self, flow_id: UUID, *, expected: int | None, expected_etag: str | None, op: str | None
    ) -> ModelFlow | None:
        """The guards every operation has; `None` for a replay."""
        flow = self.flows.get(flow_id)
        if flow is None:
            raise Refused("FlowNotFound", flow_id=flow_id)
        if op in flow.ops:
            return None
        stale = (expected is not None and expected != flow.revision) or (
            expected_etag is not None and expected_etag != flow.etag
        )
        if stale:
            raise Refused("RevisionMismatch", flow_id=flow_id, expected=expected, actual=flow.revision)
        return flow

    def append_event(self, flow_id: UUID, kind: str, payload: dict[str, Any], **guards: Any) -> None:
        """Append an audit entry alone."""
        if (flow := self.audit(flow_id, **guards)) is not None:
            flow.events.append(ModelEvent(flow.revision, kind, payload))
            flow.ops |= {guards["op"]} if guards["op"] else set()

    def observe(self, flow_id: UUID, step: dict[str, Any], **guards: Any) -> None:
        """Upsert a step."""
        if (flow := self.audit(flow_id, **guards)) is None:
            return
        old = flow.steps.get(step["run_id"], {})
        child = step["child_session_key"]
        flow.steps[step["run_id"]] = {
            **step,
            "child_session_key": old.get("child_session_key") if child is None else child,
        }
        payload = {name: step[name] for name in ("run_id", "status", "runtime")}
        flow.events.append(ModelEvent(flow.revision, "step_observed", payload))
        flow.ops |= {guards["op"]} if guards["op"] else set()

    def delete(self, flow_id: UUID, *, expected: int | None, expected_etag: str | None, op: str | None = None) -> bool:
        """Delete a flow; say whether there was one, or this very operation deleted it."""
        found = self.flows.get(flow_id)
        past = (self.pasts.get(flow_id) if found is None else found.past) or frozenset()
        if op and op in past:
            return True
        if found is None:
            return False
        self.audit(flow_id, expected=expected, expected_etag=expected_etag, op=None)
        self.pasts[flow_id] = past | {found.created_by, op}
        del self.flows[flow_id]
        return True

    def due(self, now: datetime) -> dict[UUID, str | None]:
        """What an engine must do at `now`: the flow's id and the `deadline` if that ends it, or `cancel`."""
        found: dict[UUID, str | None] = {}
        for flow in self.flows.values():
            if flow.status != "waiting" or flow.wait is None:
                continue
            known = flow.wait["kind"] in {"timer", "external_event", "manual"}
            at, deadline = (_time(flow.wait.get(name)) if known else None for name in ("at", "deadline"))
            if flow.cancel_requested:
                found[flow.id] = "cancel"
            elif deadline is not None and deadline <= now and (at is None or deadline < at):
                found[flow.id] = "deadline"
            elif at is not None and at <= now:
                found[flow.id] = None
        return found


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def merged(state: Any, patch: Any) -> Any:
    """The shallow merge: keys into keys, anything else in place of the whole."""
    if isinstance(state, Mapping) and isinstance(patch, Mapping):
        return {**state, **patch}
    return copy.deepcopy(patch)


def incremented(state: Any, increment: Mapping[str, int]) -> Any:
    """Add to top-level 64-bit integers; an absent one counts as 0."""
    if not isinstance(state, dict):
        raise Refused("InvalidData")
    result = dict(state)
    for key, delta in increment.items():
        old = result.get(key, 0)
        if type(old) is not int or not -(2**63) <= old + delta < 2**63:
            raise Refused("InvalidData")
        result[key] = old + delta
    return result


def exact(value: Any) -> Any:
    """A form in which 1, 1.0 and True differ, and mappings compare whatever their order."""
    if isinstance(value, Mapping):
        return {key: exact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [exact(item) for item in value]
    if isinstance(value, str):
        return str(value)  # the statuses are a kind of text
    return (type(value).__name__, repr(value))
