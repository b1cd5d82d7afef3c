from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import attrs
import pytest

from redisflow import (
    AlreadyTerminal,
    CancelPending,
    ExternalEvent,
    FlowStatus,
    Manual,
    Timer,
)
from tests.support.subjects import STATE, VERBS, WHO, create, flow_in, source_of, trail

if TYPE_CHECKING:
    from tests.support.subjects import Subject

LIVE = ("created", "running", "waiting")
TERMINAL = ("finished", "failed", "cancelled")


def test_a_flow_is_created_run_waits_resumes_and_finishes(flows: Any) -> None:
    """The happy path: the revision grows by one at every change, and patches merge."""
    flow = create(flows)
    assert (flow.status, flow.revision, flow.cancel_requested, flow.wait) == (FlowStatus.CREATED, 0, False, None)
    flow = flows.start_running(flow)
    assert (flow.status, flow.revision) == (FlowStatus.RUNNING, 1)
    wait = {"kind": "timer", "at": "2026-04-23T15:00:00Z"}
    flow = flows.set_waiting(flow, wait)
    assert (flow.status, flow.revision, flow.wait) == (FlowStatus.WAITING, 2, wait)
    assert flow.condition == Timer(at=datetime(2026, 4, 23, 15, tzinfo=UTC))
    flow = flows.resume(flow, {"processed": 5})
    assert (flow.status, flow.revision, flow.wait) == (FlowStatus.RUNNING, 3, None)
    assert flow.state == {"messages": 10, "processed": 5}
    flow = flows.finish(flow, {"summary": "10 done"})
    assert (flow.status, flow.revision) == (FlowStatus.FINISHED, 4)
    assert flow.state == {"messages": 10, "processed": 5, "summary": "10 done"}
    assert flows.get(flow.id) == flow


def test_creation_stores_what_was_given(flows: Any) -> None:
    """Identity, step and state are as given; both times are the server's, UTC, and equal."""
    before = datetime.now(UTC) - timedelta(seconds=2)
    flow = create(flows)
    assert {name: getattr(flow, name) for name in WHO} == WHO
    assert flow.state == STATE
    assert flow.created_at == flow.updated_at
    assert flow.created_at.tzinfo is UTC
    assert before < flow.created_at < datetime.now(UTC) + timedelta(seconds=2)
    assert len(flow.etag) == 32
    assert flows.get(flow.id) == flow


def test_a_flow_without_a_state_has_an_empty_mapping(flows: Any) -> None:
    """`state=None` and `current_step` left out: an empty mapping, at step `init`."""
    flow = flows.create_managed(**{name: text for name, text in WHO.items() if name != "current_step"})
    assert (flow.state, flow.current_step) == ({}, "init")
    assert flows.get(flow.id).state == {}


def test_a_mirrored_flow_begins_running(flows: Any) -> None:
    """`create_mirrored` is created and running in one script: revision 1, two events."""
    flow = flows.create_mirrored(**WHO, state=STATE)
    assert (flow.status, flow.revision) == (FlowStatus.RUNNING, 1)
    origin = {"controller_id": "kate/inbox", "goal": "triage inbox", "current_step": "classify"}
    assert trail(flows, flow) == [("created", 0, origin), ("started", 1, {})]
    assert flows.get(flow.id) == flow


WIRE_EVENT = {"kind": "external_event", "topic": "approvals", "correlation_id": "42"}
EVENTS: dict[str, tuple[str, Any]] = {
    "start_running": ("started", {}),
    "set_waiting": ("waiting", {"wait": WIRE_EVENT}),
    "resume": ("resumed", {"state_patch": {"approved": True}}),
    "finish": ("finished", {"final_state": {"summary": "10 done"}}),
    "fail": ("failed", {"reason": "downstream 503"}),
    "request_cancel": ("cancel_requested", {}),
    "cancel": ("cancelled", {}),
}


@pytest.mark.parametrize("verb", EVENTS)
def test_every_verb_leaves_just_its_event(flows: Any, verb: str) -> None:
    """One change, one event: its kind and payload are the table's, its revision and op the change's."""
    before = flow_in(flows, source_of(verb))
    known = len(trail(flows, before))
    after = VERBS[verb](flows, before)
    (event,) = list(flows.iter_events(before))[known:]
    assert (event.kind, event.payload) == EVENTS[verb]
    assert (event.revision, event.op_id, event.flow_id) == (after.revision, after.etag, after.id)
    assert after.revision == before.revision + 1
    assert abs(event.at - after.updated_at) < timedelta(seconds=1)


