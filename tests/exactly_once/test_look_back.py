"""How far a resend looks back for what its first attempt left, and scripts the server has forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import attrs
import fakeredis
import pytest

from redisflow import Flow, FlowManager, FlowStatus, OutcomeUnknown, StepObservation, Timer, WaitEngine
from redisflow.ops import records
from redisflow.ops.namespace import Namespace
from tests.support.proxy import CUT_REPLY, PASS, Fault, FaultProxy
from tests.support.resends import IDENTITY, VERBS, Verb, prepared, sent
from tests.support.servers import ENGINES, Server


@attrs.frozen
class Backend:
    """A server, or fakeredis, to which a script can be sent by hand."""

    raw: Any
    real: bool


@pytest.fixture(scope="module", params=[*ENGINES, None], ids=lambda engine: str(engine or "fakeredis"))
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every engine, and fakeredis."""
    if request.param is None:
        yield Backend(fakeredis.FakeRedis(), real=False)
        return
    with Server(request.param) as server:
        yield Backend(server.client(), real=True)


@attrs.frozen
class Trail:
    """A flow with a trail written by hand, and a way to send `append_event` as a resend of any age."""

    backend: Backend
    flows: FlowManager
    flow: Flow
    namespace: Namespace
    key: bytes

    @classmethod
    def of(cls, backend: Backend, prefix: str) -> Trail:
        flows = FlowManager(backend.raw, prefix=prefix)
        flow = flows.create_managed(**IDENTITY)
        namespace = Namespace(prefix)
        namespace.connected(16)
        return cls(
            backend, flows, flow, namespace, namespace.keyspace.partition_of(flow.id).events(str(flow.id).encode())
        )

    def write(self, ages_ms: list[int], ops: dict[int, str] | None = None, *, from_the_start: bool = True) -> None:
        """Write entries of those ages, oldest first; `ops` names the ops of some, by index."""
        seconds, micros = self.backend.raw.time()
        now_ms = seconds * 1000 + micros // 1000
        self.backend.raw.delete(self.key)
        pipe = self.backend.raw.pipeline(transaction=False)
        for index, age_ms in enumerate(ages_ms):
            kind = "created" if index == 0 and from_the_start else "note"
            op = (ops or {}).get(index, "0" * 32)
            fields = {"rev": 0, "kind": kind, "op": op, "payload": b"\x80"}
            pipe.xadd(self.key, fields, id=f"{now_ms - age_ms}-{index + 1}")
        pipe.execute()

    def look_back(self, op: str, span_ms: int | None, *, deep: bool = False) -> str:
        """Send `append_event` with a span; say what the script made of it."""
        operation = records.append_event(
            self.namespace, self.flow.id, "note", None, expected_revision=None, op_id=op if deep else None
        )
        call = next(operation)
        source = call.script.source if self.backend.real else call.script.plain
        args = [op.encode(), *call.command(source, span_ms)[4 + len(call.keys) :]]
        before = self.backend.raw.xlen(self.key)
        tag, *facts = self.backend.raw.eval(source.text, len(call.keys), *call.keys, *args)
        added = self.backend.raw.xlen(self.key) - before
        if tag == b"UNKNOWN":
            assert added == 0
            return "UNKNOWN"
        assert tag == b"OK"
        ((_, entry),) = self.backend.raw.xrange(self.key, facts[0], facts[0])
        assert entry[b"op"].decode() == op
        return "ABSENT" if added else "FOUND"


@pytest.fixture
def trail(backend: Backend, prefix: str) -> Trail:
    """A flow whose trail the test writes."""
    return Trail.of(backend, prefix)


OP = "ab" * 16
MINUTE_MS, HOUR_MS = 60_000, 3_600_000


@pytest.mark.parametrize("from_the_end", [1, 2, 99, 100])
def test_the_last_hundred_entries_are_looked_through_however_old(trail: Trail, from_the_end: int) -> None:
    """A clock that was stepped by hours hides nothing that is among the last 100 entries."""
    trail.write([HOUR_MS] * 300, {300 - from_the_end: OP}, from_the_start=False)
    assert trail.look_back(OP, 1) == "FOUND"


