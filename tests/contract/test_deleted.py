"""A deleted flow leaves a tombstone for an hour, by which calls that come again or too late are recognized."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from redisflow import FlowExists, FlowNotFound, FlowStatus, NewFlow, OutcomeUnknown, Severity
from tests.support.subjects import (
    STATE,
    VERBS,
    WHO,
    brought_id,
    create,
    drawn_id,
    flow_in,
    observed,
    source_of,
    trail,
    works,
)

if TYPE_CHECKING:
    from uuid import UUID

    from redisflow import Diagnosis, Finding
    from tests.support.subjects import Subject

OWNER = WHO["owner_session_key"]
EITHER_ID = pytest.mark.parametrize("new_id", [brought_id, drawn_id])


@EITHER_ID
@pytest.mark.parametrize("form", ["copy", "id", "text"])
def test_a_deletion_called_twice_deletes_once(
    flows: Any, subject: Subject, form: str, new_id: Callable[[], str]
) -> None:
    """Both calls report that they deleted the flow. A deletion under another id finds no flow."""
    flow = flow_in(flows, "waiting")
    ref = {"copy": flow, "id": flow.id, "text": str(flow.id)}[form]
    op_id = new_id()
    for manager in (flows, flows, subject.manager(), flows.for_owner(OWNER)):
        assert manager.delete(ref, op_id=op_id) is True
        assert subject.only_tombstones_of(flow.id)
    for another in (None, brought_id(), drawn_id()):
        assert flows.delete(ref, op_id=another) is False
    assert flows.delete(ref, op_id=op_id) is True
    assert subject.only_tombstones_of(flow.id)


def test_a_repeated_deletion_spares_the_flow_that_was_created_anew(flows: Any, subject: Subject) -> None:
    """It deleted the first flow of this id; the second is not this operation's to delete."""
    flow, op_id = create(flows), brought_id()
    assert flows.delete(flow, op_id=op_id)
    anew = create(flows, flow_id=flow.id)
    before = subject.snapshot()
    for ref in (flow, flow.id, anew):
        assert flows.delete(ref, op_id=op_id) is True
    assert subject.snapshot() == before
    assert flows.get(flow.id) == anew


@EITHER_ID
@pytest.mark.parametrize("chosen", [True, False], ids=["id-chosen", "id-not-chosen"])
@pytest.mark.parametrize("event_maxlen", [None, 100])
@pytest.mark.parametrize("method", ["create_managed", "create_mirrored"])
def test_a_creation_called_again_after_the_deletion_creates_nothing(
    subject: Subject, *, method: str, event_maxlen: int | None, chosen: bool, new_id: Callable[[], str]
) -> None:
    """`FlowNotFound`: the flow that this operation created does not exist any more."""
    flows = subject.manager(event_maxlen=event_maxlen)
    options: dict[str, Any] = {**WHO, "state": STATE, "op_id": new_id(), "flow_id": uuid4() if chosen else None}
    make = getattr(flows, method)
    flow = make(**options)
    flows.update_state(flow, {"x": 1})
    if event_maxlen is not None:
        subject.trim(flow.id, 1)  # the hash tells of its creation all the same
    assert flows.delete(flow)
    for again in ({}, {"exist_ok": True}):
        with pytest.raises(FlowNotFound) as gone:
            make(**options, **again)
        assert gone.value.flow_id == flow.id
    assert flows.get(flow.id) is None
    assert subject.only_tombstones_of(flow.id)


def test_a_trimmed_trail_names_no_creator(flows: Any, subject: Subject) -> None:
    """Trimmed by somebody else, it does not tell whether a creation that is called again is that of the deleted flow.

    `OutcomeUnknown`, and nothing is created; a creation of its own creates the flow anew.
    """
    flow = flow_in(flows, "running")
    creation, started = (event.op_id for event in flows.iter_events(flow))
    subject.trim(flow.id, 1)
    assert flows.delete(flow)
    for op_id in (creation, started, brought_id(), drawn_id()):
        with pytest.raises(OutcomeUnknown) as unknown:
            flows.create_managed(**WHO, flow_id=flow.id, op_id=op_id)
        assert unknown.value.op_id == op_id
        assert subject.only_tombstones_of(flow.id)
    anew = flows.create_managed(**WHO, flow_id=flow.id)
    assert flows.get(flow.id) == anew
    assert flows.start_running(anew).revision == 1


# --- as if it were not there ---------------------------------------------------------------------------