def test_creation_leaves_an_event(flows: Any) -> None:
    """`created` says who began what, at which step."""
    flow = create(flows)
    origin = {"controller_id": "kate/inbox", "goal": "triage inbox", "current_step": "classify"}
    assert trail(flows, flow) == [("created", 0, origin)]


def test_update_state_leaves_patch_and_step_in_its_event(flows: Any) -> None:
    """`state_updated` carries the patch and the next step, also where either is left out."""
    flow = flow_in(flows, "running")
    flows.update_state(flow, {"errors": []}, next_step="fetch")
    flows.update_state(flow, {"x": 1})
    flows.update_state(flow, next_step="sort")
    assert trail(flows, flow)[2:] == [
        ("state_updated", 2, {"patch": {"errors": []}, "next_step": "fetch"}),
        ("state_updated", 3, {"patch": {"x": 1}, "next_step": None}),
        ("state_updated", 4, {"patch": None, "next_step": "sort"}),
    ]


@pytest.mark.parametrize("verb", ["resume", "finish"])
def test_a_verb_without_a_patch_says_so_in_its_event(flows: Any, verb: str) -> None:
    """No patch: the state stays, and the event carries null."""
    flow = flow_in(flows, source_of(verb))
    after = getattr(flows, verb)(flow)
    name = {"resume": "state_patch", "finish": "final_state"}[verb]
    assert after.state == STATE
    assert trail(flows, flow)[-1][2] == {name: None}


def test_a_failure_is_stamped_with_the_servers_time(flows: Any) -> None:
    """`state["failure"]` is the reason and the time of the change, as RFC 3339 text."""
    flow = flows.fail(flow_in(flows, "running"), "downstream 503")
    failure = flow.state["failure"]
    assert failure.keys() == {"reason", "at"}
    assert failure["reason"] == "downstream 503"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", failure["at"])
    assert datetime.fromisoformat(failure["at"]) == flow.updated_at
    assert flow.state["messages"] == 10
    assert flows.get(flow.id) == flow


@pytest.mark.parametrize("reason", ["", "ü" * 400, "line\nline\0nul", "x" * 70_000])
def test_any_text_is_a_reason(flows: Any, reason: str) -> None:
    """A reason comes back as it was, whatever its length and characters."""
    flow = flow_in(flows, "waiting")
    assert flows.fail(flow, reason).state["failure"]["reason"] == reason
    assert flows.get(flow.id).state["failure"]["reason"] == reason


@pytest.mark.parametrize("status", LIVE)
def test_cancel_ends_a_flow_from_any_live_status(flows: Any, status: str) -> None:
    """`cancel` needs no request, and clears a wait."""
    flow = flows.cancel(flow_in(flows, status))
    assert (flow.status, flow.wait, flow.cancel_requested) == (FlowStatus.CANCELLED, None, False)


@pytest.mark.parametrize("status", LIVE)
def test_a_cancel_request_changes_nothing_but_the_flag(flows: Any, status: str) -> None:
    """Status, step, state and wait stay; the revision grows."""
    before = flow_in(flows, status)
    after = flows.request_cancel(before)
    assert after.cancel_requested
    assert after.revision == before.revision + 1
    kept = {"cancel_requested": False, "revision": before.revision, "etag": before.etag}
    assert attrs.evolve(after, updated_at=before.updated_at, **kept) == before


@pytest.mark.parametrize("status", [*LIVE, *TERMINAL])
def test_a_cancel_request_that_says_nothing_new_changes_nothing(flows: Any, subject: Subject, status: str) -> None:
    """No revision, no event where the flag is set already, or the flow has ended."""
    flow = flow_in(flows, status)
    if status in LIVE:
        flow = flows.request_cancel(flow)
    before = subject.snapshot()
    for ref in (flow, flow.id, str(flow.id)):
        assert flows.request_cancel(ref) == flow
    assert subject.snapshot() == before


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in {"cancel", "request_cancel"}])
def test_a_requested_cancel_stops_every_other_verb(flows: Any, subject: Subject, verb: str) -> None:
    """After `request_cancel` only `cancel` goes through, and does."""
    flow = flows.request_cancel(flow_in(flows, source_of(verb)))
    before = subject.snapshot()
    with pytest.raises(CancelPending) as refused:
        VERBS[verb](flows, flow)
    assert refused.value.flow_id == flow.id
    assert subject.snapshot() == before
    assert flows.cancel(flow).status is FlowStatus.CANCELLED


