"""A view bound to an owner: other owners' flows are to it, in every way, as if they did not exist."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any
from uuid import UUID, uuid4

import attrs
import pytest

from redisflow import (
    AsyncFlowManager,
    ExternalEvent,
    Flow,
    FlowBatch,
    FlowError,
    FlowExists,
    FlowManager,
    FlowNotFound,
    FlowStatus,
    InvalidData,
    Manual,
    NewFlow,
    PartialFailure,
    RevisionMismatch,
    WaitEngine,
)
from redisflow.calls import Call
from redisflow.ops.namespace import Target
from redisflow.ops.upkeep import _delete_call
from tests.support.subjects import STATE, VERBS, WHO, Subject, brought_id, create, flow_in, observed, source_of, trail

KATE, JOE = WHO["owner_session_key"], "agent:joe"
MARK = "kate-only"

# How each method that takes a flow is called. `test_every_method_is_looked_at` tells of one that is missing.
CALLS: dict[str, Callable[..., Any]] = VERBS | {
    "update_and_append": lambda flows, ref, **o: flows.update_and_append(ref, "sorted", {"by": "date"}, **o),
    "mutate": lambda flows, ref, **o: flows.mutate(
        ref, lambda flow: attrs.evolve(flow, current_step="sort"), kind="sorted", **o
    ),
    "append_event": lambda flows, ref, **o: flows.append_event(ref, "note", {"n": 1}, **o),
    "record_step_observation": lambda flows, ref, **o: flows.record_step_observation(observed(ref), **o),
    "delete": lambda flows, ref, **o: flows.delete(ref, **o),
    "get": lambda flows, ref: flows.get(ref),
    "get_many": lambda flows, ref: flows.get_many([ref, ref]),
    "list_events": lambda flows, ref: (flows.list_events(ref), flows.list_events(ref, 1), flows.list_events(ref, None)),
    "iter_events": lambda flows, ref: [list(flows.iter_events(ref)), list(flows.iter_events(ref, after="0-1"))],
    "list_steps": lambda flows, ref: flows.list_steps(ref),
    "find_step_by_run_id": lambda flows, ref: flows.find_step_by_run_id(ref, "cron-42"),
    "watch": lambda flows, ref: list(flows.watch(ref, after="0-0", timeout=0)),
    "wait_for": lambda flows, ref: flows.wait_for(ref, *FlowStatus, timeout=0),
}
CHANGES = [*VERBS, "update_and_append", "mutate", "append_event", "record_step_observation", "delete"]
# What takes no flow: each has tests of its own.
CREATING = {"create_managed", "create_mirrored", "create_many"}
LISTING = {
    "list_by_owner",
    "iter_by_owner",
    "list_by_status",
    "iter_by_status",
    "count_by_status",
    "prune_terminal_flows",
}
SETTING_UP = {"from_url", "connect", "close", "perform", "batch", "for_owner", "with_durability", "doctor"}


def methods_of(cls: type) -> set[str]:
    """The names of a class's public methods."""
    return {name for name, _ in inspect.getmembers(cls, callable) if not name.startswith("_")}


def test_every_method_is_looked_at() -> None:
    """A method added to the managers must be added here, and a verb added to batches too."""
    assert methods_of(FlowManager) == set(CALLS) | CREATING | LISTING | SETTING_UP
    assert methods_of(FlowBatch) - {"send"} == {*CHANGES, *CREATING} - {"mutate", "delete", "create_many"}
    assert methods_of(WaitEngine) == {"tick", "run", "try_resume_external", "resume_waiters"}


@pytest.fixture
def view(flows: Any) -> Any:
    """The manager as Joe has it."""
    return flows.for_owner(JOE)


def with_records(flows: Any, flow: Flow) -> Flow:
    """Give a flow a step and a note."""
    flows.record_step_observation(observed(flow.id, result=MARK))
    flows.append_event(flow, "note", MARK)
    return flow


