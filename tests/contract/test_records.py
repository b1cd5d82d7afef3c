"""Creation by a chosen id, the audit trail, and observed steps."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest

from redisflow import FlowExists, FlowNotFound, FlowStepStatus, StepRuntime
from tests.support.subjects import STATE, WHO, create, flow_in, observed, trail

if TYPE_CHECKING:
    from tests.support.subjects import Subject

# --- creation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["create_managed", "create_mirrored"])
def test_a_taken_id_is_refused(flows: Any, subject: Subject, verb: str) -> None:
    """FlowExists names the id; nothing changed, whoever owns the flow and whatever became of it."""
    flow_id = uuid4()
    flow = flows.create_managed(**WHO, flow_id=flow_id)
    assert flow.id == flow_id
    flows.cancel(flow)
    before = subject.snapshot()
    for ref in (flow_id, str(flow_id)):
        with pytest.raises(FlowExists) as taken:
            getattr(flows, verb)(**WHO, flow_id=ref)
        assert taken.value.flow_id == flow_id
    assert subject.snapshot() == before


@pytest.mark.parametrize("verb", ["create_managed", "create_mirrored"])
def test_creation_is_idempotent_where_asked_for(flows: Any, subject: Subject, verb: str) -> None:
    """`exist_ok` answers the flow as it stands, its own input ignored; without a flow it creates one."""
    make, flow_id = getattr(flows, verb), uuid4()
    flow = make(**WHO, state=STATE, flow_id=flow_id, exist_ok=True)
    assert make(**WHO, state={"other": 1}, flow_id=str(flow_id), exist_ok=True) == flow
    moved = flows.cancel(flow)
    before = subject.snapshot()
    assert make(**WHO, flow_id=flow_id, exist_ok=True) == moved
    assert subject.snapshot() == before


def test_another_owners_flow_is_not_handed_out(flows: Any, subject: Subject) -> None:
    """`exist_ok` reveals nothing of another owner's flow but that the id is taken."""
    flow = create(flows)
    before = subject.snapshot()
    with pytest.raises(FlowExists):
        flows.create_managed(**WHO | {"owner_session_key": "agent:eve"}, flow_id=flow.id, exist_ok=True)
    assert subject.snapshot() == before


def test_one_of_many_creators_wins(flows: Any) -> None:
    """Racing creations of one id make one flow, and all get it."""
    flow_id, made = uuid4(), []

    def make(n: int) -> None:
        made.append(flows.create_managed(**WHO, state={"n": n}, flow_id=flow_id, exist_ok=True))

    workers = [threading.Thread(target=make, args=(n,)) for n in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert made == [flows.get(flow_id)] * 6
    assert len(trail(flows, flow_id)) == 1


def test_creation_writes_just_its_keys(flows: Any, subject: Subject) -> None:
    """A new flow is a hash, a stream and two index entries."""
    flow = create(flows)
    partition, member = subject.keyspace.partition_of(flow.id), str(flow.id).encode()
    owner = WHO["owner_session_key"].encode()
    expected = [
        partition.flow(member),
        partition.events(member),
        partition.owner(owner),
        partition.status(flow.status),
    ]
    assert subject.all_keys() == sorted(expected)


HOSTILE = ["{x}", "}{", "a\nb", "nul\0nul", "ü" * 512, "x" * 1024, "{" * 1000, " ", "*?[a]"]


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: repr(name[:8]))
def test_hostile_names_are_only_names(flows: Any, subject: Subject, name: str) -> None:
    """Braces, newlines, NUL and kilobytes: stored, listed and deleted like any other."""
    identity = dict.fromkeys(("controller_id", "goal", "owner_session_key", "requester_origin", "current_step"), name)
    flow = flows.create_managed(**identity)
    assert flows.get(flow.id) == flow
    assert {key: getattr(flow, key) for key in identity} == identity
    assert flows.list_by_owner(name) == [flow]
    tag = subject.keyspace.partition_of(flow.id).tag.encode()
    assert all(key.startswith(b"{%s}:" % tag) for key in subject.all_keys())
    assert flows.delete(flow)
    assert subject.only_tombstones_of(flow.id)


