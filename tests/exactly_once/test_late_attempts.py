"""An attempt that arrives after its call is over changes nothing, whatever became of the call and of the flow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import attrs
import pytest
import redis

from redisflow import (
    AlreadyTerminal,
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
)
from redisflow.codec import OP_DIGITS
from redisflow.ops import records
from tests.support.lua import EVERY_SCRIPT
from tests.support.proxy import CUT_REPLY, CUT_REQUEST, PASS, Fault, FaultProxy, Plan, late
from tests.support.resends import IDENTITY, VERBS, sent, settles
from tests.support.servers import ENGINES, Engine, Server

if TYPE_CHECKING:
    from redisflow.calls import Call
    from redisflow.flow import FlowRef

HELD = late(cut=True)
EVENT = ExternalEvent("t", "c")
AFTER: dict[FlowStatus, Callable[[FlowManager, Flow], Flow]] = {
    FlowStatus.CREATED: lambda _, flow: flow,
    FlowStatus.RUNNING: lambda m, flow: m.start_running(flow),
    FlowStatus.WAITING: lambda m, flow: m.set_waiting(m.start_running(flow), EVENT),
}


@attrs.frozen
class Deed:
    """A change whose attempts come late.

    Attributes:
        status: of the flow before; `None` for a creation.
        call: makes it.
        spoil: what others do so that it is refused, without deleting the flow; `None` if there is no such thing.
        restore: what they do afterwards, so that it would be accepted.
    """

    status: FlowStatus | None
    call: Callable[[FlowManager, Any, str | None], Any]
    spoil: Callable[[FlowManager, UUID], Any] | None = None
    restore: Callable[[FlowManager, UUID], Any] | None = None


SPOILING: dict[str, tuple[Callable[[FlowManager, UUID], Any], Callable[[FlowManager, UUID], Any]]] = {
    "start_running": (lambda m, i: m.start_running(i), lambda m, i: m.set_waiting(i, Manual())),
    "set_waiting": (lambda m, i: m.set_waiting(i, Manual()), lambda m, i: m.resume(i)),
    "resume": (lambda m, i: m.resume(i), lambda m, i: m.set_waiting(i, EVENT)),
    "finish": (lambda m, i: m.set_waiting(i, Manual()), lambda m, i: m.resume(i)),
    "update_state": (lambda m, i: m.update_state(i, {"n": "x"}), lambda m, i: m.update_state(i, {"n": 0})),
    "try_resume_external": (lambda m, i: m.resume(i), lambda m, i: m.set_waiting(i, EVENT)),
}


def created_otherwise(flows: FlowManager, flow_id: UUID) -> Flow:
    """Create the flow by another operation."""
    return flows.create_managed(**IDENTITY, flow_id=flow_id, state={"n": 0})


def creation(method: str) -> Deed:
    """Return the deed of creating a flow."""
    return Deed(
        None,
        lambda m, i, op: getattr(m, method)(**IDENTITY, flow_id=i, state={"mine": 1}, op_id=op),
        created_otherwise,
        lambda m, i: m.delete(i),
    )


CREATIONS = {method: creation(method) for method in ("create_managed", "create_mirrored")}
DEEDS: dict[str, Deed] = {
    **{name: Deed(status, call, *SPOILING.get(name, ())) for name, (status, _, call) in VERBS.items()},
    **CREATIONS,
    "delete": Deed(FlowStatus.RUNNING, lambda m, f, op: m.delete(f, op_id=op)),
}


@attrs.frozen
class Stage:
    """A server, a proxy before it, and a manager of others, who do not go through the proxy.

    Attributes:
        locked: a server that lets nobody in: a call that comes there is given up at once.
    """

    raw: Any
    proxy: FaultProxy
    others: FlowManager
    prefix: str
    locked: Server

    def snapshot(self) -> dict[bytes, Any]:
        """Return all keys of the namespace, with their values, and when they expire."""
        keys = sorted(self.raw.scan_iter(match=f"*{self.prefix}*"))
        return {key: (self._value(key), self.raw.pexpiretime(key)) for key in keys}

    def _value(self, key: bytes) -> Any:
        match self.raw.type(key):
            case b"hash":
                return self.raw.hgetall(key)
            case b"stream":
                facts = self.raw.xinfo_stream(key)
                return self.raw.xrange(key), facts["entries-added"], facts["last-generated-id"]
            case b"zset":
                return self.raw.zrange(key, 0, -1, withscores=True)
        return self.raw.dump(key)

    def without_tombstone(self, flow_key: bytes) -> dict[bytes, Any]:
        """Return the same but for the fence of a deleted flow, and how long it is known."""
        keys = self.snapshot()
        fields, _ = keys[flow_key]
        if b"gone" in fields:
            keys[flow_key] = {**fields, b"etag": fields[b"etag"][:OP_DIGITS]}
        return keys


@pytest.fixture(scope="module")
def own_servers() -> Iterator[Callable[[Engine], Server]]:
    """A server of each engine that is asked for. It knows every script."""
    running: dict[Engine, Server] = {}

    def of(engine: Engine) -> Server:
        if engine not in running:
            running[engine] = Server(engine).__enter__()
            for script in EVERY_SCRIPT:
                running[engine].client().script_load(script.source.text.decode())
        return running[engine]

    yield of
    for server in running.values():
        server.__exit__()


@pytest.fixture(scope="module")
def locked() -> Iterator[Server]:
    """A server that lets nobody in."""
    with Server(ENGINES[0]) as server:
        server.client().config_set("requirepass", "unknown")
        yield server


@pytest.fixture
def stage(own_servers: Callable[[Engine], Server], engine: Engine, prefix: str, locked: Server) -> Iterator[Stage]:
    """A stage for one test."""
    server = own_servers(engine)
    with FlowManager.from_url(server.url, prefix=prefix) as others, FaultProxy(server.port) as proxy:
        yield Stage(server.client(), proxy, others, prefix, locked)


class Case:
    """One call, the flow it is about, and an attempt that is held back."""

    def __init__(self, stage: Stage, name: str, mode: str) -> None:
        self.stage, self.deed = stage, DEEDS[name]
        self.others, self.proxy = stage.others, stage.proxy
        self.flow_id = uuid4()
        self.op_id = "ab" * 16 if mode == "brought" else None
        self._bound, self._fenced = mode == "bound", mode == "fenced"
        self.ref: FlowRef = self.flow_id
        if self.deed.status is not None:
            self.ref = self.create_anew()
        if self._fenced:
            self._fence()

    def _fence(self) -> None:
        """Have the flow settled once, so that the first attempt knows a fence; or leave a tombstone to create over."""
        if self.deed.status is None:
            self.create_anew()
            assert self.others.delete(self.flow_id)
            return
        self.proxy.plan = by_attempt(CUT_REPLY)
        with FlowManager.from_url(self.proxy.url, prefix=self.stage.prefix) as flows:
            flows.append_event(self.flow_id, "before")
        now = self.others.get(self.flow_id)
        assert now is not None
        self.ref = now

    def create_anew(self) -> Flow:
        """Create a flow under the id, in the status from which the change would be accepted."""
        return AFTER[self.deed.status or FlowStatus.CREATED](self.others, created_otherwise(self.others, self.flow_id))

    def spoil(self, *, by_deleting: bool) -> None:
        """Have others change the flow so that the call is refused."""
        if by_deleting:
            assert self.others.delete(self.flow_id)
        else:
            assert self.deed.spoil is not None
            self.deed.spoil(self.others, self.flow_id)

    def restore(self, *, by_deleting: bool) -> None:
        """Have others change it so that the call would be accepted."""
        if by_deleting:
            self.create_anew()
        else:
            assert self.deed.restore is not None
            self.deed.restore(self.others, self.flow_id)

    def call(self, *faults: Fault) -> Any:
        """Make the call through the proxy, its first attempts with these faults. Return its outcome."""
        return self.call_by_plan(self.by_attempt(*faults))

    def by_attempt(self, *faults: Fault) -> Plan:
        """Return a plan with these faults for the first attempts that the flow's fence lets through."""
        plan = by_attempt(*faults)
        return lambda command: PASS if self._is_refused_by_fence(command) else plan(command)

    def _is_refused_by_fence(self, command: list[bytes]) -> bool:
        """Tell whether an attempt knows no fence, though there is one: its caller has no copy of the flow."""
        call = sent(command)
        return self._fenced and call is not None and call[2] == b""

    def call_by_plan(self, plan: Plan, op_id: str | None = None) -> Any:
        """Make the call through the proxy with a plan. Return its outcome."""
        with FlowManager.from_url(self.proxy.url, prefix=self.stage.prefix, deadline_s=60.0) as flows:
            flows.connect()
            self.proxy.plan = plan
            return self._call_by(flows, op_id or self.op_id)

    def _call_by(self, flows: FlowManager, op_id: str | None) -> Any:
        return self.deed.call(flows.for_owner("o") if self._bound else flows, self.ref, op_id)

    def call_and_be_left_in_doubt(self) -> str:
        """Make the call; its first attempt is held back, and the server not reached again. Return its operation id."""
        port = self.proxy.target_port

        def plan(command: list[bytes]) -> Fault:
            if sent(command) is None or self._is_refused_by_fence(command):
                return PASS
            self.proxy.target_port = self.stage.locked.port
            return HELD

        with pytest.raises(OutcomeUnknown) as unknown:
            self.call_by_plan(plan)
        self.proxy.target_port, self.proxy.plan = port, lambda _: PASS
        assert self.op_id in {None, unknown.value.op_id}
        return unknown.value.op_id

    def settle(self, op_id: str) -> Any:
        """Call again by the operation's id, as another process would."""
        return self._call_by(self.others, op_id)

    def change_by_others(self) -> None:
        """Change the flow by whatever it still takes."""
        with suppress(FlowNotFound):
            self.others.append_event(self.flow_id, "aside")
            self.others.record_step_observation(StepObservation(self.flow_id, "aside", "task", "running"))
            with suppress(AlreadyTerminal, CancelPending):
                self.others.update_state(self.flow_id, {"aside": 1})

    def delete(self) -> None:
        """Have others delete the flow, if the call has not."""
        assert self.others.delete(self.flow_id) is (self.deed is not DEEDS["delete"])

    def go_on(self, later: str) -> None:
        """Have others change the flow, delete it, and create it anew."""
        if later == "changed":
            self.change_by_others()
            return
        self.delete()
        if later.startswith("created-anew"):
            self.create_anew()
        if later == "created-anew-and-deleted":
            assert self.others.delete(self.flow_id)

    def assert_that_nothing_changes(self) -> None:
        """Deliver what was held back."""
        assert self.proxy.held == 1
        assert self.proxy.delivered == 0
        before = self._looks()
        self.proxy.deliver()
        assert self.proxy.delivered == 1
        assert self._looks() == before

    def _looks(self) -> dict[bytes, Any]:
        if self.op_id is None:
            return self.stage.snapshot()
        # Whoever asks by an id of his own for a flow that is gone leaves a tombstone with another fence.
        member = str(self.flow_id).encode()
        return self.stage.without_tombstone(self.others.namespace.keyspace.partition_of(self.flow_id).flow(member))


