"""Exactly once: replies are lost on real sockets, and every change is there once, reported as it was."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import attrs
import fakeredis
import pytest
import redis

from redisflow import (
    AlreadyTerminal,
    AsyncFlowManager,
    CancelPending,
    ExternalEvent,
    Flow,
    FlowError,
    FlowManager,
    FlowNotFound,
    FlowStatus,
    Manual,
    OutcomeUnknown,
    RevisionMismatch,
    StepObservation,
    StorageError,
    Timer,
    WaitEngine,
    scripts,
)
from redisflow.ops import records
from redisflow.ops.namespace import Namespace
from tests.support.proxy import CUT_REPLY, CUT_REQUEST, DROP, HANG, HANG_REPLY, PASS, Fault, FaultProxy, delay
from tests.support.servers import ENGINES, Server
from tests.support.waiting import wait_until

IDENTITY: dict[str, Any] = {"controller_id": "c", "goal": "g", "owner_session_key": "o", "requester_origin": "r"}
ASIDE_KINDS = {"note", "aside", "step_observed"}  # they leave the revision alone
Step = tuple[str, tuple[Any, ...], dict[str, Any]]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One server that knows every script: a cut reply is then never just a NOSCRIPT."""
    with Server(ENGINES[0]) as server:
        for script in every_script():
            server.client().script_load(script.source.text.decode())
        yield server


def every_script() -> Iterator[scripts.Script]:
    """Each script the library has."""
    yield from (scripts.CREATE, scripts.APPEND_EVENT, scripts.OBSERVE_STEP, scripts.DELETE)
    yield from (transition.script for transition in scripts.TRANSITIONS.values())


@pytest.fixture
def prefix() -> str:
    """A namespace of the test's own."""
    return f"t{uuid4().hex}"


@pytest.fixture
def direct(server: Server, prefix: str) -> Iterator[FlowManager]:
    """A manager that reaches the server without the proxy."""
    with FlowManager.from_url(server.url, prefix=prefix) as flows:
        yield flows


@pytest.fixture
def proxy(server: Server) -> Iterator[FaultProxy]:
    """A proxy before the server, faultless so far."""
    with FaultProxy(server.port) as proxy:
        yield proxy


# --- the storm: whole lives of flows, their replies lost ---------------------------------------------------


def is_quiet(flow_id: UUID) -> bool:
    """Whether nobody but its owner writes to a flow."""
    return bool(flow_id.int >> 64 & 1)


def sent(command: list[bytes]) -> tuple[UUID, bytes, bytes] | None:
    """The flow, the op and the span of a script call, empty on a first attempt; `None` for another command."""
    if command[0] not in {b"EVALSHA", b"EVAL"}:
        return None
    argv = command[3 + int(command[2]) :]
    if len(argv) < 2:
        return None  # the probe at connect
    op, look = argv[0], argv[1].partition(b"|")[0]
    return UUID(command[3].rpartition(b":")[2].decode()), op, bytes(filter(bytes([*b"0123456789"]).__contains__, look))


@attrs.define
class Ledger:
    """What was acknowledged, flow by flow, from whichever side it was done."""

    kinds: dict[UUID, Counter[str]] = attrs.field(factory=lambda: defaultdict(Counter))
    added: Counter[UUID] = attrs.field(factory=Counter)
    added_aside: Counter[UUID] = attrs.field(factory=Counter)
    deleted: set[UUID] = attrs.field(factory=set)


class Storm:
    """A plan that loses replies, and lets another writer in before a resend arrives."""

    def __init__(self, direct: FlowManager, ledger: Ledger, faults: Callable[[bool], Fault]) -> None:
        self._direct, self._ledger, self._faults = direct, ledger, faults
        self._turn = 0
        self.lost: set[bytes] = set()
        self.moved_on: set[bytes] = set()

    def __call__(self, command: list[bytes]) -> Fault:
        call = sent(command)
        if call is None:
            return PASS
        flow_id, op, span = call
        if span and not is_quiet(flow_id) and self._write_aside(flow_id):
            self.moved_on.add(op)
        fault = self._faults(bool(span))
        if fault is CUT_REPLY:
            self.lost.add(op)
        return fault

    def _write_aside(self, flow_id: UUID) -> bool:
        self._turn += 1
        try:
            if self._turn % 5:
                self._direct.update_state(flow_id, increment={"aside": 1})
            else:
                self._direct.append_event(flow_id, "aside")
        except (FlowNotFound, AlreadyTerminal, CancelPending):
            return False
        self._ledger.kinds[flow_id]["state_updated" if self._turn % 5 else "aside"] += 1
        self._ledger.added_aside[flow_id] += bool(self._turn % 5)
        return True


