"""`update_and_append` and `mutate`: any change of the mutable fields, as one compare and write."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import attrs
import pytest

from redisflow import ExternalEvent, Flow, FlowStatus, InvalidData, RevisionMismatch
from tests.support.subjects import STATE, create, flow_in, trail

if TYPE_CHECKING:
    from tests.support.subjects import Subject

WIRE_EVENT = {"kind": "external_event", "topic": "approvals", "correlation_id": "42"}


def test_the_primitive_writes_the_mutable_fields(flows: Any) -> None:
    """Step, state and status of the altered Flow are stored, with the event in the same script."""
    flow = flow_in(flows, "running")
    wanted = attrs.evolve(flow, current_step="sort", state={"messages": 9, "sorted": [1]}, status=FlowStatus.FINISHED)
    after, event = flows.update_and_append(wanted, "sorted", {"by": "date"})
    assert (after.current_step, after.state, after.status) == ("sort", {"messages": 9, "sorted": [1]}, "finished")
    assert after.revision == flow.revision + 1
    assert flows.get(flow.id) == after
    assert (event.kind, event.payload, event.revision, event.op_id) == ("sorted", {"by": "date"}, 2, after.etag)
    assert flows.list_events(flow, 1) == [event]


def test_the_primitive_without_a_change_still_counts(flows: Any) -> None:
    """The same status, the same fields: a revision and an event; no payload is an empty mapping."""
    flow = flow_in(flows, "running")
    after, event = flows.update_and_append(flow, "looked at")
    assert (after.revision, event.payload) == (2, {})
    assert attrs.evolve(after, revision=1, etag=flow.etag, updated_at=flow.updated_at) == flow


@pytest.mark.parametrize("status", ["created", "running", "waiting"])
def test_the_primitive_keeps_any_live_status(flows: Any, status: str) -> None:
    """A change in place is no transition."""
    flow = flow_in(flows, status, wait=ExternalEvent("approvals", "42"))
    after, _ = flows.update_and_append(attrs.evolve(flow, state={"n": 1}), "counted")
    assert (after.status, after.wait, after.state) == (flow.status, flow.wait, {"n": 1})
    assert flows.get(flow.id) == after


@pytest.mark.parametrize("before", [STATE, {}, [1], 7])
def test_the_primitive_stores_the_state_it_is_given(flows: Any, before: Any) -> None:
    """Not merged: keys that are gone are gone, mapping or not."""
    for state in ({}, {"messages": 10}, {"new": 1}, [1, 2], None, "text", 5):
        flow = create(flows, state=before)
        after, _ = flows.update_and_append(attrs.evolve(flow, state=state), "rewritten")
        assert after.state == flows.get(flow.id).state == state


def test_writing_into_the_copy_is_an_alteration_too(flows: Any) -> None:
    """The primitive stores what the Flow says: its state may have been written into."""
    flow = flow_in(flows, "running", state={"list": [1]})
    flow.state["list"].append(2)
    after, _ = flows.update_and_append(flow, "appended")
    assert after.state == flows.get(flow.id).state == {"list": [1, 2]}


def test_a_stale_copy_is_refused(flows: Any, subject: Subject) -> None:
    """Another writer won: RevisionMismatch with both revisions, nothing changed."""
    flow = flow_in(flows, "running")
    flows.update_state(flow, {"x": 1})
    before = subject.snapshot()
    with pytest.raises(RevisionMismatch) as stale:
        flows.update_and_append(attrs.evolve(flow, state={"mine": 1}), "lost")
    assert (stale.value.expected, stale.value.actual) == (1, 2)
    assert subject.snapshot() == before


def test_a_forged_revision_does_not_pass(flows: Any, subject: Subject) -> None:
    """The compare is with the etag as well: an old copy given the new number is still old."""
    flow = flow_in(flows, "running")
    flows.update_state(flow, {"x": 1})
    before = subject.snapshot()
    with pytest.raises(RevisionMismatch):
        flows.update_and_append(attrs.evolve(flow, revision=2, state={"mine": 1}), "forged")
    assert subject.snapshot() == before


@pytest.mark.parametrize(
    "identity",
    [
        {"controller_id": "other"},
        {"goal": "other"},
        {"owner_session_key": "other"},
        {"requester_origin": "other"},
        {"id": UUID(int=7)},
        {"created_at": datetime(2020, 1, 1, tzinfo=UTC)},
    ],
    ids=str,
)
def test_identity_cannot_be_rewritten(flows: Any, subject: Subject, identity: dict[str, Any]) -> None:
    """Refused, naming the field; nothing changed."""
    flow = flow_in(flows, "running")
    before = subject.snapshot()
    with pytest.raises(InvalidData, match=next(iter(identity))):
        flows.update_and_append(attrs.evolve(flow, **identity), "rewritten")
    assert subject.snapshot() == before


def test_the_primitive_takes_the_servers_time(flows: Any) -> None:
    """`updated_at` is not the caller's to choose."""
    flow = flow_in(flows, "running")
    after, _ = flows.update_and_append(attrs.evolve(flow, updated_at=datetime(2020, 1, 1, tzinfo=UTC)), "backdated")
    assert after.updated_at > flow.updated_at
    assert flows.get(flow.id) == after