def by_attempt(*faults: Fault) -> Plan:
    """Return a plan: a fault for each attempt of calls, and `PASS` after the last. Reads and settlements pass."""
    left = list(faults)
    return lambda command: left.pop(0) if left and sent(command) is not None else PASS


MODES = ["drawn", "brought", "fenced", "bound"]
TYPICAL = {"update_state", "append_event", "create_managed", "delete"}


def each_of(names: Iterable[str]) -> pytest.MarkDecorator:
    """Have a test run for each of these changes: on one engine by drawn and brought ids; else for those that differ."""
    cases = [
        pytest.param(engine, mode, name, id=f"{engine}-{mode}-{name}")
        for engine in ENGINES
        for mode in (MODES if engine is ENGINES[0] else MODES[:1])
        for name in names
        if name in TYPICAL or (engine is ENGINES[0] and mode in MODES[:2])
    ]
    return pytest.mark.parametrize(("engine", "mode", "name"), cases)


EVERY_DEED = each_of(DEEDS)
SPOILT_IN_PLACE = each_of(name for name, deed in DEEDS.items() if deed.spoil)
OF_A_FLOW = each_of(name for name, deed in DEEDS.items() if deed.status)


@pytest.fixture
def case(stage: Stage, name: str, mode: str) -> Case:
    """One of the changes."""
    return Case(stage, name, mode)