def life(  # noqa: C901, PLR0912, PLR0915 - one life, told in order
    chance: random.Random, ledger: Ledger
) -> Generator[Step, Any, None]:
    """One flow from creation to its end: yields calls, is resumed with what they gave."""
    flow_id = UUID(int=chance.getrandbits(128))
    quiet, kinds = is_quiet(flow_id), ledger.kinds[flow_id]
    mirrored = chance.random() < 0.3
    flow = yield (
        "create_mirrored" if mirrored else "create_managed",
        (),
        IDENTITY | {"flow_id": flow_id, "state": {"n": 0, "keep": [1]}},
    )
    assert flow.id == flow_id
    kinds.update(["created", "started"] if mirrored else ["created"])

    def ref() -> Any:
        return chance.choice([flow, flow_id, str(flow_id)])

    def options() -> dict[str, Any]:
        return {"expected_revision": flow.revision} if quiet and chance.random() < 0.5 else {}

    for _ in range(chance.randrange(4, 14)):
        if flow.status is FlowStatus.CREATED:
            flow = yield "start_running", (ref(),), options()
            kinds["started"] += 1
            continue
        if flow.status is FlowStatus.WAITING and chance.random() < 0.6:
            flow = yield "resume", (ref(), {"approved": chance.random()}), options()
            kinds["resumed"] += 1
            continue
        match chance.choice(["add", "add", "patch", "wait", "note", "step", "rewrite", "mutate"]):
            case "add":
                delta = chance.randrange(-50, 50)
                flow = yield "update_state", (ref(),), {"increment": {"n": delta}, **options()}
                kinds["state_updated"] += 1
                ledger.added[flow_id] += delta
            case "patch":
                patch = {"big": "x" * chance.randrange(2000)}
                flow = yield "update_state", (ref(), patch), {"next_step": "s", "unset": ["tmp"], **options()}
                kinds["state_updated"] += 1
            case "wait" if flow.status is FlowStatus.RUNNING:
                later = datetime.now(UTC) + timedelta(hours=1)
                wait = chance.choice([Manual(), Timer(at=later), ExternalEvent("t", "c", deadline=later)])
                flow = yield "set_waiting", (ref(), wait), options()
                kinds["waiting"] += 1
            case "note":
                event = yield "append_event", (ref(), "note", {"x": 1}), options()
                assert event.kind == "note"
                kinds["note"] += 1
            case "step":
                observation = StepObservation(flow_id, f"run-{chance.randrange(3)}", "task", "running")
                yield "record_step_observation", (observation,), options()
                kinds["step_observed"] += 1
            case "rewrite":
                try:
                    changed = attrs.evolve(flow, state={**flow.state, "rewritten": chance.random()})
                    flow, event = yield "update_and_append", (changed, "rewritten"), {}
                    assert event.kind == "rewritten"
                    kinds["rewritten"] += 1
                except RevisionMismatch:
                    assert not quiet, "a conflict reported against one's own write"
                    flow = yield "get", (flow_id,), {}
            case "mutate":
                flow = yield (
                    "mutate",
                    (flow_id, lambda seen: attrs.evolve(seen, state={**seen.state, "m": 1})),
                    {"kind": "mutated", "retries": 1000},
                )
                kinds["mutated"] += 1

    endings = ["cancel", "request_cancel"]
    if flow.status is FlowStatus.RUNNING:
        endings += ["finish", "finish"]
    if flow.status is not FlowStatus.CREATED:
        endings += ["fail"]
    match chance.choice(endings):
        case "finish":
            flow = yield "finish", (ref(), {"summary": "done"}), options()
            kinds["finished"] += 1
        case "fail":
            flow = yield "fail", (ref(), "broken"), options()
            kinds["failed"] += 1
        case "request_cancel":
            flow = yield "request_cancel", (ref(),), options()
            kinds["cancel_requested"] += 1
            assert flow.cancel_requested
            flow = yield "cancel", (ref(),), options()
            kinds["cancelled"] += 1
        case "cancel":
            flow = yield "cancel", (ref(),), options()
            kinds["cancelled"] += 1
    assert flow.status.is_terminal
    if chance.random() < 0.1:
        assert (yield "delete", (ref(),), options()) is True
        ledger.deleted.add(flow_id)


def live(flows: FlowManager, script: Generator[Step, Any, None]) -> None:
    """Carry a life out."""
    try:
        name, args, options = next(script)
        while True:
            try:
                outcome = getattr(flows, name)(*args, **options)
            except FlowError as error:
                name, args, options = script.throw(error)
            else:
                name, args, options = script.send(outcome)
    except StopIteration:
        pass


