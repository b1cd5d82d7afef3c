"""Guards come in one order, each leaving everything untouched.

FlowNotFound → replay → RevisionMismatch → AlreadyTerminal → CancelPending → IllegalTransition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

import attrs
import pytest

from redisflow import (
    AlreadyTerminal,
    CancelPending,
    Flow,
    FlowError,
    FlowNotFound,
    FlowStatus,
    IllegalTransition,
    RevisionMismatch,
)
from tests.support.subjects import VERBS, brought_id, create, drawn_id, flow_in, observed, source_of, trail

if TYPE_CHECKING:
    from tests.support.subjects import Subject

TARGETS = {
    "start_running": "running",
    "set_waiting": "waiting",
    "resume": "running",
    "finish": "finished",
    "fail": "failed",
    "cancel": "cancelled",
}


def refused(subject: Subject, kind: type[FlowError], call: Any, *, brought: bool = False) -> Any:
    """Make a call that must be refused with just this error, and leave no trace.

    Where the caller brought the operation's id, the flow is settled first, and has another fence.
    """
    read = subject.unfenced if brought else subject.snapshot
    before = read()
    with pytest.raises(FlowError) as failure:
        call()
    assert type(failure.value) is kind
    assert read() == before
    return failure.value


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_flow_comes_before_all_else(flows: Any, subject: Subject, verb: str) -> None:
    """No flow: FlowNotFound, whatever else the call asks for."""
    unknown = uuid4()
    for options in ({}, {"expected_revision": 3}):
        error = refused(subject, FlowNotFound, lambda o=options: VERBS[verb](flows, unknown, **o))
        assert error.flow_id == unknown
    assert subject.all_keys() == []
    for op_id in (brought_id(), drawn_id()):
        error = refused(subject, FlowNotFound, lambda o=op_id: VERBS[verb](flows, unknown, op_id=o), brought=True)
        assert error.flow_id == unknown
    assert set(subject.all_keys()) <= {subject.flow_key(unknown)}, "a tombstone at most, by which late attempts fail"
    assert all(0 < subject.raw.pttl(key) <= 3_600_000 for key in subject.all_keys())


def test_every_other_change_of_an_unknown_flow_is_refused(flows: Any, subject: Subject) -> None:
    """Audit entries, steps, the primitive and mutate need a flow too; a deletion finds none."""
    flow = create(flows)
    assert flows.delete(flow)
    assert not flows.delete(flow)
    refused(subject, FlowNotFound, lambda: flows.append_event(flow, "note"))
    refused(subject, FlowNotFound, lambda: flows.record_step_observation(observed(flow.id)))
    refused(subject, FlowNotFound, lambda: flows.update_and_append(flow, "note"))
    refused(subject, FlowNotFound, lambda: flows.mutate(flow.id, lambda f: f, kind="note"))
    refused(subject, FlowNotFound, lambda: flows.wait_for(flow.id, timeout=0))
    assert subject.only_tombstones_of(flow.id)


@pytest.mark.parametrize("verb", VERBS)
def test_a_replay_comes_before_every_later_guard(flows: Any, verb: str) -> None:
    """What was applied under an op id stays applied, though the flow has ended, is flagged and has moved on."""
    op_id = brought_id()
    before = flow_in(flows, source_of(verb))
    VERBS[verb](flows, before, op_id=op_id, expected_revision=before.revision)
    if not flows.get(before.id).status.is_terminal:
        flows.request_cancel(before.id)
        flows.cancel(before.id)
    known = trail(flows, before)
    for ref in (before, before.id):
        again = VERBS[verb](flows, ref, op_id=op_id, expected_revision=before.revision)
        assert again == flows.get(before.id)
    assert trail(flows, before) == known


@pytest.mark.parametrize("status", ["finished", "failed", "cancelled"])
def test_a_wrong_revision_comes_before_the_end_of_a_flow(flows: Any, subject: Subject, status: str) -> None:
    """A stale expectation of an ended flow: RevisionMismatch, with both numbers."""
    flow = flow_in(flows, status)
    for verb in VERBS.values():
        error = refused(subject, RevisionMismatch, lambda verb=verb: verb(flows, flow.id, expected_revision=77))
        assert (error.flow_id, error.expected, error.actual) == (flow.id, 77, flow.revision)


@pytest.mark.parametrize("verb", VERBS)
def test_a_wrong_revision_comes_before_a_pending_cancel_and_a_wrong_status(
    flows: Any, subject: Subject, verb: str
) -> None:
    """Flagged, and not where the verb could start: the stale expectation is what is said."""
    flow = flows.request_cancel(create(flows))
    refused(subject, RevisionMismatch, lambda: VERBS[verb](flows, flow.id, expected_revision=0))


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "request_cancel"])
def test_the_end_comes_before_a_pending_cancel_and_a_wrong_status(flows: Any, subject: Subject, verb: str) -> None:
    """Ended with the flag set, and no step leads anywhere: AlreadyTerminal."""
    flow = flows.cancel(flows.request_cancel(flow_in(flows, "running")))
    error = refused(subject, AlreadyTerminal, lambda: VERBS[verb](flows, flow.id, expected_revision=flow.revision))
    assert (error.flow_id, error.status) == (flow.id, FlowStatus.CANCELLED)


@pytest.mark.parametrize("verb", ["set_waiting", "finish", "fail"])
def test_a_pending_cancel_comes_before_a_wrong_status(flows: Any, subject: Subject, verb: str) -> None:
    """Flagged, and created: CancelPending, though the step is illegal as well."""
    flow = flows.request_cancel(create(flows))
    refused(subject, CancelPending, lambda: VERBS[verb](flows, flow, expected_revision=flow.revision))


ILLEGAL = [
    ("created", "set_waiting"),
    ("created", "finish"),
    ("created", "fail"),
    ("running", "start_running"),
    ("running", "resume"),
    ("waiting", "set_waiting"),
    ("waiting", "finish"),
]


@pytest.mark.parametrize(("status", "verb"), ILLEGAL)
def test_a_step_the_lifecycle_lacks_is_refused(flows: Any, subject: Subject, status: str, verb: str) -> None:
    """IllegalTransition says from where to where."""
    flow = flow_in(flows, status)
    for ref in (flow, flow.id, str(flow.id)):
        error = refused(subject, IllegalTransition, lambda r=ref: VERBS[verb](flows, r))
        assert (error.flow_id, error.source, error.target) == (flow.id, status, TARGETS[verb])


@pytest.mark.parametrize("verb", VERBS)
def test_the_right_revision_goes_through(flows: Any, verb: str) -> None:
    """An expectation that holds changes nothing of what the verb does, by Flow and by id."""
    for by_id in (False, True):
        flow = flow_in(flows, source_of(verb))
        after = VERBS[verb](flows, flow.id if by_id else flow, expected_revision=flow.revision)
        assert after.revision == flow.revision + 1


def test_a_compare_with_a_flow_is_with_its_etag_too(flows: Any, subject: Subject) -> None:
    """Revision numbers are used again after a lost write: another writer's under the same number is another flow."""
    mine = flow_in(flows, "running")
    subject.raw.hset(subject.flow_key(mine.id), "etag", brought_id())
    error = refused(subject, RevisionMismatch, lambda: flows.finish(mine, expected_revision=mine.revision))
    assert (error.expected, error.actual) == (1, 1)
    refused(subject, RevisionMismatch, lambda: flows.update_and_append(mine, "note"))
    assert flows.finish(mine.id, expected_revision=mine.revision).revision == 2