def test_the_primitive_enters_waiting_with_its_index(flows: Any, subject: Subject) -> None:
    """A wait given by `evolve` is checked and indexed as `set_waiting` would."""
    running = flow_in(flows, "running")
    wanted = attrs.evolve(running, status=FlowStatus.WAITING, wait=WIRE_EVENT)
    flow, _ = flows.update_and_append(wanted, "parked")
    assert flow.condition == ExternalEvent("approvals", "42")
    assert flows.get(flow.id) == flow
    assert list(subject.members("waiters")) == [b"approvals\x0042\x00" + str(flow.id).encode()]
    other = {"kind": "timer", "at": (datetime.now(UTC) + timedelta(hours=1)).isoformat()}
    flow, _ = flows.update_and_append(attrs.evolve(flow, wait=other), "parked elsewhere")
    assert flows.get(flow.id).wait == other
    assert subject.members("waiters") == {}
    assert list(subject.members("due")) == [str(flow.id).encode()]
    flow, _ = flows.update_and_append(attrs.evolve(flow, status=FlowStatus.RUNNING), "unparked")
    assert (flow.wait, flows.get(flow.id).wait) == (None, None)
    assert subject.members("due") == {}


def test_waiting_needs_a_wait(flows: Any, subject: Subject) -> None:
    """A waiting flow without one, or with a malformed one: InvalidData, nothing changed."""
    flow = flow_in(flows, "running")
    before = subject.snapshot()
    for wait in (None, {"kind": "timer"}, {"topic": "x"}):
        with pytest.raises(InvalidData, match="wait"):
            flows.update_and_append(attrs.evolve(flow, status=FlowStatus.WAITING, wait=wait), "parked")
    assert subject.snapshot() == before


def test_the_cancel_flag_is_sticky(flows: Any, subject: Subject) -> None:
    """It may be set by `evolve`, wakes an engine for a waiting flow, and cannot be taken back."""
    flow, _ = flows.update_and_append(attrs.evolve(flow_in(flows, "waiting"), cancel_requested=True), "flagged")
    assert flow.cancel_requested
    assert flows.get(flow.id) == flow
    assert list(subject.members("due")) == [str(flow.id).encode()]
    wanted = attrs.evolve(flow, cancel_requested=False, status=FlowStatus.CANCELLED)
    flow, _ = flows.update_and_append(wanted, "ended")
    assert flow.cancel_requested
    assert flows.get(flow.id) == flow


# --- mutate --------------------------------------------------------------------------------------------


def step(flow: Flow) -> Flow:
    """Count one up."""
    return attrs.evolve(flow, state=flow.state | {"processed": flow.state["processed"] + 1})


def test_mutate_reads_changes_and_writes(flows: Any) -> None:
    """The flow as read goes through `fn`; one revision, one event."""
    flow = after = flow_in(flows, "running")
    for ref in (flow, flow.id, str(flow.id)):
        after = flows.mutate(ref, step, kind="counted", payload={"by": 1})
        assert flows.get(flow.id) == after
    assert after.state["processed"] == 3
    assert trail(flows, flow)[2:] == [("counted", revision, {"by": 1}) for revision in (2, 3, 4)]


def test_mutate_reads_again_when_another_writer_won(flows: Any, subject: Subject) -> None:
    """`fn` sees the other writer's change and is called once per try."""
    rival, flow = subject.rival(), flow_in(flows, "running")
    seen: list[int] = []

    def contended(read: Flow) -> Flow:
        seen.append(read.state["processed"])
        if len(seen) <= 3:
            rival.update_state(read.id, increment={"processed": 10})
        return step(read)

    assert flows.mutate(flow.id, contended, kind="counted").state["processed"] == 31
    assert seen == [0, 10, 20, 30]


@pytest.mark.parametrize("retries", [0, 2])
def test_mutate_gives_up_after_its_retries(flows: Any, subject: Subject, retries: int) -> None:
    """The last RevisionMismatch is raised, and nothing of this caller's is stored."""
    rival, flow = subject.rival(), flow_in(flows, "running")
    calls: list[int] = []

    def always_late(read: Flow) -> Flow:
        calls.append(read.revision)
        rival.update_state(read.id, {"rival": True})
        return step(read)

    with pytest.raises(RevisionMismatch) as stale:
        flows.mutate(flow.id, always_late, kind="counted", retries=retries)
    assert len(calls) == retries + 1
    assert (stale.value.expected, stale.value.actual) == (calls[-1], calls[-1] + 1)
    assert flows.get(flow.id).state == STATE | {"rival": True}


def test_mutate_with_an_expected_revision_never_tries_again(flows: Any) -> None:
    """Only that version is changed."""
    flow = flow_in(flows, "running")
    with pytest.raises(RevisionMismatch) as stale:
        flows.mutate(flow.id, step, kind="counted", expected_revision=0)
    assert (stale.value.expected, stale.value.actual) == (0, 1)
    assert flows.mutate(flow.id, step, kind="counted", expected_revision=1).revision == 2


def test_what_fn_raises_is_raised_and_changes_nothing(flows: Any, subject: Subject) -> None:
    """The caller's own error comes through as it is."""
    flow = flow_in(flows, "running")
    before = subject.snapshot()

    def broken(_: Flow) -> Flow:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        flows.mutate(flow.id, broken, kind="counted")
    for wrong in (lambda _: None, lambda read: attrs.evolve(read, id=uuid4()), lambda read: read.state):
        with pytest.raises(InvalidData, match=str(flow.id)):
            flows.mutate(flow.id, wrong, kind="counted")
    assert subject.snapshot() == before


def test_contending_mutations_are_all_applied(flows: Any) -> None:
    """Each caller re-reads until it wins: no count is lost."""
    flow = flow_in(flows, "running")

    def work() -> None:
        for _ in range(5):
            flows.mutate(flow.id, step, kind="counted", retries=1000)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert flows.get(flow.id).state["processed"] == 20
    assert [event.revision for event in flows.iter_events(flow)] == list(range(22))