async def live_async(flows: AsyncFlowManager, script: Generator[Step, Any, None]) -> None:
    """Carry a life out in asyncio."""
    try:
        name, args, options = next(script)
        while True:
            try:
                outcome = await getattr(flows, name)(*args, **options)
            except FlowError as error:
                name, args, options = script.throw(error)
            else:
                name, args, options = script.send(outcome)
    except StopIteration:
        pass


def audit(flows: FlowManager, ledger: Ledger) -> None:
    """Hold the trails against what was acknowledged: nothing is missing, nothing is there twice."""
    for flow_id, kinds in ledger.kinds.items():
        flow, events = flows.get(flow_id), list(flows.iter_events(flow_id))
        if flow_id in ledger.deleted:
            assert flow is None
            assert events == []
            continue
        assert flow is not None
        assert Counter(event.kind for event in events) == kinds
        revisions = [event.revision for event in events if event.kind not in ASIDE_KINDS]
        assert revisions == list(range(flow.revision + 1))
        once = events[1:] if events[1].kind == "started" and events[1].op_id == events[0].op_id else events
        assert max(Counter(event.op_id for event in once).values()) == 1
        assert flow.state["n"] == ledger.added[flow_id]
        assert flow.state.get("aside", 0) == ledger.added_aside[flow_id]


def losing_replies(chance: random.Random) -> Callable[[bool], Fault]:
    """Nearly every first reply is lost, and some of those to resends."""
    return lambda resend: CUT_REPLY if chance.random() < (0.2 if resend else 0.9) else PASS


def test_no_thread_of_a_storm_of_lost_replies_sees_a_change_missing_doubled_or_refused(
    proxy: FaultProxy, direct: FlowManager, prefix: str
) -> None:
    """A change whose reply was lost is applied once and reported as done, whoever wrote meanwhile."""
    ledger, chance = Ledger(), random.Random(1)
    storm = proxy.plan = Storm(direct, ledger, losing_replies(chance))
    lives = [life(random.Random(seed), ledger) for seed in range(125)]
    with FlowManager.from_url(proxy.url, prefix=prefix) as flows, ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(live, flows, script) for script in lives]:
            done.result()
    audit(direct, ledger)
    assert len(storm.lost) >= 1000
    assert len(storm.moved_on) >= 300


async def test_no_task_of_a_storm_of_lost_replies_sees_a_change_missing_doubled_or_refused(
    proxy: FaultProxy, direct: FlowManager, prefix: str
) -> None:
    """The same in asyncio."""
    ledger, chance = Ledger(), random.Random(2)
    storm = proxy.plan = Storm(direct, ledger, losing_replies(chance))
    async with AsyncFlowManager.from_url(proxy.url, prefix=prefix) as flows, asyncio.TaskGroup() as tasks:
        for seed in range(125):
            tasks.create_task(live_async(flows, life(random.Random(1000 + seed), ledger)))
    audit(direct, ledger)
    assert len(storm.lost) >= 1000
    assert len(storm.moved_on) >= 300


def mixed(chance: random.Random) -> Callable[[bool], Fault]:
    """Every kind of fault; waits for what never comes are rare, because each costs a socket timeout."""
    kinds = [CUT_REPLY] * 6 + [CUT_REQUEST] * 6 + [DROP] * 6 + [delay(0.02)] * 6 + [HANG, HANG_REPLY]
    return lambda resend: chance.choice(kinds) if chance.random() < (0.3 if resend else 0.7) else PASS


def test_cut_requests_drops_delays_and_hangs_double_nothing_in_threads(
    proxy: FaultProxy, direct: FlowManager, prefix: str
) -> None:
    """Whether the lost attempt ran or not, its resend ends in one application."""
    ledger, chance = Ledger(), random.Random(3)
    proxy.plan = Storm(direct, ledger, mixed(chance))
    url = f"{proxy.url}?socket_timeout=0.5"
    with FlowManager.from_url(url, prefix=prefix) as flows, ThreadPoolExecutor(8) as pool:
        lives = [life(random.Random(2000 + seed), ledger) for seed in range(24)]
        for done in [pool.submit(live, flows, script) for script in lives]:
            done.result()
    audit(direct, ledger)
    assert proxy.faults.keys() == {"cut_reply", "cut_request", "drop", "delay", "hang", "hang_reply"}


async def test_cut_requests_drops_delays_and_hangs_double_nothing_in_tasks(
    proxy: FaultProxy, direct: FlowManager, prefix: str
) -> None:
    """The same in asyncio."""
    ledger, chance = Ledger(), random.Random(4)
    proxy.plan = Storm(direct, ledger, mixed(chance))
    url = f"{proxy.url}?socket_timeout=0.5"
    async with AsyncFlowManager.from_url(url, prefix=prefix) as flows, asyncio.TaskGroup() as tasks:
        for seed in range(24):
            tasks.create_task(live_async(flows, life(random.Random(3000 + seed), ledger)))
    audit(direct, ledger)
    assert proxy.faults.keys() == {"cut_reply", "cut_request", "drop", "delay", "hang", "hang_reply"}