# --- the audit trail -----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["created", "waiting", "finished"])
def test_an_audit_entry_stands_alone(flows: Any, status: str) -> None:
    """It is appended in any status, with any payload; the flow does not change."""
    flow = flow_in(flows, status)
    for ref, payload in ((flow, {"n": 1}), (flow.id, [1, b"x"]), (str(flow.id), 2**63 - 1), (flow, None)):
        event = flows.append_event(ref, "note", payload)
        assert (event.kind, event.revision, event.flow_id) == ("note", flow.revision, flow.id)
        assert event.payload == ({} if payload is None else payload)
        assert flows.list_events(flow, 1) == [event]
    assert flows.get(flow.id) == flow


def test_events_are_listed_newest_first(flows: Any) -> None:
    """As many as the limit says; none for one below 1; all for None; 100 unless said."""
    flow = create(flows)
    for n in range(120):
        flows.append_event(flow, "note", n)
    oldest_first = list(flows.iter_events(flow))
    assert [event.payload for event in oldest_first[1:]] == list(range(120))
    newest_first = oldest_first[::-1]
    assert flows.list_events(flow) == newest_first[:100]
    assert flows.list_events(flow.id, 3) == newest_first[:3]
    assert flows.list_events(flow, limit=None) == newest_first
    assert flows.list_events(flow, 10_000) == newest_first
    for none in (0, -1, -(10**20)):
        assert flows.list_events(flow, none) == []


def test_events_are_iterated_from_where_one_left_off(flows: Any) -> None:
    """`after` gives what is behind that id; the last id gives nothing."""
    flow = create(flows)
    for n in range(7):
        flows.append_event(flow, "note", n)
    events = list(flows.iter_events(flow.id))
    assert list(flows.iter_events(flow, after=events[2].id)) == events[3:]
    assert list(flows.iter_events(flow, after=events[-1].id)) == []
    assert list(flows.iter_events(flow, after="0")) == events
    ids = [tuple(map(int, event.id.split("-"))) for event in events]
    assert ids == sorted(set(ids))


def test_a_long_trail_comes_whole(flows: Any, subject: Subject) -> None:
    """More events than a page, none missed, none twice."""
    flow = create(flows)
    key = subject.keyspace.partition_of(flow.id).events(str(flow.id).encode())
    with subject.raw.pipeline(transaction=False) as pipe:
        for n in range(1200):
            pipe.xadd(key, {"rev": 0, "kind": "note", "op": "00", "payload": b"\xcd%c%c" % divmod(n, 256)})
        pipe.execute()
    assert [event.payload for event in flows.iter_events(flow)][1:] == list(range(1200))


# --- steps ---------------------------------------------------------------------------------------------


def test_an_observation_inserts_then_updates(flows: Any) -> None:
    """The same id and creation; task, status and result replaced; the child's key kept when none is given."""
    flow = flows.create_mirrored(**WHO)
    first = flows.record_step_observation(observed(flow.id, child_session_key="cron:session"))
    assert (first.runtime, first.status, first.result) == (StepRuntime.MIRRORED, FlowStepStatus.RUNNING, None)
    assert (first.flow_id, first.run_id, first.task) == (flow.id, "cron-42", "classify")
    assert first.created_at == first.updated_at
    second = flows.record_step_observation(
        observed(flow.id, status=FlowStepStatus.SUCCEEDED, task="sort", result={"classified": 10})
    )
    assert (second.id, second.created_at) == (first.id, first.created_at)
    assert isinstance(second.id, UUID)
    assert second.updated_at > first.updated_at
    assert (second.status, second.task, second.result) == ("succeeded", "sort", {"classified": 10})
    assert second.child_session_key == "cron:session"
    third = flows.record_step_observation(observed(flow.id, status="failed", child_session_key="other"))
    assert (third.child_session_key, third.result) == ("other", None)
    assert flows.list_steps(flow) == [third]
    assert flows.find_step_by_run_id(flow.id, "cron-42") == third


