"""Many operations, few round trips: each is what it is alone, and a refusal of one leaves the others alone."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from redisflow import (
    AlreadyTerminal,
    FlowExists,
    FlowManager,
    FlowNotFound,
    FlowStatus,
    InvalidData,
    Manual,
    NewFlow,
    PartialFailure,
    RevisionMismatch,
    StorageError,
)
from redisflow.calls import Packet
from tests.support.proxy import CUT_REPLY, CUT_REQUEST, HANG_REPLY, FaultProxy
from tests.support.servers import ENGINES, Server
from tests.support.subjects import BACKENDS, STATE, WHO, Backend, Subject, create, flow_in, observed, trail

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.subjects import Servers


@pytest.fixture(params=list(BACKENDS))
def sync_subject(request: pytest.FixtureRequest, servers: Servers) -> Iterator[Subject]:
    """Every backend, sync."""
    engine = BACKENDS[request.param]
    backend = Backend.in_memory() if engine is None else Backend.of_server(servers.of(engine))
    subject = Subject(backend, None)
    yield subject
    subject.close()
    backend.raw.close()


@pytest.fixture
def sync_flows(sync_subject: Subject) -> FlowManager:
    """A manager, not yet connected."""
    flows: FlowManager = sync_subject.manager()
    return flows


def new(**options: Any) -> NewFlow:
    """The input for the flow most tests begin with."""
    return NewFlow(**WHO | {"state": STATE} | options)


# --- batches


def test_a_batch_carries_out_every_verb(sync_flows: FlowManager) -> None:
    """What each returns equals what is stored, and the trails are those of single calls."""
    with sync_flows.batch() as batch:
        created = [batch.create_managed(**WHO, state={"n": n}) for n in range(6)]
        mirrored = batch.create_mirrored(**WHO)
    a, b, c, d, e, f = (one.result() for one in created)
    with sync_flows.batch() as batch:
        running = [batch.start_running(flow) for flow in (a, b, c, d)]
        asked, ended = batch.request_cancel(e), batch.cancel(f)
    a, b, c, d = (one.result() for one in running)
    with sync_flows.batch() as batch:
        waiting = batch.set_waiting(a, Manual())
        finished = batch.finish(b, {"summary": "done"})
        failed = batch.fail(c, "downstream 503")
        updated = batch.update_state(d, {"seen": True}, next_step="fetch", increment={"n": 5}, unset=["x"])
        noted = batch.append_event(mirrored.result().id, "note", {"by": "hand"})
        step = batch.record_step_observation(observed(mirrored.result().id))
    resumed_from, after = waiting.result(), updated.result()
    with sync_flows.batch() as batch:
        resumed = batch.resume(resumed_from.id, {"approved": True})
        rewritten = batch.update_and_append(after, "sorted", {"by": "date"})
    outcomes = [one.result() for one in (resumed, finished, failed)]
    outcomes += [rewritten.result()[0], asked.result(), ended.result()]
    assert outcomes == sync_flows.get_many(outcomes)
    assert [flow.status for flow in outcomes] == ["running", "finished", "failed", "running", "created", "cancelled"]
    assert after.state == {"n": 8, "seen": True}
    assert [kind for kind, _, _ in trail(sync_flows, a)] == ["created", "started", "waiting", "resumed"]
    assert noted.result() == sync_flows.list_events(mirrored.result(), 2)[1]
    assert [step.result()] == sync_flows.list_steps(mirrored.result())


def test_a_refusal_of_one_leaves_the_others_alone(sync_flows: FlowManager) -> None:
    """Each `result()` is the flow, or that verb's own error, as often as it is asked for."""
    flows = [flow_in(sync_flows, status) for status in ("running", "finished", "running")]
    with sync_flows.batch() as batch:
        queued = [batch.update_state(flow, {"n": 1}) for flow in flows]
        unknown = batch.update_state(uuid4(), {"n": 1})
        stale = batch.update_state(flows[2], {"n": 2}, expected_revision=1)
    assert [queued[n].result().state["n"] for n in (0, 2)] == [1, 1]
    for _ in range(2):
        with pytest.raises(AlreadyTerminal):
            queued[1].result()
        with pytest.raises(FlowNotFound):
            unknown.result()
        with pytest.raises(RevisionMismatch):
            stale.result()