# --- the outcome unknown, and settled ------------------------------------------------------------------------

Verb = Callable[[FlowManager, Flow, str | None], Any]
VERBS: dict[str, tuple[FlowStatus, str, Verb]] = {
    "start_running": (FlowStatus.CREATED, "started", lambda m, f, op: m.start_running(f, op_id=op)),
    "set_waiting": (FlowStatus.RUNNING, "waiting", lambda m, f, op: m.set_waiting(f, Manual(), op_id=op)),
    "resume": (FlowStatus.WAITING, "resumed", lambda m, f, op: m.resume(f, {"a": 1}, op_id=op)),
    "finish": (FlowStatus.RUNNING, "finished", lambda m, f, op: m.finish(f, {"a": 1}, op_id=op)),
    "fail": (FlowStatus.RUNNING, "failed", lambda m, f, op: m.fail(f, "broken", op_id=op)),
    "cancel": (FlowStatus.WAITING, "cancelled", lambda m, f, op: m.cancel(f, op_id=op)),
    "request_cancel": (FlowStatus.RUNNING, "cancel_requested", lambda m, f, op: m.request_cancel(f, op_id=op)),
    "update_state": (
        FlowStatus.RUNNING,
        "state_updated",
        lambda m, f, op: m.update_state(f, {"a": 1}, increment={"n": 5}, op_id=op),
    ),
    "update_and_append": (
        FlowStatus.RUNNING,
        "rewritten",
        lambda m, f, op: m.update_and_append(attrs.evolve(f, current_step="s"), "rewritten", op_id=op),
    ),
    "mutate": (
        FlowStatus.RUNNING,
        "mutated",
        lambda m, f, op: m.mutate(f.id, lambda seen: attrs.evolve(seen, current_step="s"), kind="mutated", op_id=op),
    ),
    "append_event": (FlowStatus.RUNNING, "note", lambda m, f, op: m.append_event(f, "note", op_id=op)),
    "record_step_observation": (
        FlowStatus.RUNNING,
        "step_observed",
        lambda m, f, op: m.record_step_observation(StepObservation(f.id, "run", "task", "running"), op_id=op),
    ),
    "try_resume_external": (
        FlowStatus.WAITING,
        "resumed",
        lambda m, f, op: WaitEngine(m).try_resume_external(f.id, "t", "c", {"x": 1}, op_id=op),
    ),
}


def prepared(flows: FlowManager, status: FlowStatus) -> Flow:
    """A flow in that status; a waiting one waits for an event."""
    flow = flows.create_managed(**IDENTITY, state={"n": 0})
    if status is not FlowStatus.CREATED:
        flow = flows.start_running(flow)
    return flows.set_waiting(flow, ExternalEvent("t", "c")) if status is FlowStatus.WAITING else flow


def gone_after(fault: Fault) -> Callable[[list[bytes]], Fault]:
    """Give the fault to the first script; nothing gets through from then on."""
    gone = False

    def plan(command: list[bytes]) -> Fault:
        nonlocal gone
        if gone:
            return CUT_REQUEST
        gone = sent(command) is not None
        return fault if gone else PASS

    return plan


@pytest.mark.parametrize("fault", [CUT_REPLY, CUT_REQUEST], ids=["applied", "not-applied"])
@pytest.mark.parametrize("name", VERBS)
def test_the_op_id_of_an_unknown_outcome_settles_it(
    proxy: FaultProxy, direct: FlowManager, prefix: str, name: str, fault: Fault
) -> None:
    """Applied already, the same verb with that op id answers; not applied, it is applied once."""
    status, kind, verb = VERBS[name]
    flow = prepared(direct, status)
    before = len(direct.list_events(flow))
    with FlowManager.from_url(proxy.url, prefix=prefix, deadline_s=0.2) as flows:
        proxy.plan = gone_after(fault)
        with pytest.raises(OutcomeUnknown) as unknown:
            verb(flows, flow, None)
    op_id = unknown.value.op_id
    assert isinstance(unknown.value, StorageError)
    assert unknown.value.__cause__ is not None
    applied = len(direct.list_events(flow)) - before
    assert applied == (fault is CUT_REPLY)
    if applied:
        direct.append_event(flow, "aside")
        if kind not in {"finished", "failed", "cancelled", "cancel_requested"}:
            direct.update_state(flow, increment={"aside": 1})
    answer = verb(direct, flow, op_id)
    assert answer is not None
    answer = verb(direct, flow, op_id)
    assert answer is not None
    trail = direct.list_events(flow)
    assert [event.kind for event in trail if event.op_id == op_id] == [kind]
    if isinstance(answer, Flow):
        assert answer == direct.get(flow)
    if name == "update_state":
        assert answer.state["n"] == 5