# --- a first attempt that comes late ---------------------------------------------------------------------


@EVERY_DEED
def test_an_attempt_that_nobody_settled_is_applied_when_it_arrives(case: Case) -> None:
    """So what is held back here is what a server executes; its operation's id still settles the call."""
    op_id = case.call_and_be_left_in_doubt()
    before = case.stage.snapshot()
    case.proxy.deliver()
    applied = case.stage.snapshot()
    assert applied != before
    assert case.settle(op_id)
    trail = [event.kind for event in case.others.list_events(case.flow_id) if event.op_id == op_id]
    assert len(trail) == len(set(trail))
    assert bool(trail) is (case.others.get(case.flow_id) is not None)


@EVERY_DEED
@pytest.mark.parametrize("changed", [False, True], ids=["unchanged", "changed"])
def test_after_its_resend_was_applied(case: Case, *, changed: bool) -> None:
    """Whether or not others have changed the flow since."""
    assert case.call(HELD)
    if changed:
        case.change_by_others()
    case.assert_that_nothing_changes()


@SPOILT_IN_PLACE
def test_after_its_resend_was_refused(case: Case) -> None:
    """Its caller was told that nothing changed. By now the flow is such that the change would be accepted."""
    refuse_a_resend(case, by_deleting=False)
    case.restore(by_deleting=False)
    case.assert_that_nothing_changes()


