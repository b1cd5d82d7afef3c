"""An operation called again under its op id is applied once, and answers as it did, whoever wrote in between."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import attrs
import pytest

from redisflow import ExternalEvent, FlowStatus, RevisionMismatch
from tests.support.subjects import STATE, VERBS, WHO, brought_id, create, flow_in, observed, source_of, trail

if TYPE_CHECKING:
    from tests.support.subjects import Subject


@pytest.fixture
def op_id() -> str:
    """A fresh operation id."""
    return brought_id()


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_called_twice_is_applied_once(flows: Any, subject: Subject, verb: str, op_id: str) -> None:
    """At once: the same answer, nothing written. By Flow, by id, by the new version."""
    flow = flow_in(flows, source_of(verb))
    first = VERBS[verb](flows, flow, op_id=op_id)
    assert first.etag == op_id
    before = subject.snapshot()
    for ref in (flow, flow.id, first):
        assert VERBS[verb](flows, ref, op_id=op_id) == first
    assert subject.snapshot() == before


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in {"finish", "fail", "cancel"}])
def test_a_verb_is_recognised_after_others_moved_on(flows: Any, subject: Subject, verb: str, op_id: str) -> None:
    """Later: success, nothing written, the flow as it stands."""
    flow = flow_in(flows, source_of(verb))
    VERBS[verb](flows, flow, op_id=op_id)
    for n in range(120):  # beyond what a first look reads
        flows.append_event(flow, "note", n)
    flows.cancel(flow)
    before = subject.snapshot()
    assert VERBS[verb](flows, flow, op_id=op_id) == flows.get(flow.id)
    assert subject.snapshot() == before


@pytest.mark.parametrize("create_verb", ["create_managed", "create_mirrored"])
def test_creation_called_twice_creates_once(flows: Any, subject: Subject, create_verb: str, op_id: str) -> None:
    """With the caller's own id, the same creation answers the flow; another one is refused."""
    flow_id = uuid4()
    make = getattr(flows, create_verb)
    first = make(**WHO, state=STATE, flow_id=flow_id, op_id=op_id)
    assert make(**WHO, state=STATE, flow_id=flow_id, op_id=op_id) == first
    moved = flows.cancel(first)
    before = subject.snapshot()
    assert make(**WHO, state=STATE, flow_id=flow_id, op_id=op_id) == moved
    assert subject.snapshot() == before


def test_an_audit_entry_called_twice_is_one(flows: Any, op_id: str) -> None:
    """The very same event is answered: id, revision, time."""
    flow = flow_in(flows, "running")
    first = flows.append_event(flow, "note", {"n": 1}, op_id=op_id)
    flows.update_state(flow, {"x": 1})
    assert flows.append_event(flow, "note", {"n": 1}, op_id=op_id) == first
    assert [event.kind for event in flows.iter_events(flow)] == ["created", "started", "note", "state_updated"]


def test_an_observation_called_twice_is_one(flows: Any, subject: Subject, op_id: str) -> None:
    """One step, one event."""
    flow = flow_in(flows, "running")
    first = flows.record_step_observation(observed(flow.id), op_id=op_id)
    before = subject.snapshot()
    assert flows.record_step_observation(observed(flow.id), op_id=op_id) == first
    assert subject.snapshot() == before
    flows.record_step_observation(observed(flow.id, status="failed"))
    before = subject.snapshot()
    assert flows.record_step_observation(observed(flow.id), op_id=op_id).id == first.id
    assert subject.snapshot() == before


def test_the_primitive_called_twice_is_applied_once(flows: Any, subject: Subject, op_id: str) -> None:
    """The event is the one it left the first time, also after others moved on."""
    flow = flow_in(flows, "running")
    wanted = attrs.evolve(flow, current_step="sort", state={"n": 1})
    first, event = flows.update_and_append(wanted, "sorted", {"by": "date"}, op_id=op_id)
    assert flows.update_and_append(wanted, "sorted", {"by": "date"}, op_id=op_id) == (first, event)
    moved = flows.finish(flow)
    before = subject.snapshot()
    assert flows.update_and_append(wanted, "sorted", {"by": "date"}, op_id=op_id) == (moved, event)
    assert subject.snapshot() == before