@pytest.mark.parametrize(("count", "at"), [(150, 0), (1000, 0), (1000, 500), (9_950, 0)])
def test_every_entry_since_the_first_attempt_is_looked_through(trail: Trail, count: int, at: int) -> None:
    """An op that left its entry within the span is found behind thousands of others."""
    trail.write([HOUR_MS] * 50 + [30_000] * count, {50 + at: OP})
    assert trail.look_back(OP, 31_000) == "FOUND"


def test_a_minute_more_than_the_span_is_looked_through(trail: Trail) -> None:
    """The server's clock may have been stepped by up to a minute since the first attempt."""
    trail.write([HOUR_MS] * 50 + [63_000] + [62_000] * 200 + [1_000] * 150, {50: OP})
    assert trail.look_back(OP, 5_000) == "FOUND"


def test_an_op_that_left_nothing_within_the_window_did_not_run(trail: Trail) -> None:
    """The trail reaches back beyond the window without the op: it is applied now."""
    trail.write([HOUR_MS] * 20_000 + [1_000] * 150, from_the_start=False)
    assert trail.look_back(OP, 5_000) == "ABSENT"


@pytest.mark.parametrize("count", [1, 99, 100, 101, 200, 5_000, 9_999])
def test_a_trail_read_to_its_start_answers_for_sure(trail: Trail, count: int) -> None:
    """A young flow's whole life is in the window, from `created` on: the op did not run."""
    trail.write([1_000] * count)
    assert trail.look_back(OP, 5_000) == "ABSENT"


@pytest.mark.parametrize("count", [1, 99, 100, 101, 200, 5_000])
def test_a_trimmed_trail_is_no_proof(trail: Trail, count: int) -> None:
    """What is left begins after the first attempt: nobody can say, and nothing is applied."""
    trail.write([1_000] * count, from_the_start=False)
    assert trail.look_back(OP, 5_000) == "UNKNOWN"


def test_a_trail_trimmed_to_nothing_is_no_proof(trail: Trail) -> None:
    """A flow has had its `created` entry: an empty trail was trimmed."""
    trail.backend.raw.xtrim(trail.key, maxlen=0, approximate=False)
    assert trail.look_back(OP, 5_000) == "UNKNOWN"


def test_more_than_ten_thousand_entries_are_not_read(trail: Trail) -> None:
    """The script is bounded: past 10,000 entries inside the window it refuses to guess."""
    trail.write([1_000] * 10_200, {50: OP})
    assert trail.look_back(OP, 5_000) == "UNKNOWN"
    trail.write([1_000] * 10_200, {250: OP})
    assert trail.look_back(OP, 5_000) == "FOUND"


def test_an_op_id_that_the_caller_brings_is_looked_for_at_once(trail: Trail) -> None:
    """It may be of any age, so 10,000 entries are looked through on the first attempt; beyond, it is applied."""
    trail.write([HOUR_MS] * 10_200, {250: OP})
    assert trail.look_back(OP, None, deep=True) == "FOUND"
    trail.write([HOUR_MS] * 10_200, {50: OP})
    assert trail.look_back(OP, None, deep=True) == "ABSENT"


def test_a_first_attempt_of_a_new_op_does_not_look(trail: Trail) -> None:
    """The ordinary path pays no reading: it appends."""
    trail.write([1_000] * 10, {5: OP})
    assert trail.look_back(OP, None) == "ABSENT"


