"""Operations without a server: what they yield, and what they make of a reply."""

from __future__ import annotations

from collections.abc import Callable, Generator
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

import attrs
import pytest

from redisflow import (
    AlreadyTerminal,
    CancelPending,
    ExternalEvent,
    Flow,
    FlowError,
    FlowExists,
    FlowManager,
    FlowNotFound,
    FlowStatus,
    IllegalTransition,
    InvalidData,
    Manual,
    OutcomeUnknown,
    RevisionMismatch,
    StepObservation,
    StorageError,
    Timer,
)
from redisflow.calls import Call, Read
from redisflow.ops.follow import Watch
from redisflow.ops.namespace import is_drawn, op_id_of
from redisflow.ops.upkeep import read_info

FLOW_ID = UUID(int=5)
HASH: dict[bytes, bytes] = {
    b"controller_id": b"c",
    b"goal": b"g",
    b"owner_session_key": b"o",
    b"requester_origin": b"r",
    b"current_step": b"s",
    b"status": b"running",
    b"revision": b"3",
    b"etag": b"e" * 32,
    b"created_at": b"1700000000000000",
    b"updated_at": b"1700000000000000",
    b"s:n": b"1",
}
IDENTITY: dict[str, Any] = {"controller_id": "c", "goal": "g", "owner_session_key": "o", "requester_origin": "r"}


class Ops(FlowManager):
    """A manager that hands out operations instead of carrying them out."""

    def perform(self, op: Any) -> Any:
        return op


@pytest.fixture
def ops() -> Any:
    """Operations of a namespace of four partitions."""
    manager = Ops.from_url("redis://nowhere", prefix="p", partitions=4)
    manager.namespace.connected(4)
    return manager


class Bringing:
    """Operations whose changes all bring the same operation id."""

    def __init__(self, ops: Any, op_id: Any) -> None:
        self._ops = ops
        self._op_id = op_id

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._ops, name)
        return partial(attribute, op_id=self._op_id) if name in CHANGES else attribute


def flat(**changes: bytes) -> list[bytes]:
    """A flow's hash as HGETALL replies."""
    fields = HASH | {name.encode(): value for name, value in changes.items()}
    return [part for pair in fields.items() for part in pair]


def outcome(op: Generator[Any, Any, Any], *replies: Any) -> Any:
    """What an operation returns after these replies; it must end with the last."""
    next(op)
    for reply in replies[:-1]:
        op.send(reply)
    with pytest.raises(StopIteration) as stop:
        op.send(replies[-1])
    return stop.value.value


def held(ops: Any) -> Flow:
    """A flow as it was read."""
    flow: Flow = outcome(ops.get(FLOW_ID), [flat()])
    return flow