def flows_of(flows: Any, owner: str) -> dict[str, Flow]:
    """One flow for each status, a flagged one, and one whose state is no mapping."""
    made: dict[str, Flow] = {
        status: flow_in(
            flows, status, wait=ExternalEvent("approvals", "42"), owner_session_key=owner, state={MARK: MARK}
        )
        for status in FlowStatus
    }
    made["flagged"] = flows.request_cancel(flow_in(flows, "waiting", owner_session_key=owner))
    made["whole"] = flow_in(flows, "running", owner_session_key=owner, state=[MARK])
    return {name: with_records(flows, flow) for name, flow in made.items()}


def outcome(flow_id: UUID, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What a call came to, the flow's id left out."""
    try:
        return "returned", call(*args, **options)
    except FlowError as error:
        facts = {name: value for name, value in vars(error).items() if value != flow_id}
        return type(error), str(error).replace(str(flow_id), "<id>"), facts


def in_form(flow: Flow, form: str) -> Any:
    """A flow as an argument: the copy, its id, or that as text."""
    return {"copy": flow, "id": flow.id, "text": str(flow.id)}[form]


def options_for(name: str, flow: Flow, trail_ops: list[str]) -> list[dict[str, Any]]:
    """How a change can be called: with what is right or wrong of that flow, and under ids that were used on it."""
    if name not in CHANGES:
        return [{}]
    revisions: list[Any] = [None, 0, flow.revision, flow.revision + 1]
    ops: list[Any] = [None, brought_id(), flow.etag, *trail_ops]
    return [{"expected_revision": revision, "op_id": op} for revision, op in product(revisions, ops)]


@pytest.mark.parametrize("name", CALLS)
def test_another_owners_flow_is_as_one_that_does_not_exist(flows: Any, subject: Subject, view: Any, name: str) -> None:
    """Whatever its status, however it is named, whatever else is wrong with the call: the same; and nothing is left."""
    call = CALLS[name]
    mine = flows_of(flows, JOE)
    for flow in mine.values():
        assert view.delete(flow)
    theirs = flows_of(flows, KATE)
    before = subject.snapshot()
    for status, flow in theirs.items():
        absent = mine[status]
        ops = [event.op_id for event in flows.list_events(flow)][-2:]
        for options in options_for(name, flow, ops):
            for form in ("copy",) if name == "update_and_append" else ("copy", "id", "text"):
                found = outcome(flow.id, call, view, in_form(flow, form), **options)
                assert found == outcome(absent.id, call, view, in_form(absent, form), **options)
                assert found[0] is FlowNotFound or found[1] in NOTHING[name]
    assert subject.snapshot() == before


NOTHING: dict[str, list[Any]] = {name: [] for name in CALLS} | {
    "delete": [False],
    "get": [None],
    "get_many": [[None, None]],
    "list_events": [([], [], [])],
    "iter_events": [[[], []]],
    "list_steps": [[]],
    "find_step_by_run_id": [None],
}


@pytest.mark.parametrize("name", [name for name in CALLS if name != "update_and_append"])
def test_a_damaged_flow_of_another_owner_is_not_told_from_none(
    flows: Any, subject: Subject, view: Any, name: str
) -> None:
    """Nor one whose trail was trimmed, or has the wrong type: what is wrong with it is its owner's business."""
    call = CALLS[name]
    damaged = [flow_in(flows, "running") for _ in range(5)]
    subject.raw.hset(subject.flow_key(damaged[0].id), "revision", "many")
    subject.raw.hset(subject.flow_key(damaged[1].id), "status", "asleep")
    subject.raw.hdel(subject.flow_key(damaged[2].id), "owner_session_key")
    for flow, kind in ((damaged[3], "events"), (damaged[4], "steps")):
        partition = subject.keyspace.partition_of(flow.id)
        subject.raw.set(getattr(partition, kind)(str(flow.id).encode()), "of the wrong type")
    subject.raw.delete(subject.keyspace.partition_of(damaged[0].id).events(str(damaged[0].id).encode()))
    before = subject.snapshot()
    for flow in damaged:
        absent = uuid4()
        for options in options_for(name, flow, []):
            found = outcome(flow.id, call, view, flow.id, **options)
            assert found == outcome(absent, call, view, absent, **options)
    assert subject.snapshot() == before


class Ops(FlowManager):
    """A manager that hands out operations instead of carrying them out."""

    def perform(self, op: Any) -> Any:
        return op


@pytest.mark.parametrize("attempt", [b"", b"1-0-0", b"=0-1", b"=<its event>"])
def test_the_scripts_answer_for_another_owners_flow_as_for_none(flows: Any, subject: Subject, attempt: bytes) -> None:
    """Before they look at the fence or for the operation: on a first attempt and a resend, under an id in the trail."""
    ops: Any = Ops.from_url("redis://nowhere", prefix=subject.prefix)
    ops.namespace.connected(16)
    ops = ops.for_owner(JOE)
    theirs, trimmed, absent = flow_in(flows, "running"), flow_in(flows, "running"), create(flows)
    flows.delete(absent)
    subject.raw.xtrim(subject.keyspace.partition_of(trimmed.id).events(str(trimmed.id).encode()), maxlen=1)
    before = subject.snapshot()
    for flow in (theirs, trimmed):
        if attempt.startswith(b"=<"):
            attempt = b"=" + flows.list_events(flow)[0].id.encode()
        for name in CHANGES:
            if name in {"mutate", "delete"}:  # which read before they call
                continue
            for op_id in (None, flow.etag, brought_id()):
                for ref in (flow, absent):
                    call = next(CALLS[name](ops, ref, op_id=op_id, expected_revision=None))
                    assert send(subject, call, attempt) == [b"ABSENT"]
        deletion = [
            _delete_call(ops.namespace, Target.at(ref.id), found_before_deleting(subject, flow), flow.etag)
            for ref in (flow, absent)
        ]
        answers = [send(subject, call, attempt) for call in deletion]
        # Only a settlement finds what was applied, and to this caller none finds anything.
        assert answers == [[b"OK"] if attempt.startswith(b"=") else [b"ABSENT"]] * 2
    assert subject.snapshot() == before


def found_before_deleting(subject: Subject, flow: Flow) -> list[bytes | None]:
    """Return what a deletion reads first, as a caller who is not bound to an owner reads it."""
    stored: Any = subject.raw.hmget(subject.flow_key(flow.id), "owner_session_key", "created_at", "fence")
    return list(stored)


def send(subject: Subject, call: Call, attempt: bytes) -> Any:
    """Run a script by hand."""
    raw: Any = subject.backend.node_of(call.slot)
    source = call.script.source if subject.backend.fake is None else call.script.plain
    return raw.execute_command(*call.command(source, attempt, text=True))


def test_nothing_of_another_owners_flow_leaves_the_server(flows: Any, subject: Subject) -> None:
    """Its owner is compared there: no reply has a byte of it."""
    theirs = flows_of(flows, KATE)
    ids = [str(flow.id).encode() for flow in theirs.values()]
    with subject.rival() as rival:
        replies, exchange = [], rival.connect().exchange

        def spied(packet: Any) -> Any:
            replies.append(exchange(packet))
            return replies[-1]

        rival.connect().exchange = spied  # type: ignore[method-assign]  # what is looked through
        view = rival.for_owner(JOE)
        for name, call in CALLS.items():
            for flow in theirs.values():
                ref = flow if name == "update_and_append" else flow.id
                outcome(flow.id, call, view, ref)
        view.list_by_owner(KATE)
        view.count_by_status()
        view.prune_terminal_flows(timedelta(0))
        for status in FlowStatus:
            view.list_by_status(status)
    heard = repr(replies).encode()
    assert b"ABSENT" in heard
    for fact in (MARK.encode(), *ids, *(flow.etag.encode() for flow in theirs.values()), KATE.encode()):
        assert fact not in heard


# --- one's own flows


@pytest.mark.parametrize("name", CALLS)
def test_ones_own_flow_is_as_without_a_view(flows: Any, view: Any, name: str) -> None:
    """Every method does what the manager's does, for a copy, an id and a text; a change again under its op id too."""
    for form in ("copy",) if name == "update_and_append" else ("copy", "id", "text"):
        flow = with_records(flows, flow_in(flows, source_of(name), owner_session_key=JOE))
        ref = in_form(flow, form)
        if name not in CHANGES:
            assert CALLS[name](view, ref) == CALLS[name](flows, ref)
            continue
        op_id = brought_id()
        changed = CALLS[name](view, ref, expected_revision=flow.revision, op_id=op_id)
        if name == "delete":
            assert (changed, flows.get(flow.id)) == (True, None)
            continue
        known = trail(flows, flow)
        assert CALLS[name](view, ref, expected_revision=flow.revision, op_id=op_id) == changed
        if isinstance(changed, Flow):
            assert changed == flows.get(flow.id) == view.get(flow.id)
        assert trail(flows, flow) == known


@pytest.mark.parametrize("verb", VERBS)
def test_ones_own_flow_is_changed_without_conditions_as_well(flows: Any, view: Any, verb: str) -> None:
    """By a current copy, by an old one, by id; and the guards are those of the manager."""
    for form in ("copy", "old copy", "id"):
        flow = flow_in(flows, source_of(verb), owner_session_key=JOE)
        if form == "old copy":
            flows.update_state(flow, {"moved": "on"})
        after = VERBS[verb](view, flow.id if form == "id" else flow)
        assert after == flows.get(flow.id)
        with pytest.raises(RevisionMismatch):
            VERBS[verb](view, flow.id, expected_revision=77)


NAMES = ["|", "a|b", "0|" + "0" * 32, "\0", "a\nb", "%", "agent", "agent:joe|", "{x}", "é", "'\"", "x" * 1024]


@pytest.mark.parametrize("owner", NAMES)
def test_any_name_of_an_owner_is_compared_whole(flows: Any, owner: str) -> None:
    """With the bars that part a script's conditions in it, or another owner's name."""
    view = flows.for_owner(owner)
    mine, theirs = (
        view.create_mirrored(**who()),
        [create(flows, owner_session_key=name) for name in (owner[:-1] or "x", JOE)],
    )
    assert mine.owner_session_key == owner
    assert view.update_state(mine, {"x": 1}, expected_revision=1) == view.get(mine.id)
    assert [event.kind for event in view.list_events(mine)] == ["state_updated", "started", "created"]
    for flow in theirs:
        assert view.get(flow.id) is None
        assert outcome(flow.id, view.cancel, flow)[0] is FlowNotFound


# --- creating


def who(**options: Any) -> dict[str, Any]:
    """What a flow is created with, but for its owner."""
    return {name: value for name, value in WHO.items() if name != "owner_session_key"} | options


def test_a_view_creates_under_its_owner(flows: Any, view: Any) -> None:
    """Named or not; a flow of another owner is refused before anything is sent."""
    made = [
        view.create_managed(**who()),
        view.create_mirrored(**who()),
        view.create_managed(**who(owner_session_key=JOE)),
        *view.create_many([NewFlow(**who()), NewFlow(**who(owner_session_key=JOE))]),
    ]
    assert {flow.owner_session_key for flow in made} == {JOE}
    assert flows.get_many(made) == made
    in_order = sorted(made, key=lambda flow: flow.created_at)  # on a cluster many are created side by side
    assert flows.list_by_owner(JOE)[::-1] == in_order
    for create_one in (view.create_managed, view.create_mirrored, lambda **o: view.create_many([NewFlow(**o)])):
        for owner in (KATE, "", 7):
            with pytest.raises(InvalidData, match="owner_session_key"):
                create_one(**who(owner_session_key=owner))
    assert flows.list_by_owner(KATE) == []


def test_without_a_view_an_owner_must_be_named(flows: Any, subject: Subject) -> None:
    """Nothing is created for nobody."""
    for create_one in (flows.create_managed, flows.create_mirrored, lambda **o: flows.create_many([NewFlow(**o)])):
        with pytest.raises(InvalidData, match="owner_session_key"):
            create_one(**who())
    assert subject.all_keys() == []


@pytest.mark.parametrize("exist_ok", [False, True])
def test_a_taken_id_says_nothing_but_that_it_is_taken(flows: Any, subject: Subject, view: Any, exist_ok: bool) -> None:
    """`FlowExists`, also with `exist_ok` and under the very operation that created it."""
    theirs = flows.create_managed(**WHO, state=STATE)
    before = subject.snapshot()
    for op_id in (None, theirs.etag, brought_id()):
        for method in ("create_managed", "create_mirrored"):
            with pytest.raises(FlowExists) as refused:
                getattr(view, method)(**who(), flow_id=theirs.id, exist_ok=exist_ok, op_id=op_id)
            assert str(refused.value) == str(FlowExists(theirs.id))
    with pytest.raises(PartialFailure) as refused_many:
        view.create_many([NewFlow(**who(), flow_id=theirs.id)], exist_ok=exist_ok)
    assert [str(failure.error) for failure in refused_many.value.failed] == [str(FlowExists(theirs.id))]
    assert subject.snapshot() == before


def test_ones_own_taken_id_is_as_without_a_view(view: Any) -> None:
    """`exist_ok` and a replay answer with the flow; else `FlowExists`."""
    op_id = brought_id()
    flow = view.create_managed(**who(), flow_id=uuid4(), op_id=op_id)
    assert view.create_managed(**who(), flow_id=flow.id, op_id=op_id) == flow
    assert view.create_managed(**who(), flow_id=flow.id, exist_ok=True) == flow
    assert view.create_many([NewFlow(**who(), flow_id=flow.id)], exist_ok=True) == [flow]
    with pytest.raises(FlowExists):
        view.create_managed(**who(), flow_id=flow.id)


# --- listing, counting, pruning


@pytest.fixture
def mixed(flows: Any) -> list[Flow]:
    """Flows of both owners in every status, some of which change again."""
    made = [
        flow_in(flows, status, owner_session_key=owner)
        for _, owner, status in product(range(3), (JOE, KATE), ("created", "running", "waiting", "failed"))
    ]
    for flow in made[::5]:
        if not flow.status.is_terminal:
            flows.update_state(flow, {"x": 1})
    return made


def test_a_view_lists_its_owners_flows_alone(flows: Any, view: Any, mixed: list[Flow]) -> None:
    """In the order and with the bounds of the manager's listings; another owner has no flows."""
    assert len(view.list_by_owner(JOE)) == 12
    assert view.list_by_owner(JOE) == flows.list_by_owner(JOE) == list(view.iter_by_owner(JOE, page=5))
    assert view.list_by_owner(JOE, limit=4) == flows.list_by_owner(JOE, limit=4)
    assert view.list_by_owner(KATE) == view.list_by_owner(KATE, limit=3) == list(view.iter_by_owner(KATE)) == []
    for status in FlowStatus:
        everybodys = flows.list_by_status(status)
        mine = [flow for flow in everybodys if flow.owner_session_key == JOE]
        assert view.list_by_status(status) == mine == list(view.iter_by_status(status, page=2))
        assert view.list_by_status(status, limit=2) == mine[:2]
        assert view.list_by_status(status, limit=0) == []
        assert view.count_by_status()[status] == len(mine)
        for flow in everybodys:
            quiet = [other for other in mine if other.updated_at < flow.updated_at]
            assert view.list_by_status(status, updated_before=flow.updated_at) == quiet


def test_listings_of_a_view_refuse_what_the_managers_do(view: Any) -> None:
    """Its inputs are checked as ever."""
    for bad in (
        lambda: view.list_by_owner(""),
        lambda: view.list_by_owner(KATE, limit="many"),
        lambda: view.list_by_status("asleep"),
        lambda: view.list_by_status("running", updated_before=datetime(2026, 1, 1)),
        lambda: list(view.iter_by_status("running", page=0)),
    ):
        with pytest.raises(InvalidData):
            bad()


def test_a_flow_that_left_a_status_meanwhile_is_left_out(flows: Any, view: Any) -> None:
    """A listing of a view goes by the index as it was when it began, and shows no flow that is elsewhere by now."""
    made = [flow_in(flows, "running", owner_session_key=JOE) for _ in range(6)]
    listing = view.iter_by_status("running", page=2)
    assert next(listing) == made[0]
    flows.finish(made[3])
    after = flows.update_state(made[4], {"x": 1})
    late = flow_in(flows, "running", owner_session_key=JOE)
    assert [flow.id for flow in listing] == [flow.id for flow in (made[1], made[2], after, made[5])]
    assert view.list_by_status("running")[-1] == late


def test_a_view_prunes_its_owners_flows_alone(flows: Any, subject: Subject, view: Any, mixed: list[Flow]) -> None:
    """Those that ended long enough ago, with every key; never a live one."""
    kept = [flow for flow in flows.get_many(mixed) if flow.owner_session_key == KATE or not flow.status.is_terminal]
    assert view.prune_terminal_flows(timedelta(hours=1)) == 0
    assert view.prune_terminal_flows(timedelta(0)) == 3
    assert [flow for flow in flows.get_many(mixed) if flow is not None] == kept
    assert view.prune_terminal_flows(timedelta(0)) == 0
    assert flows.prune_terminal_flows(timedelta(0)) == 3
    gone = {flow.id for flow in mixed} - {flow.id for flow in flows.get_many(mixed) if flow}
    assert len(gone) == 6
    assert all(subject.is_tombstone(flow_id) for flow_id in gone)


# --- batches, engines


@pytest.mark.parametrize("name", sorted({*CHANGES} - {"mutate", "delete"}))
def test_a_batch_of_a_view_knows_its_owners_flows_alone(flows: Any, subject: Subject, view: Any, name: str) -> None:
    """Each verb of it; in asyncio calls that are awaited together are that."""
    mine, theirs = (flow_in(flows, source_of(name), owner_session_key=owner) for owner in (JOE, KATE))
    view = subject.rival().for_owner(JOE)
    before = flows.get(theirs.id), trail(flows, theirs)
    with view.batch() as batch:
        created = batch.create_managed(**who()), batch.create_mirrored(**who())
        taken = batch.create_managed(**who(), flow_id=theirs.id, exist_ok=True)
        refused, done = CALLS[name](batch, theirs), CALLS[name](batch, mine)
    assert {one.result().owner_session_key for one in created} == {JOE}
    assert outcome(theirs.id, taken.result)[0] is FlowExists
    assert outcome(theirs.id, refused.result)[0] is FlowNotFound
    done.result()
    assert len(trail(flows, mine)) == len(before[1]) + 1
    assert (flows.get(theirs.id), trail(flows, theirs)) == before


def test_an_engine_of_a_view_answers_events_and_does_not_tick(flows: Any, subject: Subject, view: Any) -> None:
    """What is due is one index for all owners: only an engine of the manager goes through it."""
    event = ExternalEvent("approvals", "42")
    mine, theirs, other = (
        flow_in(flows, "waiting", wait=event, owner_session_key=owner) for owner in (JOE, KATE, KATE)
    )
    due = flow_in(flows, "waiting", wait=Manual(deadline=datetime.now(UTC)), owner_session_key=JOE)
    before = subject.snapshot()
    engine = subject.engine(view)
    for refused in (engine.tick, lambda: engine.run(0.01)):
        with pytest.raises(InvalidData, match="every owner"):
            refused()
    for op_id in (None, theirs.etag):
        for ref in (theirs, theirs.id):
            assert engine.try_resume_external(ref, "approvals", "42", op_id=op_id) is None
    assert subject.snapshot() == before
    assert [flow.id for flow in engine.resume_waiters("approvals", "42", {"ok": True})] == [mine.id]
    assert flows.get_many([theirs, other]) == [theirs, other]
    assert subject.engine(flows).tick().resumed == 1
    waiting = view.set_waiting(due.id, event)
    assert engine.try_resume_external(waiting, "approvals", "42").status == "running"


# --- what a view is


def test_a_view_of_a_view_is_of_the_same_owner(flows: Any, view: Any) -> None:
    """Another owner's is refused: what narrows once does not widen again."""
    flow = view.for_owner(JOE).create_managed(**who())
    assert view.get(flow.id) == flow
    with pytest.raises(InvalidData, match="agent:kate"):
        view.for_owner(KATE)
    for bad in ("", 7, None, "\ud800", "x" * 1025):
        with pytest.raises(InvalidData):
            flows.for_owner(bad)


def wire_of(manager: Any) -> Any:
    """The connection of a manager, if it has one."""
    return manager._link.wire


def test_a_view_shares_the_connection_and_closes_nothing(subject: Subject) -> None:
    """Whoever of them is used first connects; a view outlives its manager's closing, as the manager does."""
    manager = subject.manager()
    view = manager.for_owner(JOE)
    assert wire_of(manager) is None
    flow = view.create_managed(**who())
    wire = wire_of(manager)
    assert wire is not None
    view.close()
    assert wire_of(manager) is wire
    assert manager.get(flow.id) == flow == view.get(flow.id)
    manager.close()
    assert view.get(flow.id) == flow
    assert wire_of(manager) not in {None, wire}
    manager.close()
    assert manager.get(flow.id) == flow == view.get(flow.id)
    assert type(view) is type(manager)


def test_the_doctor_is_for_all_of_a_namespace(view: Any) -> None:
    """It tells of every flow, and mends them."""
    with pytest.raises(InvalidData, match="view"):
        view.doctor()


def test_a_view_may_be_entered(subject: Subject) -> None:
    """`with`, as for a manager; its end closes nothing."""
    with subject.rival() as manager:
        with manager.for_owner(JOE) as view:
            flow = view.create_managed(**who())
            wire = wire_of(manager)
        assert wire_of(manager) is wire is not None
        assert view.get(flow.id) == flow


async def test_an_asyncio_view_may_be_entered() -> None:
    """`async with`, as for a manager; its end closes nothing."""
    async with AsyncFlowManager.from_url("memory://") as manager:
        async with manager.for_owner(JOE) as view:
            flow = await view.create_managed(**who())
            wire = wire_of(manager)
        assert wire_of(manager) is wire is not None
        assert await view.get(flow.id) == flow


def test_a_server_that_forgot_the_scripts_is_told_them_again(flows: Any, subject: Subject, view: Any) -> None:
    """The reads of a view are scripts too: many at once, and each kind of them."""
    made = [view.create_mirrored(**who()) for _ in range(20)]
    subject.raw.script_flush()
    assert view.get_many(made) == made
    subject.raw.script_flush()
    assert [event.kind for event in view.watch(made[0], after="0-0", timeout=0)] == ["created", "started"]


def test_following_ones_own_flow_hears_what_happens(flows: Any, view: Any) -> None:
    """`watch` blocks and goes on, to the end of the flow."""
    flow = view.create_mirrored(**who())

    def kinds() -> Iterator[str]:
        for event in view.watch(flow, after="0-0", timeout=30):
            if event.kind == "started":
                flows.update_state(flow.id, {"x": 1})
            if event.kind == "state_updated":
                flows.finish(flow.id)
            yield event.kind

    assert list(kinds()) == ["created", "started", "state_updated", "finished"]
    assert view.wait_for(flow, timeout=30).status == "finished"


def test_following_ends_when_the_id_goes_to_another_owner(flows: Any, view: Any) -> None:
    """Deleted, and created anew by another owner: it does not exist any more."""
    flow = view.create_mirrored(**who())
    events = view.watch(flow, after="0-0", timeout=30)
    assert [next(events).kind, next(events).kind] == ["created", "started"]
    flows.delete(flow)
    flows.create_mirrored(**WHO, flow_id=flow.id)
    assert outcome(flow.id, next, events)[0] is FlowNotFound
    assert view.delete(flow) is False
    assert outcome(flow.id, view.update_state, flow, {"x": 1})[0] is FlowNotFound


def test_an_etag_cannot_say_whose_flow_it_is(flows: Any) -> None:
    """The owner stands behind it in what the script is told; an owner's name may be another's with something before."""
    other = flow_in(flows, "running", owner_session_key=f"team|{KATE}")
    view = flows.for_owner(KATE)
    forged = attrs.evolve(other, etag=f"{other.etag}|team", current_step="stolen")
    with pytest.raises((InvalidData, FlowNotFound)):
        view.update_and_append(forged, "note")
    assert flows.get(other.id) == other