def test_an_observation_leaves_the_flow_as_it_is(flows: Any) -> None:
    """The revision stays; the event says which run, how it stands, who runs it."""
    flow = flow_in(flows, "running")
    flows.record_step_observation(observed(flow, status="pending"), runtime="managed")
    flows.record_step_observation(observed(str(flow.id), status="succeeded"), runtime=StepRuntime.MIRRORED)
    assert flows.get(flow.id) == flow
    assert trail(flows, flow)[2:] == [
        ("step_observed", 1, {"run_id": "cron-42", "status": "pending", "runtime": "managed"}),
        ("step_observed", 1, {"run_id": "cron-42", "status": "succeeded", "runtime": "mirrored"}),
    ]


@pytest.mark.parametrize("status", ["finished", "failed", "cancelled"])
def test_steps_of_an_ended_flow_are_observed(flows: Any, status: str) -> None:
    """Work may outlive its flow."""
    flow = flow_in(flows, status)
    step = flows.record_step_observation(observed(flow.id))
    assert flows.list_steps(flow.id) == [step]
    assert flows.get(flow.id) == flow


def test_steps_of_an_unknown_flow_are_refused(flows: Any, subject: Subject) -> None:
    """FlowNotFound, and nothing stored."""
    unknown = uuid4()
    with pytest.raises(FlowNotFound) as refused:
        flows.record_step_observation(observed(unknown))
    assert refused.value.flow_id == unknown
    assert subject.all_keys() == []


def test_steps_are_listed_oldest_first(flows: Any) -> None:
    """In the order first observed, whatever was updated since; each flow its own."""
    flow, other = create(flows), create(flows)
    for n in (3, 1, 2):
        flows.record_step_observation(observed(flow.id, f"run-{n}", task=f"task-{n}"))
    flows.record_step_observation(observed(other.id, "run-1"))
    flows.record_step_observation(observed(flow.id, "run-3", status="failed"))
    steps = flows.list_steps(flow)
    assert [step.run_id for step in steps] == ["run-3", "run-1", "run-2"]
    assert len({step.id for step in steps}) == 3
    assert flows.find_step_by_run_id(flow, "run-9") is None


@pytest.mark.parametrize("child", ["c", "x" * 31, "x" * 32, "x" * 255, "x" * 256, "ü" * 512, "\0"], ids=len)
def test_a_childs_key_of_any_length_is_kept(flows: Any, child: str) -> None:
    """The script keeps the packed key without reading it: every length class of its header."""
    flow = create(flows)
    flows.record_step_observation(observed(flow.id, child_session_key=child))
    for _ in range(2):
        step = flows.record_step_observation(observed(flow.id, result=[None, 2**63 - 1, {"a": b"b"}]))
        assert step.child_session_key == child
        assert step.result == [None, 2**63 - 1, {"a": b"b"}]


def test_racing_observations_make_one_step(flows: Any) -> None:
    """One step, an event for each."""
    flow = create(flows)

    def observe() -> None:
        for _ in range(5):
            flows.record_step_observation(observed(flow.id))

    workers = [threading.Thread(target=observe) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(flows.list_steps(flow)) == 1
    assert len(trail(flows, flow)) == 21


def test_event_times_are_the_servers_to_the_millisecond(flows: Any) -> None:
    """The time in an event's id is the time of its change."""
    flow = create(flows)
    (event,) = flows.list_events(flow)
    assert event.at.utcoffset() == timedelta(0)
    assert event.at.microsecond % 1000 == 0
    assert abs(event.at - flow.created_at) < timedelta(milliseconds=50)