@pytest.mark.parametrize("name", ["update_state", "append_event", "record_step_observation", "create_managed"])
def test_a_trail_trimmed_between_two_attempts_makes_the_outcome_unknown(
    server: Server, proxy: FaultProxy, direct: FlowManager, prefix: str, name: str
) -> None:
    """Through the whole stack: the caller gets `OutcomeUnknown`, and nothing is applied twice."""
    flow_id = uuid4()
    verb: Verb = VERBS[name][2] if name in VERBS else lambda m, *_: m.create_managed(**IDENTITY, flow_id=flow_id)
    flow = prepared(direct, FlowStatus.RUNNING) if name in VERBS else None
    lengths: list[int] = []

    def plan(command: list[bytes]) -> Fault:
        call = sent(command)
        if call is None:
            return PASS
        if not call[2]:
            return CUT_REPLY
        for _ in range(3):
            direct.append_event(call[0], "aside")
            direct.update_state(call[0], increment={"aside": 1})
        key = next(key for key in command[3:] if b":events:" in key)
        server.client().xtrim(key, maxlen=4, approximate=False)
        lengths.append(4)
        return PASS

    with FlowManager.from_url(proxy.url, prefix=prefix) as flows:
        proxy.plan = plan
        with pytest.raises(OutcomeUnknown):
            verb(flows, flow, None)  # type: ignore[arg-type]  # creation takes no flow
    assert lengths == [4]
    assert len(direct.list_events(flow_id if flow is None else flow)) == 4


@pytest.mark.parametrize("name", ["update_state", "append_event", "record_step_observation", "mutate"])
def test_a_resend_behind_more_changes_than_the_trail_keeps_is_not_applied(
    proxy: FaultProxy, direct: FlowManager, server: Server, prefix: str, name: str
) -> None:
    """`event_maxlen` has trimmed away what the first attempt left: `OutcomeUnknown`, applied once."""
    status, kind, verb = VERBS[name]
    flow = prepared(direct, status)
    revisions: list[int] = []

    with (
        FlowManager.from_url(server.url, prefix=prefix, event_maxlen=100) as others,
        FlowManager.from_url(proxy.url, prefix=prefix, event_maxlen=100) as flows,
    ):

        def plan(command: list[bytes]) -> Fault:
            call = sent(command)
            if call is None:
                return PASS
            if not call[2]:
                return CUT_REPLY
            for _ in range(250):
                others.append_event(flow, "aside")
            others.update_state(flow, increment={"aside": 1})
            assert kind not in {event.kind for event in direct.iter_events(flow) if event.kind != "state_updated"}
            revisions.append(direct.get(flow).revision)  # type: ignore[union-attr]  # it exists
            return PASS

        verb(flows, prepared(direct, status), None)  # the server has the script: what is cut off is its reply
        proxy.plan = plan
        with pytest.raises(OutcomeUnknown):
            verb(flows, flow, None)
    now = direct.get(flow)
    assert now is not None
    assert [now.revision] == revisions
    assert now.state.get("n") == (5 if name == "update_state" else 0)
    assert {event.kind for event in direct.iter_events(flow)} <= {"aside", "state_updated"}


@pytest.mark.parametrize("name", ["finish", "update_state", "update_and_append"])
def test_the_last_change_of_a_flow_is_known_without_its_event(
    proxy: FaultProxy, direct: FlowManager, server: Server, prefix: str, name: str
) -> None:
    """The flow's own etag tells, however many notes have pushed the event out."""
    status, _, verb = VERBS[name]
    flow = prepared(direct, status)

    with (
        FlowManager.from_url(server.url, prefix=prefix, event_maxlen=100) as others,
        FlowManager.from_url(proxy.url, prefix=prefix, event_maxlen=100) as flows,
    ):

        def plan(command: list[bytes]) -> Fault:
            call = sent(command)
            if call is None:
                return PASS
            if not call[2]:
                return CUT_REPLY
            for _ in range(250):
                others.append_event(flow, "aside")
            return PASS

        verb(flows, prepared(direct, status), None)
        proxy.plan = plan
        outcome = verb(flows, flow, None)
    changed = outcome[0] if isinstance(outcome, tuple) else outcome
    assert changed == direct.get(flow)
    assert changed.revision == flow.revision + 1
    assert {event.kind for event in direct.iter_events(flow)} == {"aside"}