@pytest.mark.parametrize("fault", [CUT_REPLY, CUT_REQUEST], ids=["applied", "not-applied"])
@pytest.mark.parametrize("method", ["create_managed", "create_mirrored"])
@pytest.mark.parametrize("chosen", [True, False], ids=["id-chosen", "id-not-chosen"])
def test_the_op_id_of_an_unknown_creation_settles_it(
    proxy: FaultProxy, direct: FlowManager, prefix: str, *, method: str, fault: Fault, chosen: bool
) -> None:
    """Whoever chose the flow's id, there is one flow in the end, with one trail."""
    options: dict[str, Any] = {**IDENTITY, "flow_id": uuid4() if chosen else None}
    with FlowManager.from_url(proxy.url, prefix=prefix, deadline_s=0.2) as flows:
        proxy.plan = gone_after(fault)
        with pytest.raises(OutcomeUnknown) as unknown:
            getattr(flows, method)(**options)
    flow = getattr(direct, method)(**options, op_id=unknown.value.op_id)
    assert [found.id for found in direct.list_by_owner("o")] == [flow.id]
    assert [event.revision for event in direct.iter_events(flow)] == list(range(flow.revision + 1))


async def test_asyncio_names_an_unknown_outcome_as_well(proxy: FaultProxy, direct: FlowManager, prefix: str) -> None:
    """`OutcomeUnknown` carries the op id, which settles it from another manager."""
    flow = prepared(direct, FlowStatus.RUNNING)
    async with AsyncFlowManager.from_url(proxy.url, prefix=prefix, deadline_s=0.2) as flows:
        proxy.plan = gone_after(CUT_REPLY)
        with pytest.raises(OutcomeUnknown) as unknown:
            await flows.update_state(flow, increment={"n": 1})
    assert direct.update_state(flow, increment={"n": 1}, op_id=unknown.value.op_id).state["n"] == 1


def test_a_server_that_was_never_reached_is_no_unknown_outcome(
    proxy: FaultProxy, direct: FlowManager, prefix: str
) -> None:
    """What was surely not sent was surely not applied: a plain `StorageError`."""
    flow = prepared(direct, FlowStatus.RUNNING)
    with FlowManager.from_url(proxy.url, prefix=prefix, deadline_s=0.2) as flows:
        proxy.plan = lambda _: CUT_REQUEST
        flows.close()
        with pytest.raises(StorageError) as failure:
            flows.start_running(flow)
    assert not isinstance(failure.value, OutcomeUnknown)
    assert direct.get(flow) == flow


def test_a_resent_delete_spares_the_flow_that_was_created_anew(
    proxy: FaultProxy, direct: FlowManager, prefix: str
) -> None:
    """The first attempt deleted one flow; another of the same id is not this operation's to delete."""
    flow = prepared(direct, FlowStatus.RUNNING)

    def plan(command: list[bytes]) -> Fault:
        call = sent(command)
        if call and call[2]:
            direct.create_managed(**IDENTITY, flow_id=flow.id, exist_ok=True)
        return CUT_REPLY if call and not call[2] else PASS

    with FlowManager.from_url(proxy.url, prefix=prefix) as flows:
        proxy.plan = plan
        assert flows.delete(flow) is True
    assert direct.get(flow) is not None


@pytest.mark.parametrize("moved_on", [False, True])
def test_a_first_attempt_that_arrives_after_its_resend_is_not_applied_again(
    server: Server, proxy: FaultProxy, direct: FlowManager, prefix: str, moved_on: bool
) -> None:
    """A packet held up on the way while its resend got through finds its connection closed."""
    flow = prepared(direct, FlowStatus.RUNNING)
    late: list[list[bytes]] = []

    def plan(command: list[bytes]) -> Fault:
        if sent(command) and not late:
            late.append(command)
            return delay(0.6)
        return PASS

    with FlowManager.from_url(f"{proxy.url}?socket_timeout=0.2", prefix=prefix) as flows:
        proxy.plan = plan
        flows.update_state(flow, increment={"n": 1})
        assert late
        if moved_on:
            direct.update_state(flow, increment={"aside": 1})
    wait_until(lambda: not proxy._links, description="the packet held up to arrive, or its connection to be closed")
    after = direct.get(flow)
    assert after is not None
    assert after.state["n"] == 1


# --- the look-back ---------------------------------------------------------------------------------------------


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
        args = [op.encode(), *call.argv(span_ms)[1:]]
        source = call.script.source if self.backend.real else call.script.plain
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