@OF_A_FLOW
def test_after_its_resend_found_no_flow(case: Case) -> None:
    """Its caller was told so. By now there is one again."""
    refuse_a_resend(case, by_deleting=True)
    case.restore(by_deleting=True)
    case.assert_that_nothing_changes()


def refuse_a_resend(case: Case, *, by_deleting: bool) -> None:
    """Hold the first attempt back, and have others spoil the flow before the next."""
    faults = case.by_attempt(HELD)
    spoilt: list[bool] = []

    def plan(command: list[bytes]) -> Fault:
        if (fault := faults(command)) is PASS and sent(command) and case.proxy.held and not spoilt:
            spoilt.append(True)
            case.spoil(by_deleting=by_deleting)
        return fault

    assert_refused(lambda: case.call_by_plan(plan))
    assert spoilt


def assert_refused(call: Callable[[], Any]) -> None:
    """Make a call that changes nothing, and says so."""
    try:
        outcome = call()
    except FlowError as refused:
        assert not isinstance(refused, OutcomeUnknown)  # noqa: PT017 - others return
    else:
        assert outcome in {None, False}


@EVERY_DEED
def test_after_another_process_has_settled_it(case: Case) -> None:
    """The caller was left in doubt; its operation's id was used elsewhere, and others have changed the flow."""
    op_id = case.call_and_be_left_in_doubt()
    assert case.settle(op_id)
    case.change_by_others()
    case.assert_that_nothing_changes()
    if case.deed is not DEEDS["delete"]:
        kinds = [event.kind for event in case.others.list_events(case.flow_id) if event.op_id == op_id]
        assert len(kinds) == len(set(kinds)) >= 1


@SPOILT_IN_PLACE
def test_after_another_process_was_refused(case: Case) -> None:
    """That process was told that nothing changed, so nothing may."""
    op_id = case.call_and_be_left_in_doubt()
    case.spoil(by_deleting=False)
    assert_refused(lambda: case.settle(op_id))
    case.restore(by_deleting=False)
    case.assert_that_nothing_changes()


@OF_A_FLOW
def test_after_another_process_found_no_flow(case: Case) -> None:
    """That process was told so; the flow that there is now is another."""
    op_id = case.call_and_be_left_in_doubt()
    case.spoil(by_deleting=True)
    assert_refused(lambda: case.settle(op_id))
    case.restore(by_deleting=True)
    case.assert_that_nothing_changes()


@EVERY_DEED
def test_after_the_flow_was_deleted(case: Case) -> None:
    """Its resend was applied, and the flow deleted."""
    assert case.call(HELD)
    case.delete()
    case.assert_that_nothing_changes()


@EVERY_DEED
@pytest.mark.parametrize("times", [1, 2])
def test_after_the_flow_was_created_anew(case: Case, times: int) -> None:
    """Its resend was applied, and the flow deleted and created anew."""
    assert case.call(HELD)
    case.delete()
    for _ in range(times - 1):
        case.create_anew()
        assert case.others.delete(case.flow_id)
    case.create_anew()
    case.assert_that_nothing_changes()


@EVERY_DEED
def test_after_the_flow_was_created_anew_and_deleted(case: Case) -> None:
    """The tombstone is that of another flow by now."""
    assert case.call(HELD)
    case.delete()
    case.create_anew()
    assert case.others.delete(case.flow_id)
    case.assert_that_nothing_changes()


@OF_A_FLOW
@pytest.mark.parametrize("anew", [False, True], ids=["deleted", "created-anew"])
def test_after_the_flow_was_deleted_and_nobody_settled_it(case: Case, *, anew: bool) -> None:
    """The caller was left in doubt, and others have deleted the flow it was about."""
    case.call_and_be_left_in_doubt()
    assert case.others.delete(case.flow_id)
    if anew:
        case.create_anew()
    case.assert_that_nothing_changes()


# --- a resend that comes late ----------------------------------------------------------------------------

LATER = ["changed", "deleted", "created-anew", "created-anew-and-deleted"]