def test_verbs_of_one_flow_are_carried_out_in_their_order(sync_flows: FlowManager, sync_subject: Subject) -> None:
    """Also where the copy that was passed is of another status by then, and scripts the server has or has not."""
    flow, other = create(sync_flows), flow_in(sync_flows, "running")
    sync_subject.raw.script_flush()
    sync_flows.finish(other.id)  # the server knows the last verb's script and no other
    with sync_flows.batch() as batch:
        queued = [
            batch.start_running(flow),
            batch.update_state(flow.id, increment={"processed": 1}),
            batch.set_waiting(flow.id, Manual()),
            batch.resume(flow.id),
            batch.finish(flow.id),
        ]
    assert [one.result().revision for one in queued] == [1, 2, 3, 4, 5]
    assert queued[-1].result() == sync_flows.get(flow)
    copy = create(sync_flows)
    with sync_flows.batch() as batch:
        again = [batch.start_running(copy), batch.update_state(copy, {"n": 1}), batch.finish(copy)]
    assert [one.result().revision for one in again] == [1, 2, 3]
    behind = create(sync_flows)
    sync_flows.start_running(behind.id)  # by somebody else
    with sync_flows.batch() as batch:
        late = [batch.update_state(behind, {"n": 1}), batch.finish(behind)]
    assert [one.result().revision for one in late] == [2, 3]
    spread = create(sync_flows)
    with sync_flows.batch() as batch:
        apart = [batch.start_running(spread)]
        for _ in range(499):
            batch.append_event(other, "note")
        apart += [batch.update_state(spread, {"n": 1}), batch.finish(spread)]
    assert [one.result().revision for one in apart] == [1, 2, 3]


def test_a_stale_copy_of_another_status_is_no_obstacle(sync_flows: FlowManager) -> None:
    """The second round trip it takes is the batch's, too."""
    stale = [create(sync_flows) for _ in range(3)]
    for flow in stale:
        sync_flows.start_running(flow)
    with sync_flows.batch() as batch:
        queued = [batch.update_state(flow, {"late": True}) for flow in stale]
    assert [(one.result().status, one.result().state["late"]) for one in queued] == [(FlowStatus.RUNNING, True)] * 3


def test_bad_input_is_refused_at_once_and_the_rest_goes_on(sync_flows: FlowManager) -> None:
    """The verb raises, nothing of it is queued."""
    flow = flow_in(sync_flows, "running")
    with sync_flows.batch() as batch:
        first = batch.update_state(flow, {"n": 1})
        with pytest.raises(InvalidData, match="set"):
            batch.update_state(flow, {"n": {1, 2}})
        with pytest.raises(InvalidData):
            batch.start_running("no id")
    assert first.result().revision == 2


def test_a_block_that_raises_sends_nothing(sync_flows: FlowManager, sync_subject: Subject) -> None:
    """And a result that never came is no result."""
    flow = flow_in(sync_flows, "running")
    before = sync_subject.snapshot()
    batch = sync_flows.batch()
    queued = batch.finish(flow)
    with pytest.raises(RuntimeError, match=str(flow.id)):
        queued.result()
    with pytest.raises(ZeroDivisionError), batch:
        _ = 1 / 0
    assert sync_subject.snapshot() == before
    with pytest.raises(RuntimeError, match="not sent"):
        queued.result()


def test_a_long_block_that_raises_keeps_what_was_sent(sync_flows: FlowManager) -> None:
    """Five hundred go while the block still queues; the rest never."""
    flow = flow_in(sync_flows, "running", state={"n": 0})
    queued: list[Any] = []

    def block() -> None:
        with sync_flows.batch() as batch:
            queued.extend(batch.update_state(flow.id, increment={"n": 1}) for _ in range(700))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        block()
    assert [one.result().state["n"] for one in queued[:500]] == list(range(1, 501))
    with pytest.raises(RuntimeError, match="not sent"):
        queued[500].result()
    read = sync_flows.get(flow)
    assert read is not None
    assert read.state["n"] == 500


def test_what_was_sent_before_is_not_sent_again(sync_flows: FlowManager) -> None:
    """`send()` in the block sends what is queued so far; an empty batch sends nothing."""
    flow = flow_in(sync_flows, "running")
    with sync_flows.batch() as batch:
        one = batch.update_state(flow.id, increment={"processed": 1})
        batch.send()
        assert one.result().state["processed"] == 1
        another = batch.update_state(flow.id, increment={"processed": 1})
    assert another.result().state["processed"] == 2
    with sync_flows.batch():
        pass