@pytest.mark.parametrize("name", ["update_state", "append_event", "finish"])
def test_a_resend_behind_as_many_changes_as_the_trail_keeps_is_found(
    proxy: FaultProxy, direct: FlowManager, server: Server, prefix: str, name: str
) -> None:
    """The newest `event_maxlen` events are all there: the call answers as it would have."""
    status, kind, verb = VERBS[name]
    flow = prepared(direct, status)
    for _ in range(300):  # so that blocks are there to be dropped
        direct.append_event(flow, "before")

    with (
        FlowManager.from_url(server.url, prefix=prefix, event_maxlen=100) as others,
        FlowManager.from_url(proxy.url, prefix=prefix, event_maxlen=100) as flows,
    ):

        def plan(command: list[bytes]) -> Fault:
            call = sent(command)
            if call is None:
                return PASS
            if not call[2]:
                return CUT_REPLY
            for _ in range(99):
                others.append_event(flow, "aside")
            return PASS

        verb(flows, prepared(direct, status), None)
        proxy.plan = plan
        verb(flows, flow, None)
    assert [event.kind for event in direct.iter_events(flow)].count(kind) == 1


# --- scripts the server does not know ----------------------------------------------------------------------------


def test_a_flush_of_the_script_cache_is_not_noticed(backend: Backend, trail: Trail) -> None:
    """NOSCRIPT: the text is sent instead, once, by single calls and by each call of a batch."""
    flows, flow = trail.flows, trail.flow
    for change in (
        lambda: flows.start_running(flow),
        lambda: flows.append_event(flow, "note"),
        lambda: flows.record_step_observation(StepObservation(flow.id, "run", "task", "running")),
        lambda: flows.finish(flow),
        lambda: flows.delete(flow),
    ):
        backend.raw.script_flush()
        change()
    assert flows.get(flow) is None


def test_a_batch_survives_a_flush_of_the_script_cache(backend: Backend, trail: Trail) -> None:
    """Each call of a tick, and of a prune, is carried out once."""
    flows = trail.flows
    past = datetime.now(UTC) - timedelta(hours=1)
    due = [flows.set_waiting(flows.start_running(flows.create_managed(**IDENTITY)), Timer(at=past)) for _ in range(20)]
    backend.raw.script_flush()
    assert WaitEngine(flows).tick().resumed == 20
    assert {flows.get(flow).status for flow in due} == {FlowStatus.RUNNING}  # type: ignore[union-attr]  # they exist
    for flow in due:
        flows.finish(flow)
    backend.raw.script_flush()
    assert flows.prune_terminal_flows(timedelta(0)) == 20
    assert flows.get_many(due) == [None] * 20


def test_a_batch_whose_reply_is_lost_is_carried_out_once(proxy: FaultProxy, direct: FlowManager, prefix: str) -> None:
    """A tick that resends resumes each flow once, and counts it."""
    past = datetime.now(UTC) - timedelta(hours=1)
    due = [direct.set_waiting(prepared(direct, FlowStatus.RUNNING), Timer(at=past)) for _ in range(20)]
    lost = 0

    def plan(command: list[bytes]) -> Fault:
        nonlocal lost
        call = sent(command)
        if call and call[2] and (flow := direct.get(call[0])) and flow.status is FlowStatus.RUNNING:
            direct.update_state(flow, increment={"aside": 1})  # its first attempt ran: move on
        if call and not call[2] and lost < 1 and call[0] == due[10].id:
            lost += 1
            return CUT_REPLY
        return PASS

    with FlowManager.from_url(proxy.url, prefix=prefix) as flows:
        proxy.plan = plan
        assert WaitEngine(flows).tick().resumed == 20
        for flow in due:
            assert [event.kind for event in direct.iter_events(flow)].count("resumed") == 1
            direct.finish(flow)
        lost = 0
        assert flows.prune_terminal_flows(timedelta(0)) == 20
