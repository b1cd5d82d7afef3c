"""What a waiting flow leaves in the indexes, and what engines make of it."""

from __future__ import annotations

import logging
import threading
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import attrs
import msgpack
import pytest

from redisflow import ExternalEvent, Flow, FlowStatus, InvalidData, Manual, TickReport, Timer
from redisflow.keys import DEFAULT_PARTITIONS
from tests.support.subjects import STATE, create, flow_in, trail
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from tests.support.subjects import Subject

FAR = datetime(2031, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
FAR_US = 1_935_817_689_123_456
EVENT = ExternalEvent("approvals", "42")
WIRE_EVENT = EVENT.to_wire()


def member(flow: Flow) -> bytes:
    """The entry of a flow in a set of ids."""
    return str(flow.id).encode()


@pytest.fixture
def engine(flows: Any, subject: Subject) -> Any:
    """A wait engine of the subject."""
    return subject.engine(flows)


# --- the indexes ---------------------------------------------------------------------------------------


def test_the_microseconds_are_right() -> None:
    """The constant the tests below compare with."""
    assert (FAR - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) == FAR_US


@pytest.mark.parametrize(
    ("wait", "due_us", "waiter"),
    [
        (Timer(at=FAR), FAR_US, None),
        (Timer(at=FAR + timedelta(days=1), deadline=FAR), FAR_US, None),
        (Timer(at=FAR, deadline=FAR + timedelta(days=1)), FAR_US, None),
        (EVENT, None, b"approvals\x0042\x00"),
        (attrs.evolve(EVENT, deadline=FAR), FAR_US, b"approvals\x0042\x00"),
        (Manual(), None, None),
        (Manual(deadline=FAR), FAR_US, None),
        ({"kind": "timer", "at": "2031-05-06T09:08:09.123456+02:00"}, FAR_US, None),
        ({"kind": "moon", "at": "full", "topic": "x", "correlation_id": "y"}, None, None),
    ],
)
def test_a_wait_is_indexed_by_what_ends_it(
    flows: Any, subject: Subject, wait: Any, due_us: int | None, waiter: bytes | None
) -> None:
    """In `due` by its earliest time, in `waiters` by its event; a kind of the caller's own in neither."""
    flow = flow_in(flows, "waiting", wait=wait)
    assert subject.members("due") == ({} if due_us is None else {member(flow): due_us})
    assert subject.members("waiters") == ({} if waiter is None else {waiter + member(flow): 0})


LEAVING: dict[str, Any] = {
    "start_running": lambda flows, flow: flows.start_running(flow),
    "resume": lambda flows, flow: flows.resume(flow.id),
    "fail": lambda flows, flow: flows.fail(flow, "broken"),
    "cancel": lambda flows, flow: flows.cancel(flow),
    "request and cancel": lambda flows, flow: flows.cancel(flows.request_cancel(flow)),
    "update_and_append": lambda flows, flow: flows.update_and_append(
        attrs.evolve(flow, status=FlowStatus.RUNNING), "went on"
    ),
    "mutate": lambda flows, flow: flows.mutate(
        flow.id, lambda f: attrs.evolve(f, status=FlowStatus.FAILED), kind="gave up"
    ),
    "delete": lambda flows, flow: flows.delete(flow),
}


@pytest.mark.parametrize("way", LEAVING)
def test_leaving_waiting_clears_the_indexes(flows: Any, subject: Subject, way: str) -> None:
    """In every way: no entry in due or waiters, no wait."""
    flow = flow_in(flows, "waiting", wait=attrs.evolve(EVENT, deadline=FAR))
    other = flow_in(flows, "waiting", wait=attrs.evolve(EVENT, deadline=FAR))
    LEAVING[way](flows, flow)
    assert list(subject.members("due")) == [member(other)]
    assert list(subject.members("waiters")) == [EVENT.waiter + member(other)]
    after = flows.get(flow.id)
    assert after is None or after.wait is None
    assert not {b"wait", b"waiter"} & set(subject.raw.hgetall(subject.flow_key(flow.id)))


def test_a_change_in_place_keeps_the_indexes(flows: Any, subject: Subject) -> None:
    """Updates, audit entries: the flow waits on."""
    flow = flow_in(flows, "waiting", wait=attrs.evolve(EVENT, deadline=FAR))
    before = subject.members("due"), subject.members("waiters")
    flow = flows.update_state(flow, {"x": 1}, next_step="y")
    flows.append_event(flow, "note")
    flows.update_and_append(attrs.evolve(flow, state={}), "emptied")
    assert (subject.members("due"), subject.members("waiters")) == before


def test_a_requested_cancel_is_due_now(flows: Any, subject: Subject) -> None:
    """A waiting flow is to be looked at at once; its waiters entry goes with the wait. Others are left alone."""
    flow = flow_in(flows, "waiting", wait=attrs.evolve(EVENT, deadline=FAR))
    flows.request_cancel(flow_in(flows, "running"))
    flows.request_cancel(create(flows))
    flow = flows.request_cancel(flow)
    (due,) = subject.members("due").items()
    assert due == (member(flow), flow.updated_at.timestamp() * 1_000_000)
    assert list(subject.members("waiters")) == [EVENT.waiter + member(flow)]


# --- ticks ---------------------------------------------------------------------------------------------


def test_a_tick_of_nothing_reports_nothing(engine: Any) -> None:
    """An empty namespace is no error."""
    assert engine.tick() == TickReport()


def test_a_tick_resumes_what_is_due(flows: Any, engine: Any) -> None:
    """Timers whose time has come go on, with no trace in the state; the others wait."""
    past = datetime.now(UTC) - timedelta(hours=1)
    due = [flow_in(flows, "waiting", wait=Timer(at=past)) for _ in range(3)]
    later = [flow_in(flows, "waiting", wait=Timer(at=FAR)), flow_in(flows, "waiting")]
    assert engine.tick() == TickReport(scanned=3, resumed=3, still_waiting=2)
    for flow in due:
        after = flows.get(flow.id)
        assert (after.status, after.wait, after.state, after.revision) == ("running", None, STATE, 3)
        assert trail(flows, flow)[-1] == ("resumed", 3, {"state_patch": None})
    assert flows.get_many(later) == later
    assert engine.tick() == TickReport(still_waiting=2)


def test_now_may_be_given(flows: Any, engine: Any) -> None:
    """A tick at a moment looks at what is due at that moment, which is inclusive."""
    flow = flow_in(flows, "waiting", wait=Timer(at=FAR))
    assert engine.tick(FAR - timedelta(microseconds=1)).resumed == 0
    assert engine.tick(now=FAR).resumed == 1
    assert flows.get(flow.id).status is FlowStatus.RUNNING


@pytest.mark.parametrize("wait", [EVENT, Manual(), Timer(at=FAR + timedelta(days=1))])
def test_a_deadline_ends_a_wait_and_says_so(flows: Any, engine: Any, wait: Any) -> None:
    """`state["wait_timed_out"]` is the wait, in state and event alike."""
    flow = flow_in(flows, "waiting", wait=attrs.evolve(wait, deadline=FAR))
    assert engine.tick(FAR - timedelta(seconds=1)).resumed == 0
    assert engine.tick(FAR) == TickReport(scanned=1, resumed=1)
    after = flows.get(flow.id)
    assert (after.status, after.wait) == ("running", None)
    assert after.state == STATE | {"wait_timed_out": flow.wait}
    assert trail(flows, flow)[-1] == ("resumed", 3, {"state_patch": {"wait_timed_out": flow.wait}})


def test_a_timer_before_its_deadline_did_not_time_out(flows: Any, engine: Any) -> None:
    """Looked at late, after both: it is the timer that ended the wait."""
    flow = flow_in(flows, "waiting", wait=Timer(at=FAR, deadline=FAR + timedelta(seconds=1)))
    assert engine.tick(FAR + timedelta(days=1)).resumed == 1
    assert flows.get(flow.id).state == STATE


def test_what_no_time_ends_is_left_alone(flows: Any, engine: Any) -> None:
    """External, manual and the caller's own kinds, at any time."""
    waits = (EVENT, Manual(), {"kind": "moon", "at": "2020-01-01T00:00:00Z", "deadline": "2020-01-01T00:00:00Z"})
    waiting = [flow_in(flows, "waiting", wait=wait) for wait in waits]
    assert engine.tick(FAR) == TickReport(still_waiting=3)
    assert flows.get_many(waiting) == waiting


@pytest.mark.parametrize("wait", [EVENT, Manual(), Timer(at=FAR), {"kind": "moon"}])
def test_a_tick_cancels_waiting_flows_that_were_asked_to(flows: Any, engine: Any, subject: Subject, wait: Any) -> None:
    """Cancelled, not resumed, whatever they wait for; running ones are their controllers'."""
    flow = flows.request_cancel(flow_in(flows, "waiting", wait=wait))
    running = flows.request_cancel(flow_in(flows, "running"))
    assert engine.tick() == TickReport(scanned=1, cancelled=1)
    after = flows.get(flow.id)
    assert (after.status, after.cancel_requested, after.wait) == ("cancelled", True, None)
    assert trail(flows, flow)[-1] == ("cancelled", after.revision, {})
    assert flows.get(running.id) == running
    assert subject.members("due") == subject.members("waiters") == {}


def test_a_requested_cancel_wins_over_a_due_timer(flows: Any, engine: Any) -> None:
    """A flow that is due both ways ends."""
    flow = flows.request_cancel(flow_in(flows, "waiting", wait=Timer(at=datetime(2020, 1, 1, tzinfo=UTC))))
    assert engine.tick() == TickReport(scanned=1, cancelled=1)
    assert flows.get(flow.id).status is FlowStatus.CANCELLED


def test_a_damaged_flow_does_not_stop_the_others(
    flows: Any, engine: Any, subject: Subject, caplog: pytest.LogCaptureFixture
) -> None:
    """It is counted as an error and logged; the rest of what is due goes on."""
    caplog.set_level(logging.ERROR)
    past = Timer(at=datetime(2020, 1, 1, tzinfo=UTC))
    due = [flow_in(flows, "waiting", wait=past) for _ in range(4)]
    subject.raw.hset(subject.flow_key(due[0].id), "wait", b"\xc1")
    subject.raw.hset(subject.flow_key(due[1].id), "s:messages", b"\xc1")
    report = engine.tick()
    assert (report.resumed, report.errors, report.still_waiting) == (2, 2, 2)
    assert str(due[0].id) in caplog.text


@pytest.mark.parametrize("wire", [{}, {"kind": "timer", "at": "junk"}, {"kind": "timer"}, {"kind": 7}])
def test_a_stored_wait_that_is_none_does_not_stop_the_others(
    flows: Any, engine: Any, subject: Subject, caplog: pytest.LogCaptureFixture, wire: dict[str, Any]
) -> None:
    """A mapping, and yet no wait: an error like any other damage, to a tick and to an event."""
    caplog.set_level(logging.ERROR)
    past = Timer(at=datetime(2020, 1, 1, tzinfo=UTC))
    timers, events = ([flow_in(flows, "waiting", wait=wait) for _ in range(3)] for wait in (past, EVENT))
    for flow in (timers[0], events[0]):
        subject.raw.hset(subject.flow_key(flow.id), "wait", msgpack.packb(wire))
    report = engine.tick()
    assert (report.resumed, report.errors) == (2, 1)
    assert str(timers[0].id) in caplog.text
    resumed = engine.resume_waiters("approvals", "42")
    assert {flow.id for flow in resumed} == {flow.id for flow in events[1:]}
    assert str(events[0].id) in caplog.text


def nested(depth: int) -> Any:
    """A list in a list, so deep."""
    return [] if depth == 1 else [nested(depth - 1)]


def test_a_wait_with_a_deadline_fits_into_the_state(flows: Any, engine: Any) -> None:
    """It is a level deeper there: what could not be stored then is refused when the wait begins."""
    flow = flow_in(flows, "running")
    wait = Manual(deadline=datetime(2020, 1, 1, tzinfo=UTC)).to_wire()
    with pytest.raises(InvalidData, match="64"):
        flows.set_waiting(flow, wait | {"own": nested(63)})
    flow = flows.set_waiting(flow, wait | {"own": nested(62)})
    assert engine.tick().resumed == 1
    assert flows.get(flow.id).state["wait_timed_out"] == flow.wait


def test_a_deadline_ends_a_wait_larger_than_the_engine_would_store(flows: Any, subject: Subject) -> None:
    """The limit is for what callers bring; this is stored already."""
    wait = Manual(deadline=datetime(2020, 1, 1, tzinfo=UTC)).to_wire() | {"own": "x" * 5000}
    flow = flow_in(flows, "waiting", wait=wait)
    assert subject.engine(subject.manager(max_payload_bytes=1000)).tick().resumed == 1
    assert flows.get(flow.id).state["wait_timed_out"] == wait


def test_an_event_whose_payload_no_flow_could_take_is_refused(flows: Any, engine: Any, subject: Subject) -> None:
    """Before any waiter is looked at."""
    flow = flow_in(flows, "waiting", wait=EVENT)
    before = subject.snapshot()
    for payload in (nested(64), "x" * 2**20):
        with pytest.raises(InvalidData, match="payload"):
            engine.resume_waiters("approvals", "42", payload)
        with pytest.raises(InvalidData, match="payload"):
            engine.try_resume_external(flow, "approvals", "42", payload)
    assert subject.snapshot() == before
    assert len(engine.resume_waiters("approvals", "42", nested(63))) == 1


@pytest.mark.parametrize("junk", [b"not a uuid", b"\xff"])
def test_an_entry_that_makes_no_sense_does_not_stop_a_tick(
    flows: Any, engine: Any, subject: Subject, caplog: pytest.LogCaptureFixture, junk: bytes
) -> None:
    """A member of `due` or `waiters` that is no flow id is passed over."""
    caplog.set_level(logging.CRITICAL)
    flow = flow_in(flows, "waiting", wait=Timer(at=datetime(2020, 1, 1, tzinfo=UTC)))
    partition = subject.keyspace.partition_of(flow.id)
    subject.raw.zadd(partition.due, {junk: 1})
    assert engine.tick().resumed == 1
    waiting = flow_in(flows, "waiting", wait=EVENT)
    subject.raw.zadd(subject.keyspace.partition_of(waiting.id).waiters, {EVENT.waiter + junk: 0})
    assert [flow.id for flow in engine.resume_waiters("approvals", "42")] == [waiting.id]


def test_damaged_flows_never_starve_the_due_ones(flows: Any, engine: Any, subject: Subject) -> None:
    """More entries of no use than a tick reads at once, all due before the flow: it is resumed all the same."""
    flow = flow_in(flows, "waiting", wait=Timer(at=datetime(2020, 1, 1, tzinfo=UTC)))
    partition = subject.keyspace.partition_of(flow.id)
    subject.raw.zadd(partition.due, {str(uuid4()): n for n in range(150)})
    engine.tick()
    assert flows.get(flow.id).status is FlowStatus.RUNNING


def test_many_engines_resume_each_flow_once(flows: Any, subject: Subject) -> None:
    """Racing ticks share the work: their sum is the number of flows, and no trail has two resumptions."""
    past = Timer(at=datetime(2020, 1, 1, tzinfo=UTC))
    due = [flow_in(flows, "waiting", wait=past) for _ in range(30)]
    engines = [subject.engine(subject.manager()) for _ in range(3)]
    reports: list[TickReport] = []
    start = threading.Barrier(len(engines))

    def work(engine: Any) -> None:
        start.wait(10)
        reports.append(engine.tick())

    workers = [threading.Thread(target=work, args=(engine,)) for engine in engines]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(reports) == 3
    assert sum(report.resumed for report in reports) == 30
    assert sum(report.errors for report in reports) == 0
    for flow in due:
        assert [kind for kind, *_ in trail(flows, flow)] == ["created", "started", "waiting", "resumed"]


# --- external events -----------------------------------------------------------------------------------


@pytest.mark.parametrize("payload", [{"ok": True}, [1], "text", 0, False, {}])
def test_an_external_event_resumes_the_flow_that_waits_for_it(flows: Any, engine: Any, payload: Any) -> None:
    """With `state["resume_event"] = payload`; the flow is returned as `get` has it."""
    for ref in (lambda f: f, lambda f: f.id, lambda f: str(f.id)):
        flow = flow_in(flows, "waiting", wait=EVENT)
        after = engine.try_resume_external(ref(flow), "approvals", "42", payload)
        assert (after.status, after.state) == ("running", STATE | {"resume_event": payload})
        assert flows.get(flow.id) == after


def test_an_external_event_without_a_payload_leaves_the_state(flows: Any, engine: Any) -> None:
    """No payload, no `resume_event`."""
    flow = flow_in(flows, "waiting", wait=WIRE_EVENT)
    assert engine.try_resume_external(flow.id, "approvals", "42").state == STATE


def test_another_event_resumes_nothing(flows: Any, engine: Any, subject: Subject) -> None:
    """Just this topic and correlation id, just a flow that waits for it: None otherwise, nothing changed."""
    flow = flow_in(flows, "waiting", wait=EVENT)
    others = [flow_in(flows, status) for status in FlowStatus]
    others.append(flow_in(flows, "waiting", wait={"kind": "event", "topic": "approvals", "correlation_id": "42"}))
    flagged = flows.request_cancel(flow_in(flows, "waiting", wait=EVENT))
    before = subject.snapshot()
    for topic, correlation_id in (("approvals", "43"), ("approval", "42"), ("42", "approvals"), ("approvals4", "2")):
        assert engine.try_resume_external(flow.id, topic, correlation_id, {}) is None
    for other in (*others, flagged):
        assert engine.try_resume_external(other.id, "approvals", "42", {}) is None
    assert engine.try_resume_external(uuid4(), "approvals", "42", {}) is None
    assert subject.snapshot() == before


def test_everyone_who_waits_for_an_event_is_resumed(flows: Any, engine: Any) -> None:
    """Over all partitions, and nobody else: names are compared whole, braces and prefixes included."""
    waiting = [flow_in(flows, "waiting", wait=EVENT) for _ in range(20)]
    near = [ExternalEvent("approvals", "421"), ExternalEvent("approvals", "4"), ExternalEvent("{approvals", "42")]
    others = [flow_in(flows, "waiting", wait=wait) for wait in near]
    resumed = engine.resume_waiters("approvals", "42", {"ok": 1})
    assert {flow.id for flow in resumed} == {flow.id for flow in waiting}
    assert {flow.state["resume_event"]["ok"] for flow in resumed} == {1}
    assert flows.get_many(others) == others
    assert engine.resume_waiters("approvals", "42") == []


def test_one_of_many_deliveries_resumes(flows: Any, engine: Any) -> None:
    """Racing deliveries of one event: one gets the flow, the others None."""
    flow = flow_in(flows, "waiting", wait=EVENT)
    outcomes: list[Any] = []

    def deliver(n: int) -> None:
        outcomes.append(engine.try_resume_external(flow.id, "approvals", "42", n))

    workers = [threading.Thread(target=deliver, args=(n,)) for n in range(5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    (winner,) = [outcome for outcome in outcomes if outcome is not None]
    assert flows.get(flow.id) == winner
    assert [kind for kind, *_ in trail(flows, flow)].count("resumed") == 1


# --- run -----------------------------------------------------------------------------------------------


def test_a_running_engine_wakes_for_the_next_due_time(flows: Any, engine: Any, subject: Subject) -> None:
    """It sleeps no longer than that, whatever the interval, and stops when told to."""
    flow = flow_in(flows, "waiting", wait=Timer(at=datetime.now(UTC) + timedelta(seconds=0.4)))
    with subject.running(engine, 3600.0) as halt:
        wait_until(lambda: flows.get(flow.id).status == "running", description="the timer resumes its flow")
        halt()


def test_a_running_engine_is_told_what_came_up_since(flows: Any, engine: Any, subject: Subject) -> None:
    """However long it means to sleep: of a timer that is due sooner, and of a cancel request."""
    channel = subject.keyspace.partitions[-1].due
    with subject.running(engine, 3600.0):
        wait_until(partial(subject.listeners, channel), description="the engine listens")
        for _ in range(20):  # over the partitions
            flow = flow_in(flows, "waiting", wait=Timer(at=datetime.now(UTC) + timedelta(seconds=0.02)))
            wait_until(partial(is_in, flows, flow, "running"), description="the timer resumes its flow")
        flow = flows.request_cancel(flow_in(flows, "waiting"))
        wait_until(partial(is_in, flows, flow, "cancelled"), description="the request cancels its flow")
        flow = flow_in(flows, "waiting", wait=Manual())
        flow = flows.update_and_append(attrs.evolve(flow, wait=Timer(at=datetime.now(UTC)).to_wire()), "sooner")[0]
        wait_until(partial(is_in, flows, flow, "running"), description="the rewritten wait resumes its flow")


def test_only_a_wait_that_is_next_is_told(flows: Any, subject: Subject) -> None:
    """A message each for the waits that end before all others of their partition."""
    ids = [UUID(int=n * DEFAULT_PARTITIONS) for n in (1, 2, 3, 4)]  # of one partition
    told: Any = subject.raw.pubsub()  # type: ignore[no-untyped-call]  # redis-py's
    told.subscribe(subject.keyspace.partitions[0].due)
    assert told.get_message(timeout=10)["type"] == "subscribe"
    for flow_id, days in zip(ids, (5, 6, 4, 5), strict=True):
        flow_in(flows, "waiting", flow_id=flow_id, wait=Timer(at=FAR + timedelta(days=days)))
    scores = [told.get_message(timeout=10)["data"] for _ in range(2)]
    assert scores == [b"%d" % (FAR_US + days * 86_400_000_000) for days in (5, 4)]
    assert told.get_message(timeout=0.05) is None
    told.close()


def test_an_engine_listens_again(real_subject: Subject) -> None:
    """After its connection is gone."""
    subject = real_subject
    flows, channel = subject.manager(), subject.keyspace.partitions[-1].due
    with subject.running(subject.engine(flows), 3600.0):
        for _ in range(3):
            wait_until(partial(subject.listeners, channel), description="the engine listens")
            flow = flow_in(flows, "waiting", wait=Timer(at=datetime.now(UTC)))
            wait_until(partial(is_in, flows, flow, "running"), description="the timer resumes its flow")
            subject.raw.client_kill_filter(_type="pubsub")


def is_in(flows: Any, flow: Flow, status: str) -> bool:
    """Whether a flow has come to be in a status."""
    return bool(flows.get(flow.id).status == status)


def test_a_running_engine_finds_what_came_up_since(flows: Any, engine: Any, subject: Subject) -> None:
    """It looks at least every interval."""
    with subject.running(engine, 0.05):
        flow = flow_in(flows, "waiting", wait=Timer(at=datetime.now(UTC)))
        wait_until(lambda: flows.get(flow.id).status == "running", description="the timer resumes its flow")
        flow = flows.request_cancel(flow_in(flows, "waiting"))
        wait_until(lambda: flows.get(flow.id).status == "cancelled", description="the request cancels its flow")