# --- what a server refuses -----------------------------------------------------------------------------------------


@pytest.fixture
def lone() -> Iterator[Server]:
    """A server of the test's own, to be put into any state."""
    with Server(ENGINES[0], "--enable-protected-configs", "local") as server:
        yield server


def refusals(server: Server, code: str) -> int:
    """How many times the server has refused a command with that code."""
    stats: dict[str, Any] = server.client().info("errorstats")
    return int(stats.get(f"errorstat_{code}", {"count": 0})["count"])


def replica_of_nobody(server: Server) -> None:
    """READONLY."""
    server.client().replicaof("127.0.0.1", 1)


def primary_again(server: Server) -> None:
    """Take writes."""
    server.client().replicaof("NO", "ONE")


def unable_to_save(server: Server) -> None:
    """MISCONF: a snapshot cannot take the place of a folder."""
    client = server.client()
    (server.directory / "dump.rdb").mkdir()
    client.config_set("save", "3600 100000")
    client.bgsave()
    wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err", description="a failed save")


def able_to_save(server: Server) -> None:
    """Take writes all the same."""
    server.client().config_set("stop-writes-on-bgsave-error", "no")


def without_replicas(server: Server) -> None:
    """NOREPLICAS."""
    server.client().config_set("min-replicas-to-write", 1)


def content_without_replicas(server: Server) -> None:
    """Take writes all the same."""
    server.client().config_set("min-replicas-to-write", 0)


PASSING = {
    "READONLY": (replica_of_nobody, primary_again),
    "MISCONF": (unable_to_save, able_to_save),
    "NOREPLICAS": (without_replicas, content_without_replicas),
}


@pytest.mark.parametrize("code", PASSING)
def test_a_passing_refusal_is_waited_out_and_is_no_unknown_outcome(lone: Server, code: str) -> None:
    """Refused, so not executed: tried again till the deadline, then a plain `StorageError`, nothing changed."""
    begin, end = PASSING[code]
    with (
        FlowManager.from_url(lone.url) as patient,
        FlowManager.from_url(lone.url, deadline_s=0.1) as hasty,
        ThreadPoolExecutor(1) as pool,
    ):
        flow = prepared(patient, FlowStatus.RUNNING)
        begin(lone)
        with pytest.raises(StorageError, match=code) as refused:
            hasty.update_state(flow, increment={"n": 1})
        assert not isinstance(refused.value, OutcomeUnknown)
        seen = refusals(lone, code)
        assert seen >= 2
        going = pool.submit(patient.update_state, flow, increment={"n": 1})
        wait_until(lambda: refusals(lone, code) >= seen + 2, description="the second try")
        end(lone)
        assert going.result().state["n"] == 1
        assert len(patient.list_events(flow)) == 3


def test_a_read_from_a_replica_without_its_primary_is_waited_out(lone: Server, direct_lone: FlowManager) -> None:
    """MASTERDOWN: a stale answer is no answer."""
    flow = prepared(direct_lone, FlowStatus.RUNNING)
    lone.client().config_set("replica-serve-stale-data", "no")
    replica_of_nobody(lone)
    with ThreadPoolExecutor(1) as pool:
        going = pool.submit(direct_lone.get, flow)
        wait_until(lambda: refusals(lone, "MASTERDOWN") >= 2, description="the second try")
        primary_again(lone)
        assert going.result() == flow


def test_a_server_that_loads_its_data_is_waited_for(lone: Server) -> None:
    """LOADING: neither lost nor refused for good."""
    client = lone.client(socket_timeout=60)
    with FlowManager.from_url(lone.url) as flows, ThreadPoolExecutor(2) as pool:
        flow = prepared(flows, FlowStatus.RUNNING)
        client.mset({f"ballast:{n}": "x" * 5000 for n in range(100)})
        client.config_set("loading-process-events-interval-bytes", 1024)
        client.config_set("key-load-delay", 10_000)  # microseconds a key: a second for all
        loading = pool.submit(client.execute_command, "DEBUG", "RELOAD")
        wait_until(lambda: lone.client().info("persistence")["loading"], description="loading")
        going = pool.submit(flows.update_state, flow, increment={"n": 1})
        assert going.result().state["n"] == 1
        assert loading.result()
    assert refusals(lone, "LOADING") >= 1