READS: dict[str, tuple[Callable[[Any, Any], Any], Any]] = {
    "get": (lambda flows, ref: flows.get(ref), None),
    "get_many": (lambda flows, ref: flows.get_many([ref, ref]), [None, None]),
    "list_events": (lambda flows, ref: flows.list_events(ref), []),
    "iter_events": (lambda flows, ref: list(flows.iter_events(ref)), []),
    "list_steps": (lambda flows, ref: flows.list_steps(ref), []),
    "find_step_by_run_id": (lambda flows, ref: flows.find_step_by_run_id(ref, "cron-42"), None),
}


def test_a_tombstone_is_read_as_no_flow(flows: Any, subject: Subject) -> None:
    """By every read and listing, of a view too."""
    flow = flow_in(flows, "running")
    flows.record_step_observation(observed(flow.id))
    assert flows.delete(flow)
    for manager in (flows, flows.for_owner(OWNER)):
        for ref in (flow, flow.id):
            assert {name: read(manager, ref) for name, (read, _) in READS.items()} == {
                name: nothing for name, (_, nothing) in READS.items()
            }
            with pytest.raises(FlowNotFound):
                manager.wait_for(ref, timeout=0)
            with pytest.raises(FlowNotFound):
                list(manager.watch(ref, after="0-0", timeout=0))
        assert manager.list_by_owner(OWNER) == list(manager.iter_by_owner(OWNER)) == []
        for status in FlowStatus:
            assert manager.list_by_status(status) == list(manager.iter_by_status(status)) == []
        assert manager.count_by_status() == dict.fromkeys(FlowStatus, 0)
    assert subject.only_tombstones_of(flow.id)


def about(diagnosis: Diagnosis, flow_id: UUID) -> list[Finding]:
    """Return the findings that are about a flow or a key of it."""
    return [finding for finding in diagnosis.findings if finding.flow_id == flow_id or str(flow_id) in str(finding.key)]


@pytest.mark.parametrize("repair", [False, True])
def test_the_doctor_finds_nothing_wrong_with_a_tombstone(flows: Any, subject: Subject, *, repair: bool) -> None:
    """It reports nothing of it, and leaves it where it is."""
    flow = flow_in(flows, "waiting")
    flows.delete(flow, op_id=brought_id())
    diagnosis = flows.doctor(repair=repair)
    assert diagnosis.severity in {Severity.OK, Severity.INFO}
    assert about(diagnosis, flow.id) == []
    assert set(diagnosis.flows.values()) <= {0}
    assert subject.only_tombstones_of(flow.id)


def test_the_doctor_removes_what_is_left_beside_a_tombstone(flows: Any, subject: Subject) -> None:
    """Records and index entries of a flow that does not exist are repaired as ever; the tombstone stays."""
    flow = flow_in(flows, "running")
    assert flows.delete(flow)
    partition, member = subject.keyspace.partition_of(flow.id), str(flow.id).encode()
    subject.lengthen(flow.id, 1)
    subject.raw.zadd(partition.seen(member), {"ab" * 16: 1})
    subject.raw.hset(partition.steps(member), "run", b"\xc0")
    for index in (partition.status(FlowStatus.RUNNING), partition.owner(OWNER.encode()), partition.due):
        subject.raw.zadd(index, {member: 1})
    flows.doctor(repair=True)
    assert subject.only_tombstones_of(flow.id)