def test_mutate_called_twice_is_applied_once(flows: Any, subject: Subject, op_id: str) -> None:
    """`mutate` reads the flow anew; its op id is recognised all the same, also after others moved on."""
    flow = flow_in(flows, "running")

    def count(f: Any) -> Any:
        return attrs.evolve(f, state=f.state | {"n": f.state.get("n", 0) + 1})

    first = flows.mutate(flow.id, count, kind="counted", op_id=op_id)
    assert flows.mutate(flow.id, count, kind="counted", op_id=op_id) == first
    moved = flows.update_state(flow, {"x": 1})
    assert flows.mutate(flow.id, count, kind="counted", op_id=op_id) == moved
    assert moved.state["n"] == 1
    assert [kind for kind, *_ in trail(flows, flow)] == ["created", "started", "counted", "state_updated"]


def test_mutates_replay_comes_before_its_expected_revision(flows: Any, op_id: str) -> None:
    """The call that settles an unknown outcome is the same call: its expectation held the first time."""
    flow = flow_in(flows, "running")

    def step(f: Any) -> Any:
        return attrs.evolve(f, current_step="sort")

    first = flows.mutate(flow.id, step, kind="sorted", expected_revision=1, op_id=op_id)
    assert flows.mutate(flow.id, step, kind="sorted", expected_revision=1, op_id=op_id) == first


def test_an_external_event_called_twice_resumes_once(flows: Any, subject: Subject, op_id: str) -> None:
    """The flow is answered again, though it waits no more."""
    engine = subject.engine(flows)
    flow = flow_in(flows, "waiting", wait=ExternalEvent("approvals", "42"))
    first = engine.try_resume_external(flow.id, "approvals", "42", {"ok": True}, op_id=op_id)
    assert first is not None
    before = subject.snapshot()
    assert engine.try_resume_external(flow.id, "approvals", "42", {"ok": True}, op_id=op_id) == first
    assert subject.snapshot() == before


def test_an_op_id_may_be_text_a_uuid_or_bytes(flows: Any) -> None:
    """All three name one operation."""
    op = uuid4()
    flow = create(flows)
    first = flows.start_running(flow, op_id=op)
    assert first.etag == op.hex
    for same in (op.hex, str(op), op.bytes, op.hex.upper()):
        assert flows.start_running(flow, op_id=same) == first


def test_another_op_id_is_another_operation(flows: Any, op_id: str) -> None:
    """Two operations are applied twice."""
    flow = flow_in(flows, "running")
    flows.update_state(flow, increment={"processed": 1}, op_id=op_id)
    after = flows.update_state(flow, increment={"processed": 1}, op_id=brought_id())
    assert (after.state["processed"], after.revision) == (2, 3)


def test_an_op_id_belongs_to_one_flow(flows: Any, op_id: str) -> None:
    """The same id on two flows is applied to both: the trail is the flow's."""
    first, second = create(flows), create(flows)
    for flow in (first, second):
        assert flows.start_running(flow, op_id=op_id).status is FlowStatus.RUNNING


def test_without_an_op_id_every_call_has_its_own(flows: Any) -> None:
    """An etag is never used twice."""
    flow = flow_in(flows, "running")
    etags = {flows.update_state(flow, {"n": n}).etag for n in range(20)}
    assert len(etags) == 20
    assert all(UUID(hex=etag).hex == etag for etag in etags)


def test_a_refused_operation_leaves_its_op_id_unused(flows: Any, op_id: str) -> None:
    """Refused is not applied: the same op id goes through once the reason is gone."""
    flow = flow_in(flows, "running")
    with pytest.raises(RevisionMismatch):
        flows.finish(flow.id, expected_revision=5, op_id=op_id)
    assert flows.finish(flow.id, op_id=op_id).etag == op_id