def test_a_busy_server_is_waited_for(lone: Server) -> None:
    """BUSY: another connection's script holds the server; it ends, and the call goes through."""
    lone.client().config_set("busy-reply-threshold", 10)
    seen: list[list[bytes]] = []

    def plan(command: list[bytes]) -> Fault:
        seen.append(command)
        return PASS

    with (
        FaultProxy(lone.port, plan) as proxy,
        FlowManager.from_url(lone.url) as direct,
        FlowManager.from_url(proxy.url) as patient,
        FlowManager.from_url(lone.url, deadline_s=0.1) as hasty,
        ThreadPoolExecutor(2) as pool,
    ):
        flow = prepared(direct, FlowStatus.RUNNING)
        endless = pool.submit(lone.client(socket_timeout=60).eval, "while true do end", 0)
        try:
            wait_until(lambda: _is_busy(lone), description="BUSY")
            with pytest.raises(StorageError, match="BUSY") as refused:
                hasty.update_state(flow, increment={"n": 1})
            assert not isinstance(refused.value, OutcomeUnknown)
            going = pool.submit(patient.update_state, flow, increment={"n": 1})
            wait_until(lambda: sum(sent(c) is not None for c in seen) >= 3, description="further tries")
        finally:
            lone.client().script_kill()
        assert going.result().state["n"] == 1
        with pytest.raises(redis.ResponseError):
            endless.result()
        assert len(direct.list_events(flow)) == 3


def _is_busy(server: Server) -> bool:
    try:
        server.client().ping()
    except redis.ResponseError as error:
        return str(error).startswith("BUSY")
    return False


def test_a_server_out_of_memory_refuses_growth_and_lets_work_end(lone: Server) -> None:
    """OOM: creating and growing are refused at once with nothing half done; ending and deleting go on."""
    client = lone.client()
    with FlowManager.from_url(lone.url, deadline_s=60) as flows:
        running = {name: prepared(flows, FlowStatus.RUNNING) for name in ("finish", "fail", "cancel", "delete", "grow")}
        waiting = prepared(flows, FlowStatus.WAITING)
        client.config_set("maxmemory", 1)
        keys, events = client.dbsize(), flows.list_events(running["grow"])
        for growth in (
            lambda: flows.create_managed(**IDENTITY),
            lambda: flows.create_mirrored(**IDENTITY),
            lambda: flows.update_state(running["grow"], {"a": 1}),
            lambda: flows.append_event(running["grow"], "note"),
            lambda: flows.record_step_observation(StepObservation(running["grow"], "run", "task", "running")),
            lambda: flows.set_waiting(running["grow"], Manual()),
        ):
            with pytest.raises(StorageError, match="out of memory") as refused:
                growth()
            assert not isinstance(refused.value, OutcomeUnknown)
        assert client.dbsize() == keys
        assert flows.list_events(running["grow"]) == events
        assert flows.get(running["grow"]) == running["grow"]
        assert flows.finish(running["finish"], {"a": 1}).status == "finished"
        assert flows.fail(running["fail"], "broken").status == "failed"
        assert flows.cancel(running["cancel"]).status == "cancelled"
        assert flows.request_cancel(running["grow"]).cancel_requested
        assert flows.resume(waiting).status == "running"
        assert flows.delete(running["delete"])
        assert flows.prune_terminal_flows(timedelta(0)) == 3


def test_a_manager_connects_to_a_server_out_of_memory_to_end_work(lone: Server, direct_lone: FlowManager) -> None:
    """Whoever comes to cancel, finish or delete must get in."""
    doomed, done, flow = [prepared(direct_lone, FlowStatus.RUNNING) for _ in range(3)]
    lone.client().config_set("maxmemory", 1)
    with FlowManager.from_url(lone.url) as flows:
        assert flows.cancel(doomed.id).status == "cancelled"
        assert flows.finish(done).status == "finished"
        assert flows.delete(flow)


def test_the_engine_goes_on_when_the_server_is_out_of_memory(lone: Server) -> None:
    """A tick resumes and cancels all the same."""
    with FlowManager.from_url(lone.url) as flows:
        past = datetime.now(UTC) - timedelta(hours=1)
        due = flows.set_waiting(prepared(flows, FlowStatus.RUNNING), Timer(at=past))
        unwanted = flows.request_cancel(prepared(flows, FlowStatus.WAITING))
        lone.client().config_set("maxmemory", 1)
        report = WaitEngine(flows).tick()
        assert (report.resumed, report.cancelled, report.errors) == (1, 1, 0)
        assert [flow and flow.status for flow in flows.get_many([due, unwanted])] == ["running", "cancelled"]