CHANGES: dict[str, Callable[[Any], Any]] = {
    "create_managed": lambda ops: ops.create_managed(**IDENTITY, flow_id=FLOW_ID),
    "create_mirrored": lambda ops: ops.create_mirrored(**IDENTITY, flow_id=FLOW_ID),
    "start_running": lambda ops: ops.start_running(FLOW_ID),
    "set_waiting": lambda ops: ops.set_waiting(FLOW_ID, ExternalEvent("t", "c", deadline=datetime.now(UTC))),
    "resume": lambda ops: ops.resume(FLOW_ID, {"a": 1}),
    "finish": lambda ops: ops.finish(FLOW_ID, {"a": 1}),
    "fail": lambda ops: ops.fail(FLOW_ID, "broken"),
    "request_cancel": lambda ops: ops.request_cancel(FLOW_ID),
    "cancel": lambda ops: ops.cancel(FLOW_ID),
    "update_state": lambda ops: ops.update_state(FLOW_ID, {"a": 1}, increment={"n": 1}, unset=["tmp"]),
    "update_and_append": lambda ops: ops.update_and_append(attrs.evolve(held(ops), current_step="x"), "kind"),
    "append_event": lambda ops: ops.append_event(FLOW_ID, "note"),
    "record_step_observation": lambda ops: ops.record_step_observation(
        StepObservation(FLOW_ID, "run", "task", "running")
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_one_call_whose_keys_share_a_slot(ops: Any, name: str) -> None:
    """One script; every key declared, in the flow's own partition."""
    call = next(CHANGES[name](ops))
    assert isinstance(call, Call)
    partition = ops.namespace.keyspace.partition_of(FLOW_ID)
    assert call.slot == partition.slot
    assert all(key.startswith(b"{%b}:" % partition.tag.encode()) for key in call.keys)
    assert str(FLOW_ID) in call.subject


def argv(call: Call, attempt: bytes = b"") -> tuple[bytes, ...]:
    """The ARGV of an attempt that knows a fence, or knows that an earlier one was applied."""
    return call.command(call.script.source, attempt)[3 + len(call.keys) :]


@pytest.mark.parametrize("name", CHANGES)
def test_every_call_has_an_operation_id_of_its_own(ops: Any, name: str) -> None:
    """16 random bytes as text, in the arguments and for the error; a first attempt looks for nothing."""
    calls = [next(CHANGES[name](ops)) for _ in range(3)]
    assert len({call.op_id for call in calls}) == 3
    for call in calls:
        op, conditions, *rest = argv(call)
        assert op == call.op_id.encode()
        assert len(bytes.fromhex(call.op_id)) == 16
        assert conditions.partition(b"|")[0] == b""
        assert is_drawn(call.op_id)
        assert not call.brought
        assert not call.doubtful
        for attempt in (b"1-1234-0", b"=1234-0"):
            op_again, conditions, *rest_again = argv(call, attempt)
            assert conditions.startswith(attempt + b"|")
            assert (op_again, rest_again) == (op, rest)


@pytest.mark.parametrize("op_id", ["ab" * 16, UUID("ab" * 16), b"\xab" * 16, "AB" * 16])
@pytest.mark.parametrize("name", [name for name in CHANGES if not name.startswith("create")])
def test_an_operation_id_that_is_brought_is_looked_for_at_once(ops: Any, name: str, op_id: Any) -> None:
    """In any of its forms; the first attempt already has the key of the flow's index of such ids, and looks there."""
    call, plain = (next(CHANGES[name](Bringing(ops, brought))) for brought in (op_id, None))
    assert call.op_id == "ab" * 16
    assert (call.brought, call.doubtful) == (True, False)
    member = str(FLOW_ID).encode()
    assert [*call.keys] == [*plain.keys, ops.namespace.keyspace.partition_of(FLOW_ID).seen(member)]
    assert len(argv(call)) == len(argv(plain))


@pytest.mark.parametrize("name", CHANGES)
def test_an_operation_id_of_the_librarys_is_settled_first(ops: Any, name: str) -> None:
    """One that a caller brings back, from an `OutcomeUnknown`: a first attempt may be on its way."""
    call = next(CHANGES[name](Bringing(ops, op_id_of(None))))
    assert (call.brought, call.doubtful, call.in_trail) == (True, True, True)


REFUSALS: list[tuple[list[bytes], type[FlowError], dict[str, Any]]] = [
    ([b"ABSENT"], FlowNotFound, {"flow_id": FLOW_ID}),
    ([b"STALE", b"7"], RevisionMismatch, {"flow_id": FLOW_ID, "expected": 3, "actual": 7}),
    ([b"TERMINAL", b"finished"], AlreadyTerminal, {"flow_id": FLOW_ID, "status": FlowStatus.FINISHED}),
    ([b"PENDING"], CancelPending, {"flow_id": FLOW_ID}),
    (
        [b"ILLEGAL", b"created"],
        IllegalTransition,
        {"flow_id": FLOW_ID, "source": FlowStatus.CREATED, "target": FlowStatus.FINISHED},
    ),
    ([b"UNKNOWN"], OutcomeUnknown, {"op_id": "ab" * 16}),
    ([b"CORRUPT", b"status"], InvalidData, {}),
]


@pytest.mark.parametrize(("reply", "error", "facts"), REFUSALS, ids=lambda value: getattr(value, "__name__", None))
def test_a_refusal_is_the_error_it_stands_for(ops: Any, reply: Any, error: Any, facts: dict[str, Any]) -> None:
    """The tagged reply has what the exception says; nobody reads again."""
    op = ops.finish(FLOW_ID, expected_revision=3, op_id="ab" * 16)
    next(op)
    with pytest.raises(error) as refused:
        op.send(reply)
    assert {name: getattr(refused.value, name) for name in facts} == facts


def test_a_taken_id_is_refused_by_its_creation(ops: Any) -> None:
    """`FlowExists`."""
    op = ops.create_managed(**IDENTITY, flow_id=FLOW_ID)
    next(op)
    with pytest.raises(FlowExists):
        op.send([b"EXISTS", 1])


@pytest.mark.parametrize("is_whole", [0, 1])
def test_who_created_a_flow_is_known_while_its_trail_is_whole(ops: Any, is_whole: int) -> None:
    """A creation that is called again is refused then; of a trimmed trail nobody knows."""
    op = ops.create_managed(**IDENTITY, flow_id=FLOW_ID, op_id="ab" * 16)
    next(op)
    with pytest.raises(FlowExists if is_whole else OutcomeUnknown):
        op.send([b"EXISTS", is_whole])


def test_a_creation_of_a_deleted_flow_finds_none(ops: Any) -> None:
    """`FlowNotFound`: what this operation created is gone."""
    op = ops.create_managed(**IDENTITY, flow_id=FLOW_ID, op_id="ab" * 16)
    next(op)
    with pytest.raises(FlowNotFound):
        op.send([b"DELETED"])


@pytest.mark.parametrize("name", CHANGES)
def test_a_storage_error_passes_through(ops: Any, name: str) -> None:
    """An operation hides no failure of its call."""
    op = CHANGES[name](ops)
    next(op)
    error = StorageError("gone")
    with pytest.raises(StorageError) as raised:
        op.throw(error)
    assert raised.value is error


@pytest.mark.parametrize("name", ["start_running", "resume", "finish", "fail", "cancel", "update_state"])
def test_a_whole_hash_in_the_reply_is_the_flow(ops: Any, name: str) -> None:
    """What the server has, not what the caller held."""
    reply = [b"FLOW", flat(revision=b"9", etag=b"f" * 32), b"5-0", b"9"]
    flow = outcome(CHANGES[name](ops), reply)
    assert (flow.id, flow.revision, flow.etag, flow.state) == (FLOW_ID, 9, "f" * 32, {"n": 1})


# --- reading


def test_a_flow_that_is_not_there_is_none(ops: Any) -> None:
    """An empty hash is no flow."""
    assert outcome(ops.get(FLOW_ID), [[]]) is None
    assert [flow and flow.id for flow in outcome(ops.get_many([FLOW_ID, UUID(int=6)]), [flat(), []])] == [FLOW_ID, None]


def test_nothing_is_asked_where_the_answer_is_known(ops: Any) -> None:
    """A limit below 1 lists nothing, no ids need no reading."""
    for op in (ops.list_events(FLOW_ID, 0), ops.list_events(FLOW_ID, -1), ops.get_many([])):
        with pytest.raises(StopIteration) as stop:
            next(op)
        assert stop.value.value == []


# --- operations of several yields


def test_mutate_reads_again_when_another_writer_won(ops: Any) -> None:
    """Compare, and again from the read; the function sees what is there now, once a try."""
    seen = []

    def fn(flow: Flow) -> Flow:
        seen.append(flow.revision)
        return attrs.evolve(flow, current_step="x")

    op = ops.mutate(FLOW_ID, fn, kind="k", retries=1)
    assert isinstance(next(op), Read)
    first = op.send([flat()])
    assert isinstance(op.send([b"STALE", b"4"]), Read)
    second = op.send([flat(revision=b"4", etag=b"f" * 32)])
    assert (first.op_id != second.op_id, first.slot) == (True, second.slot)
    with pytest.raises(StopIteration) as stop:
        op.send([b"FLOW", flat(revision=b"5"), b"5-0", b"5"])
    assert stop.value.value.revision == 5
    assert seen == [3, 4]


def test_mutate_gives_up_after_its_retries(ops: Any) -> None:
    """The last conflict is raised, with what it met."""
    op = ops.mutate(FLOW_ID, lambda flow: attrs.evolve(flow, current_step="x"), kind="k", retries=2)
    next(op)
    for revision in (4, 5):
        op.send([flat()])
        op.send([b"STALE", b"%d" % revision])
    op.send([flat()])
    with pytest.raises(RevisionMismatch) as conflict:
        op.send([b"STALE", b"6"])
    assert conflict.value.actual == 6


def test_mutate_of_an_expected_revision_never_tries_again(ops: Any) -> None:
    """The caller meant that version, not the next."""
    op = ops.mutate(FLOW_ID, lambda flow: attrs.evolve(flow, current_step="x"), kind="k", expected_revision=3)
    next(op)
    op.send([flat()])
    with pytest.raises(RevisionMismatch):
        op.send([b"STALE", b"4"])


def test_the_guards_of_the_primitive_are_the_servers(ops: Any) -> None:
    """`FlowNotFound` and replay come before `RevisionMismatch`: a wrong expectation is for the script to refuse."""
    flow = attrs.evolve(held(ops), current_step="x")
    op = ops.update_and_append(flow, "kind", expected_revision=99)
    assert isinstance(next(op), Call)
    with pytest.raises(FlowNotFound):
        op.send([b"ABSENT"])


def test_delete_follows_an_id_to_its_new_owner(ops: Any) -> None:
    """Created anew for another owner since the read: read again, with that owner's keys."""
    op = ops.delete(FLOW_ID)
    next(op)
    first = op.send([[b"kate", b"1", b"e" * 32 + b" 1-0-0"]])
    assert isinstance(op.send([b"MOVED"]), Read)
    second = op.send([[b"joe", b"2", b"f" * 32]])
    assert any(key.endswith(b":owner:kate") for key in first.keys)
    assert any(key.endswith(b":owner:joe") for key in second.keys)
    with pytest.raises(StopIteration) as stop:
        op.send([b"OK"])
    assert stop.value.value is True


def test_delete_of_nothing_asks_the_script(ops: Any) -> None:
    """The read says that there is none; a tombstone may say that this very deletion was made."""
    for reply, deleted in (([b"ABSENT"], False), ([b"OK"], True)):
        op = ops.delete(FLOW_ID, op_id="ab" * 16)
        assert isinstance(next(op), Read)
        call = op.send([[None, None, None]])
        assert isinstance(call, Call)
        assert call.in_trail is False
        with pytest.raises(StopIteration) as stop:
            op.send(reply)
        assert stop.value.value is deleted


# --- bad input

LONG = "x" * 1025
BAD: list[Callable[[Any], Any]] = [
    *(lambda ops, bad=bad: ops.start_running(bad) for bad in ("", "not-a-uuid", 7, None, b"x" * 16)),
    *(lambda ops, bad=bad: ops.cancel(FLOW_ID, expected_revision=bad) for bad in (-1, True, 1.0, "1")),
    *(lambda ops, bad=bad: ops.cancel(FLOW_ID, op_id=bad) for bad in ("", "xyz", 7, b"short", "ab" * 17)),
    *(
        lambda ops, name=name, bad=bad: ops.create_managed(**IDENTITY | {name: bad})
        for name in IDENTITY
        for bad in ("", 7, None, "\ud800", "x" * (64 * 1024 + 1))
    ),
    lambda ops: ops.create_managed(**IDENTITY, current_step=LONG),
    lambda ops: ops.create_managed(**IDENTITY, state={"x": "y" * 2**20}),
    lambda ops: ops.create_managed(**IDENTITY, state={1: 2}),
    lambda ops: ops.create_managed(**IDENTITY, state={"\ud800": 2}),
    lambda ops: ops.set_waiting(FLOW_ID, {"kind": "timer"}),
    lambda ops: ops.set_waiting(FLOW_ID, {"kind": "timer", "at": "2026-01-01T00:00:00"}),
    lambda ops: ops.set_waiting(FLOW_ID, {"kind": "timer", "at": "yesterday"}),
    lambda ops: ops.set_waiting(FLOW_ID, {"kind": "timer", "at": 7}),
    lambda ops: ops.set_waiting(FLOW_ID, {"kind": "external_event", "topic": "a\0b", "correlation_id": "c"}),
    lambda ops: ops.set_waiting(FLOW_ID, {"kind": "external_event", "topic": "", "correlation_id": "c"}),
    lambda ops: ops.set_waiting(FLOW_ID, {"kind": "external_event", "topic": "t"}),
    lambda ops: ops.set_waiting(FLOW_ID, {"kind": "manual", "deadline": "2026-01-01"}),
    lambda ops: ops.set_waiting(FLOW_ID, {"kind": ""}),
    lambda ops: ops.set_waiting(FLOW_ID, {}),
    lambda ops: ops.set_waiting(FLOW_ID, None),
    lambda ops: ops.set_waiting(FLOW_ID, Manual),
    lambda ops: ops.set_waiting(FLOW_ID, Timer(at=datetime(2026, 1, 1))),
    lambda ops: ops.fail(FLOW_ID, None),
    lambda ops: ops.fail(FLOW_ID, "\ud800"),
    lambda ops: ops.fail(FLOW_ID, "x" * 2**20),
    lambda ops: ops.finish(FLOW_ID, {"x": float("nan")}),
    lambda ops: ops.resume(FLOW_ID, 2**63),
    *(
        lambda ops, bad=bad: ops.update_state(FLOW_ID, increment=bad)
        for bad in ({"n": 1.0}, {"n": True}, {"n": 2**63}, {1: 1}, ["n"], {"n": None})
    ),
    lambda ops: ops.update_state(FLOW_ID, {"n": 1}, increment={"n": 1}),
    lambda ops: ops.update_state(FLOW_ID, unset="tmp"),
    lambda ops: ops.update_state(FLOW_ID, unset=[1]),
    lambda ops: ops.update_state(FLOW_ID, unset=7),
    lambda ops: ops.update_state(FLOW_ID, next_step=""),
    lambda ops: ops.append_event(FLOW_ID, ""),
    lambda ops: ops.append_event(FLOW_ID, "k", {"x": {1}}),
    lambda ops: ops.record_step_observation({"run_id": "r"}),
    lambda ops: ops.record_step_observation(StepObservation(FLOW_ID, "", "t", "running")),
    lambda ops: ops.record_step_observation(StepObservation(FLOW_ID, "r", "t", "asleep")),
    lambda ops: ops.record_step_observation(StepObservation(FLOW_ID, "r", "t", "running"), runtime="mine"),
    lambda ops: ops.record_step_observation(StepObservation(FLOW_ID, "r", "t", "running", LONG)),
    lambda ops: ops.update_and_append(FLOW_ID, "k"),
    lambda ops: ops.update_and_append(attrs.evolve(held(ops), goal="another"), "k"),
    lambda ops: ops.update_and_append(attrs.evolve(held(ops), status=FlowStatus.WAITING), "k"),
    lambda ops: ops.update_and_append(attrs.evolve(held(ops), status="asleep"), "k"),  # type: ignore[arg-type]  # the input under test
    lambda ops: ops.update_and_append(attrs.evolve(held(ops), state={1: 1}), "k"),
    lambda ops: ops.list_events(FLOW_ID, "many"),
    lambda ops: ops.list_by_status("asleep"),
    lambda ops: ops.list_by_status("running", updated_before=datetime(2026, 1, 1)),
    lambda ops: ops.list_by_owner("o", limit=1.5),
    lambda ops: ops.prune_terminal_flows(timedelta(-1)),
    lambda ops: ops.prune_terminal_flows(7),
    lambda ops: ops.doctor(quiet_after=timedelta(-1)),
    lambda ops: ops.find_step_by_run_id(FLOW_ID, ""),
]


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_bad_input_is_refused_before_anything_is_sent(ops: Any, bad: Callable[[Any], Any]) -> None:
    """`InvalidData`, at the latest in place of the first call."""
    with pytest.raises(InvalidData):
        next(bad(ops))


@pytest.mark.parametrize(
    "damage", [{"revision": None}, {"revision": b"x"}, {"etag": None}, {"etag": b"\xff"}, {"status": None}], ids=str
)
def test_a_copy_that_is_damaged_is_refused_by_name(ops: Any, damage: dict[str, bytes | None]) -> None:
    """Found by `exist_ok`, it has not been looked through; what is done with it says what is wrong."""
    fields = HASH | {name.encode(): value for name, value in damage.items()}
    stored = [part for pair in fields.items() if pair[1] is not None for part in pair]
    (name,) = damage
    flow = outcome(ops.create_managed(**IDENTITY, flow_id=FLOW_ID, exist_ok=True), [b"FLOW", stored])
    with pytest.raises(InvalidData, match=f"{FLOW_ID}.*{name}"):
        outcome(ops.finish(flow, expected_revision=3), [b"CORRUPT", name.encode()])
    with pytest.raises(InvalidData, match=f"{FLOW_ID}.*{name}"):
        outcome(ops.update_and_append(flow, "kind"), [b"CORRUPT", name.encode()])


@pytest.mark.parametrize("reply", [(b"\xff", b"3"), (b"finished", b"x"), (b"sleeping", b"3")])
def test_a_damaged_flow_is_not_watched(ops: Any, reply: tuple[bytes, bytes]) -> None:
    """InvalidData names it, whatever its status and revision are."""
    op = Watch(ops.namespace, FLOW_ID, "0", 0).next_page()
    next(op)
    with pytest.raises(InvalidData, match=str(FLOW_ID)):
        op.send([list(reply), [[b"1-1", [b"rev", b"3", b"kind", b"k", b"op", b"o", b"payload", b"\x80"]]]])


def test_what_the_server_says_of_itself_need_not_be_text() -> None:
    """A path may be any bytes."""
    assert read_info(b"redis_version:7.0.15\r\nconfig_file:/etc/\xff\r\n")["redis_version"] == "7.0.15"