def made_again(subject: Subject, flow: Flow, **fields: Any) -> None:
    """Let a flow be what it would be, had a failover lost its last change and a resend made that again."""
    again_at = int(flow.updated_at.timestamp() * 1_000_000) + 5_000_000
    for name, value in {"updated_at": again_at, **fields}.items():
        subject.raw.hset(subject.flow_key(flow.id), name, value)


def test_a_compare_with_a_flow_is_with_its_time_too(flows: Any, subject: Subject) -> None:
    """The same change under the same number is another version, if it was made again upon other changes."""
    mine = flow_in(flows, "running")
    made_again(subject, mine, **{"s:other": 1})
    for attempt in (
        lambda: flows.finish(mine, expected_revision=mine.revision),
        lambda: flows.update_and_append(mine, "note"),
        lambda: flows.append_event(mine, "note", expected_revision=mine.revision),
        lambda: flows.delete(mine, expected_revision=mine.revision),
    ):
        refused(subject, RevisionMismatch, attempt)
    assert flows.finish(mine.id, expected_revision=mine.revision).state["other"] == 1


@pytest.mark.parametrize("verb", VERBS)
def test_a_copy_of_what_a_failover_lost_is_not_current(flows: Any, subject: Subject, verb: str) -> None:
    """Though its last change was made again and the etag is the same: what comes back is what is stored."""
    held = flow_in(flows, source_of(verb))
    made_again(subject, held, revision=7, **{"s:other": 1})
    after = VERBS[verb](flows, held)
    assert after.revision == 8
    assert after.state["other"] == 1
    assert after == flows.get(held)
    assert list(flows.iter_events(held))[-1].revision == 8


# --- the same order for the primitive ------------------------------------------------------------------


def test_the_primitives_guards_are_in_the_same_order(flows: Any, subject: Subject) -> None:
    """Stale before terminal before flagged before illegal, for `update_and_append` as for the verbs."""

    def attempt(flow: Flow, status: str) -> Any:
        return lambda: flows.update_and_append(attrs.evolve(flow, status=FlowStatus(status)), "moved")

    stale = create(flows)
    ended = flows.cancel(flows.request_cancel(stale))
    refused(subject, RevisionMismatch, attempt(stale, "finished"))
    error = refused(subject, AlreadyTerminal, attempt(ended, "running"))
    assert error.status is FlowStatus.CANCELLED
    flagged = flows.request_cancel(create(flows))
    refused(subject, CancelPending, attempt(flagged, "finished"))
    error = refused(subject, IllegalTransition, attempt(create(flows), "finished"))
    assert (error.source, error.target) == ("created", "finished")


def test_the_primitive_can_cancel_a_flagged_flow(flows: Any) -> None:
    """A pending cancel lets a cancel through, in whatever way it comes."""
    flagged = flows.request_cancel(flow_in(flows, "running"))
    flow, event = flows.update_and_append(attrs.evolve(flagged, status=FlowStatus.CANCELLED), "given up")
    assert (flow.status, flow.cancel_requested, event.kind) == (FlowStatus.CANCELLED, True, "given up")


def test_audit_entries_and_steps_compare_revisions_too(flows: Any, subject: Subject) -> None:
    """`expected_revision` guards what leaves the revision alone as well, on ended flows too."""
    flow = flow_in(flows, "finished")
    refused(subject, RevisionMismatch, lambda: flows.append_event(flow.id, "note", expected_revision=1))
    refused(subject, RevisionMismatch, lambda: flows.record_step_observation(observed(flow.id), expected_revision=1))
    refused(subject, RevisionMismatch, lambda: flows.delete(flow.id, expected_revision=1))
    assert flows.append_event(flow.id, "note", expected_revision=2).revision == 2
    assert flows.record_step_observation(observed(flow.id), expected_revision=2).status == "running"
    assert flows.delete(flow.id, expected_revision=2)