def test_finishing_twice_is_refused(flows: Any) -> None:
    """A flow ends once."""
    flow = flow_in(flows, "finished")
    with pytest.raises(AlreadyTerminal) as refused:
        flows.finish(flow)
    assert (refused.value.flow_id, refused.value.status) == (flow.id, FlowStatus.FINISHED)


@pytest.mark.parametrize("verb", ["start_running", "resume"])
def test_running_again_clears_the_wait(flows: Any, verb: str) -> None:
    """`start_running` leaves waiting as `resume` does."""
    flow = flow_in(flows, "waiting", wait=ExternalEvent("approvals", "42"))
    after = getattr(flows, verb)(flow)
    assert (after.status, after.wait, after.condition) == (FlowStatus.RUNNING, None, None)
    assert flows.get(flow.id) == after


AT = datetime(2031, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)


@pytest.mark.parametrize(
    ("wait", "wire"),
    [
        (Timer(at=AT), {"kind": "timer", "at": "2031-05-06T07:08:09.123456Z"}),
        (ExternalEvent("approvals", "42"), WIRE_EVENT),
        (Manual(), {"kind": "manual"}),
        (Manual(deadline=AT), {"kind": "manual", "deadline": "2031-05-06T07:08:09.123456Z"}),
    ],
)
def test_a_wait_is_stored_in_its_wire_form(flows: Any, wait: Any, wire: dict[str, Any]) -> None:
    """A wait and its wire form are one: given as either, stored as the mapping, parsed back to the value."""
    for given in (wait, wire):
        flow = flow_in(flows, "waiting", wait=given)
        assert (flow.wait, flow.condition) == (wire, wait)
        assert flows.get(flow.id) == flow


def test_a_wait_of_another_kind_is_the_callers_own(flows: Any) -> None:
    """A mapping of an unknown kind is stored as it is, and has no condition."""
    wait = {"kind": "moon phase", "phase": ["full", 3], "topic": 7}
    flow = flow_in(flows, "waiting", wait=wait)
    assert (flow.wait, flow.condition) == (wait, None)
    assert trail(flows, flow)[-1] == ("waiting", 2, {"wait": wait})


def test_identity_and_creation_time_never_change(flows: Any) -> None:
    """Whatever happens to a flow, who began it and when stay."""
    first = create(flows)
    flow = first
    for verb in ("start_running", "update_state", "set_waiting", "resume", "request_cancel", "cancel"):
        flow = VERBS[verb](flows, flow)
        kept = ("id", "controller_id", "goal", "owner_session_key", "requester_origin", "created_at")
        assert [getattr(flow, name) for name in kept] == [getattr(first, name) for name in kept]


def test_times_only_grow(flows: Any) -> None:
    """`updated_at` moves with every change."""
    flow = create(flows)
    for verb in ("start_running", "update_state", "set_waiting", "resume", "finish"):
        after = VERBS[verb](flows, flow)
        assert after.updated_at > flow.updated_at
        flow = after


def test_an_unknown_flow_is_none(flows: Any) -> None:
    """Reading what is not there answers None, or nothing."""
    unknown = uuid4()
    assert flows.get(unknown) is None
    assert flows.get(str(unknown)) is None
    assert flows.list_events(unknown) == []
    assert list(flows.iter_events(unknown)) == []
    assert flows.list_steps(unknown) == []
    assert flows.find_step_by_run_id(unknown, "run") is None


def test_many_flows_are_read_in_the_order_asked(flows: Any) -> None:
    """`get_many` answers one for one, None for what is not there, and nothing for nothing."""
    first, second = create(flows), create(flows)
    assert flows.get_many([second.id, uuid4(), first, str(second.id)]) == [second, None, first, second]
    assert flows.get_many([]) == []