CHANGES: dict[str, Callable[..., Any]] = VERBS | {
    "append_event": lambda flows, ref, **o: flows.append_event(ref, "note", **o),
    "record_step_observation": lambda flows, ref, **o: flows.record_step_observation(observed(ref), **o),
    "mutate": lambda flows, ref, **o: flows.mutate(ref, lambda f: f, kind="noted", **o),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_deleted_flow_is_changed_by_nothing(flows: Any, subject: Subject, name: str) -> None:
    """`FlowNotFound`, by copy and by id, under any operation id; a tombstone is all there is."""
    flow = flow_in(flows, source_of(name))
    assert flows.delete(flow)
    for ref in (flow, flow.id):
        for options in ({}, {"op_id": brought_id()}, {"op_id": drawn_id()}, {"expected_revision": flow.revision}):
            with pytest.raises(FlowNotFound) as refused:
                CHANGES[name](flows, ref, **options)
            assert refused.value.flow_id == flow.id
    assert subject.only_tombstones_of(flow.id)


@pytest.mark.parametrize("name", CHANGES)
def test_a_flow_that_never_was_is_changed_by_nothing(flows: Any, subject: Subject, name: str) -> None:
    """Under an id of the library's, too: its settlement leaves a tombstone at most."""
    unknown = uuid4()
    for _ in range(2):
        with pytest.raises(FlowNotFound):
            CHANGES[name](flows, unknown, op_id=drawn_id())
    assert subject.snapshot() == {}
    assert set(subject.all_keys()) <= {subject.flow_key(unknown)}
    assert all(0 < subject.raw.pttl(key) <= 3_600_000 for key in subject.all_keys())
    assert not flows.delete(unknown)
    works(flows)
    assert flows.create_managed(**WHO, flow_id=unknown) == flows.get(unknown)
    assert subject.raw.pttl(subject.flow_key(unknown)) == -1


# --- created anew --------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", ["its own copy", "a copy of the first", "the id", "the id, elsewhere"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_flow_created_anew_is_changed_as_any_other(flows: Any, subject: Subject, name: str, held: str) -> None:
    """By copy and by id, a copy of the deleted flow stands for the id; its trail is its own."""
    first = flow_in(flows, source_of(name))
    assert flows.delete(first)
    anew = flow_in(flows, source_of(name), flow_id=first.id, state={"messages": 1, "processed": 1, "anew": True})
    assert subject.fence_of(first.id) != b""
    assert subject.raw.pttl(subject.flow_key(first.id)) == -1
    known = trail(flows, anew)
    manager = subject.manager() if held == "the id, elsewhere" else flows
    ref = {"its own copy": anew, "a copy of the first": first}.get(held, first.id)
    if name == "mutate":
        ref = first.id
    changed = CHANGES[name](manager, ref)
    after = flows.get(first.id)
    assert after.state["anew"] is True
    assert after.created_at == anew.created_at > first.created_at
    assert len(trail(flows, anew)) == len(known) + 1
    if name in VERBS or name == "mutate":
        assert changed == after
        assert after.revision == anew.revision + 1
    assert subject.fence_of(first.id) != b""


@EITHER_ID
def test_a_flow_may_be_deleted_and_created_many_times(flows: Any, subject: Subject, new_id: Callable[[], str]) -> None:
    """Each life has another fence, and is listed, ended and deleted as any flow's."""
    flow_id, fences = uuid4(), []
    for life in range(4):
        flow = flows.create_managed(**WHO, state={"life": life}, flow_id=flow_id, op_id=new_id())
        assert (flow.id, flow.state, flow.revision) == (flow_id, {"life": life}, 0)
        fences.append(subject.fence_of(flow_id))
        assert flows.list_by_owner(OWNER) == [flow] == flows.list_by_status("created")
        with pytest.raises(FlowExists):
            flows.create_managed(**WHO, flow_id=flow_id)
        assert flows.create_managed(**WHO, flow_id=flow_id, exist_ok=True) == flow
        flow = flows.finish(flows.update_state(flows.start_running(flow_id), {"x": 1}))
        flows.record_step_observation(observed(flow_id))
        assert [event.revision for event in flows.iter_events(flow_id)] == [0, 1, 2, 3, 3]
        assert about(flows.doctor(), flow_id) == []
        assert flows.delete(flow)
        assert subject.only_tombstones_of(flow_id)
    assert len(set(fences)) == 4


def test_a_creation_is_told_from_that_of_the_deleted_flow(flows: Any) -> None:
    """Called again it answers with the flow; the first flow's creation is refused, as somebody else has the id."""
    flow_id, first, second = uuid4(), brought_id(), brought_id()
    flows.create_managed(**WHO, flow_id=flow_id, op_id=first)
    assert flows.delete(flow_id)
    anew = flows.create_managed(**WHO, flow_id=flow_id, op_id=second)
    assert flows.create_managed(**WHO, flow_id=flow_id, op_id=second) == anew
    with pytest.raises(FlowExists):
        flows.create_managed(**WHO, flow_id=flow_id, op_id=first)
    assert flows.get(flow_id) == anew


def test_many_flows_are_created_anew_at_once(flows: Any, subject: Subject) -> None:
    """`create_many` over tombstones."""
    ids = [uuid4() for _ in range(5)]
    inputs = [NewFlow(**WHO, flow_id=flow_id) for flow_id in ids]
    flows.create_many(inputs)
    assert all(flows.delete(flow_id) for flow_id in ids)
    made = flows.create_many(inputs)
    assert [flow.id for flow in made] == ids
    assert flows.get_many(ids) == made
    for flow in made:
        assert flows.cancel(flow) == flows.get(flow.id)


def test_another_owner_may_create_over_a_tombstone(flows: Any, subject: Subject) -> None:
    """An id that is free is free for everybody; the first owner's view sees nothing of it."""
    flow = create(flows)
    flows.delete(flow)
    eve = flows.for_owner("agent:eve")
    who = {name: text for name, text in WHO.items() if name != "owner_session_key"}
    theirs = eve.create_managed(**who, flow_id=flow.id)
    assert eve.get(flow.id) == theirs == flows.get(flow.id)
    assert eve.start_running(flow.id) == eve.get(flow.id)
    assert flows.for_owner(OWNER).get(flow.id) is None
    assert flows.list_by_owner(OWNER) == []