@EVERY_DEED
@pytest.mark.parametrize("first", [CUT_REQUEST, CUT_REPLY], ids=["not-applied", "applied"])
@pytest.mark.parametrize("later", LATER)
def test_a_resend_that_arrives_after_the_next_one(case: Case, first: Fault, later: str) -> None:
    """Whether it was to apply the change, or to ask for what the first attempt did."""
    assert case.call(first, HELD)
    case.go_on(later)
    case.assert_that_nothing_changes()


# --- a settlement that comes late ------------------------------------------------------------------------


class HoldingASettlement:
    """A plan that holds back the first settlement; other commands are for another plan."""

    def __init__(self, otherwise: Plan) -> None:
        self._otherwise = otherwise
        self.held = 0

    def __call__(self, command: list[bytes]) -> Fault:
        if not settles(command) or self.held:
            return self._otherwise(command)
        self.held += 1
        return HELD


@pytest.mark.parametrize("engine", ENGINES[:1], ids=str)
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "brought"])
@pytest.mark.parametrize("name", DEEDS)
@pytest.mark.parametrize("later", LATER)
def test_a_settlement_that_arrives_after_the_next_one(case: Case, later: str) -> None:
    """It finds another fence than those it was to end."""
    plan = HoldingASettlement(case.by_attempt(CUT_REQUEST))
    assert case.call_by_plan(plan)
    assert plan.held
    case.go_on(later)
    case.assert_that_nothing_changes()


@pytest.mark.parametrize("engine", ENGINES[:1], ids=str)
@pytest.mark.parametrize("mode", ["drawn"])
@pytest.mark.parametrize("name", DEEDS)
def test_a_settlement_by_another_process_that_arrives_late_changes_just_the_fence(case: Case) -> None:
    """It ends whatever fence there is, because it cannot know those of another process. Calls go on all the same."""
    op_id = case.call_and_be_left_in_doubt()
    case.proxy.deliver()
    plan = HoldingASettlement(by_attempt())
    assert case.call_by_plan(plan, op_id)
    assert plan.held
    flow, trail = case.others.get(case.flow_id), case.others.list_events(case.flow_id)
    case.proxy.deliver()
    assert (case.others.get(case.flow_id), case.others.list_events(case.flow_id)) == (flow, trail)
    if flow is None:
        flow = case.create_anew()
    case.others.append_event(flow, "aside", expected_revision=flow.revision)
    if not flow.status.is_terminal:
        assert case.others.cancel(flow, expected_revision=flow.revision).status == "cancelled"


# --- refusals of ids that callers bring ------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_each_refusal_of_a_brought_id_is_told_from_the_one_before(stage: Stage) -> None:
    """However soon it follows: an attempt that knows only of the one before is not applied after it."""
    flow = AFTER[FlowStatus.RUNNING](stage.others, created_otherwise(stage.others, uuid4()))
    op: Any = records.append_event(
        stage.others.namespace, flow.id, "note", None, expected_revision=flow.revision + 1, op_id="ab" * 16
    )
    call: Call = next(op)
    source, note = call.script.source, b""
    for _ in range(100):
        pipe = stage.raw.pipeline(transaction=False)
        for _ in range(2):
            pipe.execute_command(*call.command(source, b"", note))
        first, second = pipe.execute(raise_on_error=False)
        assert first == [b"STALE", b"%d" % flow.revision]
        assert isinstance(second, redis.ResponseError), "it was refused twice under one note"
        code, _, told = str(second).partition(" ")
        assert code == "REFUSED"
        note = told.encode()


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_refusals_do_not_keep_the_index_of_brought_ids_from_being_trimmed(stage: Stage) -> None:
    """Where trails are trimmed, ids of more than an hour ago are removed, two at a time, whatever was refused since."""
    with FlowManager(stage.raw, prefix=stage.prefix, event_maxlen=100) as flows:
        flow = AFTER[FlowStatus.RUNNING](flows, created_otherwise(flows, uuid4()))
        seen = flows.namespace.keyspace.partition_of(flow.id).seen(str(flow.id).encode())
        hours_ago_ms = int(flow.updated_at.timestamp() * 1000) - 2 * 3_600_000
        stage.raw.zadd(seen, {f"{n:032x}": hours_ago_ms + n for n in range(300)})
        with pytest.raises(RevisionMismatch):
            flows.append_event(flow.id, "note", expected_revision=99, op_id="ab" * 16)
        for n in range(10):
            flows.append_event(flow.id, "note", op_id=f"{n:032x}".replace("0", "f"))
        assert stage.raw.zcard(seen) <= 301 + 10 - 2 * 10