def test_a_batch_is_cut_into_packets_of_500(sync_flows: FlowManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few round trips, and none too long for the server. A flow is in a packet once: its verbs keep their order."""
    made = sync_flows.create_many(new(state={"n": 0}) for _ in range(500))
    sync_flows.update_state(made[0].id, increment={"n": 0})  # the server knows the script now
    wire, packets = sync_flows.connect(), []
    exchange = wire.exchange

    def counted(packet: Packet) -> Any:
        packets.append(len(packet.commands))
        return exchange(packet)

    monkeypatch.setattr(wire, "exchange", counted)
    with sync_flows.batch() as batch:
        queued = [batch.update_state(flow.id, increment={"n": 1}) for flow in [*made, *made, made[0]]]
    assert packets == [500, 500, 1]
    assert [one.result().state["n"] for one in queued] == [1] * 500 + [2] * 500 + [3]
    packets.clear()
    with sync_flows.batch() as batch:
        queued = [batch.update_state(flow.id, increment={"n": 1}) for flow in (made[1], made[2], made[1], made[1])]
    assert packets == [2, 1, 1]
    assert [one.result().state["n"] for one in queued] == [3, 3, 4, 5]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("redisflow-batch")]


@pytest.mark.parametrize("fault", [CUT_REPLY, CUT_REQUEST, HANG_REPLY], ids=lambda fault: fault.kind)
def test_a_lost_packet_is_settled_and_nothing_applied_twice(server: Server, fault: Any) -> None:
    """Each call of it carries its own operation id."""
    with FaultProxy(server.port) as proxy:
        url = f"{proxy.url}?socket_timeout=0.5"
        with FlowManager.from_url(url, prefix=f"b-{uuid4().hex[:8]}") as flows:
            made = flows.create_many(new() for _ in range(40))
            with flows.batch() as batch:
                running = [batch.start_running(flow) for flow in made]
            flows.update_state(running[0].result().id, increment={"processed": 0})
            proxy.inject(fault)
            with flows.batch() as batch:
                queued = [batch.update_state(one.result(), increment={"processed": 1}) for one in running]
            assert sum(proxy.faults.values()) == 1
            for one in queued[1:]:
                assert (one.result().state["processed"], one.result().revision) == (1, 2)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server for the tests of faults."""
    with Server(ENGINES[0]) as server:
        yield server


def test_without_a_server_each_result_is_an_error(server: Server) -> None:
    """The batch itself does not raise: what became of a verb is told by its result."""
    with FaultProxy(server.port) as proxy:
        flows = FlowManager.from_url(proxy.url, prefix=f"b-{uuid4().hex[:8]}", deadline_s=0.3)
        flow = flow_in(flows, "running")
        batch = flows.batch()
        queued = [batch.update_state(flow, {"n": n}) for n in range(3)]
    batch.send()
    for one in queued:
        with pytest.raises(StorageError):
            one.result()
    flows.close()


# --- create_many


def test_create_many_creates_each_as_alone(flows: Any) -> None:
    """In the order given; states, owners and ids are each input's own."""
    chosen = uuid4()
    inputs = [new(state={"n": n}, owner_session_key=f"owner-{n % 3}") for n in range(20)] + [new(flow_id=chosen)]
    made = flows.create_many(iter(inputs))
    assert [flow.state for flow in made[:20]] == [{"n": n} for n in range(20)]
    assert made[20].id == chosen
    assert flows.get_many(made) == made
    assert len(flows.list_by_owner("owner-1")) == 7
    assert trail(flows, made[0]) == trail(flows, create(flows, state={"n": 0}))
    assert flows.create_many([]) == []


def test_create_many_checks_every_input_first(flows: Any, subject: Subject) -> None:
    """One that cannot be stored is named by its place, and nothing is created."""
    for bad in (new(state={1: 2}), new(goal=""), new(flow_id="no id"), WHO):
        with pytest.raises(InvalidData, match=r"inputs\[2\]"):
            flows.create_many([new(), new(), bad])
    assert subject.all_keys() == []


def test_create_many_raises_what_was_refused_when_all_were_tried(flows: Any) -> None:
    """The others exist; with `exist_ok` the owner's own is returned."""
    taken, free = uuid4(), uuid4()
    first = flows.create_many([new(flow_id=taken)])
    with pytest.raises(PartialFailure) as refused:
        flows.create_many([new(flow_id=free), new(flow_id=taken)])
    assert refused.value.done == [flows.get(free)]
    ((place, flow_id, error),) = refused.value.failed
    assert (place, flow_id, type(error)) == (1, taken, FlowExists)
    assert refused.value.count == 1
    assert str(taken) in str(refused.value)
    assert flows.create_many([new(flow_id=taken), new(flow_id=free)], exist_ok=True)[0] == first[0]
    with pytest.raises(PartialFailure) as refused:
        flows.create_many([new(flow_id=taken, owner_session_key="somebody else")], exist_ok=True)
    assert [type(failure.error) for failure in refused.value.failed] == [FlowExists]
    assert refused.value.done == []