@pytest.mark.parametrize(
    ("change", "command"),
    [
        *(("create_managed", command) for command in ("evalsha", "hset", "zadd", "xadd", "time", "xlen", "zcard")),
        *(("resume", command) for command in ("evalsha", "hset", "zadd", "xadd", "time", "zrem", "hdel", "hmget")),
    ],
)
def test_a_user_who_lacks_a_command_is_refused_at_once_with_nothing_half_done(
    lone: Server, direct_lone: FlowManager, command: str, change: str
) -> None:
    """NOPERM, of the call or inside the script: a lasting refusal that names the permission, and no torn flow."""
    flow = prepared(direct_lone, FlowStatus.WAITING)
    client = lone.client()
    client.acl_setuser(
        "kate", enabled=True, reset=True, passwords=["+pw"], keys=["*"], commands=["+@all", f"-{command}"]
    )
    url = lone.url.replace("redis://", "redis://kate:pw@")
    before, events, keys = direct_lone.get(flow), direct_lone.list_events(flow), set(client.keys())
    flows = FlowManager.from_url(url, deadline_s=60)
    arguments: Any = ((flow, {"a": 1}), {}) if change == "resume" else ((), IDENTITY)
    with pytest.raises(StorageError, match=r"permission|ACL") as refused:
        getattr(flows, change)(*arguments[0], **arguments[1])
    assert not isinstance(refused.value, OutcomeUnknown)
    flows.close()
    assert direct_lone.get(flow) == before
    assert direct_lone.list_events(flow) == events
    assert set(client.keys()) == keys


@pytest.fixture
def direct_lone(lone: Server) -> Iterator[FlowManager]:
    """A manager of the test's own server."""
    with FlowManager.from_url(lone.url) as flows:
        yield flows


@pytest.mark.parametrize("credentials", ["", ":wrong@", "nobody:wrong@"])
def test_a_wrong_password_is_refused_at_once(lone: Server, credentials: str) -> None:
    """NOAUTH and WRONGPASS last: one connection, no second try."""
    lone.client().config_set("requirepass", "right")
    with FaultProxy(lone.port) as proxy:
        url = proxy.url.replace("redis://", f"redis://{credentials}")
        with pytest.raises(StorageError) as refused:
            FlowManager.from_url(url, deadline_s=20).create_managed(**IDENTITY)
        assert not isinstance(refused.value, OutcomeUnknown)
        assert isinstance(refused.value.__cause__, redis.RedisError)
        assert proxy.connections == 1


@pytest.mark.parametrize("credentials", ["", ":wrong@"])
async def test_asyncio_is_refused_at_once_too(lone: Server, credentials: str) -> None:
    """The same in asyncio."""
    lone.client().config_set("requirepass", "right")
    with FaultProxy(lone.port) as proxy:
        url = proxy.url.replace("redis://", f"redis://{credentials}")
        flows = AsyncFlowManager.from_url(url, deadline_s=20)
        with pytest.raises(StorageError) as refused:
            await flows.create_managed(**IDENTITY)
        assert not isinstance(refused.value, OutcomeUnknown)
        assert proxy.connections == 1


def test_a_password_changed_meanwhile_is_no_unknown_outcome(lone: Server, direct_lone: FlowManager) -> None:
    """An idle connection that is cut, and a new one refused: at once, and nothing was sent."""
    flow = prepared(direct_lone, FlowStatus.RUNNING)
    admin = lone.client()
    admin.config_set("requirepass", "right")
    with FaultProxy(lone.port) as proxy:
        flows = FlowManager.from_url(proxy.url.replace("redis://", "redis://:right@"), deadline_s=20)
        flows.connect()
        admin.config_set("requirepass", "another")
        proxy.sever()
        wait_until(lambda: len(admin.client_list()) <= 3, description="the proxy's connection to end")
        before = proxy.connections
        with pytest.raises(StorageError):
            flows.update_state(flow, increment={"n": 1})
        assert proxy.connections - before <= 2
        flows.close()


@pytest.mark.parametrize("patient", [True, False])
def test_a_server_with_no_connection_to_spare_is_waited_for(lone: Server, patient: bool) -> None:
    """MAXCLIENTS: nothing ran; a place that becomes free is taken, and none till the deadline is a `StorageError`."""
    admin = lone.client()
    with FlowManager.from_url(lone.url, deadline_s=15 if patient else 0.2) as flows, ThreadPoolExecutor(1) as pool:
        flow = prepared(flows, FlowStatus.RUNNING)
        for connection in admin.client_list():
            if connection["cmd"] != "client|list":
                admin.client_kill(connection["addr"])
        admin.config_set("maxclients", 1)
        rejected = admin.info("stats")["rejected_connections"]
        going = pool.submit(flows.update_state, flow, increment={"n": 1})
        wait_until(
            lambda: going.done() or admin.info("stats")["rejected_connections"] >= rejected + 2,
            description="a second try",
        )
        if patient:
            admin.config_set("maxclients", 100)
            assert going.result().state["n"] == 1
        else:
            with pytest.raises(StorageError):
                going.result()
            admin.config_set("maxclients", 100)
            assert flows.get(flow) == flow
