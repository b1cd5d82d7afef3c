"""A change happens as a whole or not at all, whatever a key holds."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import attrs
import msgpack
import pytest
import redis

from redisflow import ExternalEvent, Flow, FlowError, FlowNotFound, FlowStatus, InvalidData, Timer
from tests.support.subjects import (
    BACKENDS,
    STATE,
    WHO,
    Backend,
    Servers,
    Subject,
    brought_id,
    create,
    drawn_id,
    flow_in,
    observed,
)

if TYPE_CHECKING:
    from redis.typing import EncodableT, FieldT

    from tests.support.servers import Engine

OWNER = WHO["owner_session_key"].encode()
WAIT = ExternalEvent("approvals", "42", deadline=datetime(2020, 1, 1, tzinfo=UTC))
EVERY_STATUS = tuple(f"status:{status}" for status in FlowStatus)


@pytest.fixture(params=[engine for engine in BACKENDS.values() if engine], ids=str)
def subject(request: pytest.FixtureRequest, servers: Servers) -> Iterator[Subject]:
    """The real servers, sync: the scripts are what is tested."""
    engine: Engine = request.param
    backend = Backend.of_server(servers.of(engine))
    subject = Subject(backend, None)
    yield subject
    subject.close()
    backend.raw.close()


def key_of(subject: Subject, flow_id: UUID, name: str) -> bytes:
    """The key a name below stands for."""
    partition, member = subject.keyspace.partition_of(flow_id), str(flow_id).encode()
    if name.startswith("status:"):
        return partition.status(FlowStatus(name.removeprefix("status:")))
    if name == "owner":
        return partition.owner(OWNER)
    if name in {"due", "waiters"}:
        index: bytes = getattr(partition, name)
        return index
    named: Callable[[bytes], bytes] = getattr(partition, name)
    return named(member)


KIND = {"flow": b"hash", "steps": b"hash", "events": b"stream"}
WRONG: dict[bytes, Callable[[redis.Redis, bytes], object]] = {
    b"string": lambda raw, key: raw.set(key, "junk"),
    b"list": lambda raw, key: raw.rpush(key, "junk"),
    b"set": lambda raw, key: raw.sadd(key, "junk"),
    b"hash": lambda raw, key: raw.hset(key, "junk", "junk"),
    b"zset": lambda raw, key: raw.zadd(key, {"junk": 1}),
    b"stream": lambda raw, key: raw.xadd(key, {"junk": "junk"}),
}


def dump(subject: Subject) -> dict[bytes, tuple[bytes | None, bool]]:
    """Every key of the namespace, byte for byte, and whether it expires, as tombstones do."""
    keys = subject.all_keys()
    return {key: (subject.raw.dump(key), int(subject.raw.pttl(key)) > 0) for key in keys}


DELETED = "deleted"  # what an operation begins with, beside the statuses


@attrs.frozen
class Operation:
    """A change, what it starts from, and the keys it touches."""

    begin: str | None
    call: Callable[[Any, Flow], object]
    touches: tuple[str, ...]


FLOW = ("flow", "events")
LEAVING = (*FLOW, "due", "waiters", "status:waiting")
OPERATIONS: dict[str, Operation] = {
    "create_managed": Operation(
        None, lambda flows, flow: create(flows, flow_id=flow.id), (*FLOW, "owner", "status:created")
    ),
    "create_mirrored": Operation(
        None,
        lambda flows, flow: flows.create_mirrored(**WHO, state=STATE, flow_id=flow.id),
        (*FLOW, "owner", "status:running"),
    ),
    "create_managed over a tombstone": Operation(
        DELETED, lambda flows, flow: create(flows, flow_id=flow.id), (*FLOW, "owner", "status:created")
    ),
    "start_running": Operation(
        "created", lambda flows, flow: flows.start_running(flow), (*FLOW, "status:created", "status:running")
    ),
    "start_running again": Operation(
        "waiting", lambda flows, flow: flows.start_running(flow.id), (*LEAVING, "status:running")
    ),
    "set_waiting": Operation(
        "running", lambda flows, flow: flows.set_waiting(flow, WAIT), (*LEAVING, "status:running")
    ),
    "resume": Operation("waiting", lambda flows, flow: flows.resume(flow, {"x": 1}), (*LEAVING, "status:running")),
    "finish": Operation(
        "running", lambda flows, flow: flows.finish(flow.id, {"x": 1}), (*FLOW, "status:running", "status:finished")
    ),
    "fail": Operation(
        "running", lambda flows, flow: flows.fail(flow, "broken"), (*FLOW, "status:running", "status:failed")
    ),
    "fail waiting": Operation("waiting", lambda flows, flow: flows.fail(flow, "broken"), (*LEAVING, "status:failed")),
    "request_cancel": Operation("running", lambda flows, flow: flows.request_cancel(flow), (*FLOW, "status:running")),
    "request_cancel waiting": Operation(
        "waiting", lambda flows, flow: flows.request_cancel(flow), (*FLOW, "due", "status:waiting")
    ),
    "cancel": Operation(
        "created", lambda flows, flow: flows.cancel(flow), (*FLOW, "status:created", "status:cancelled")
    ),
    "cancel waiting": Operation("waiting", lambda flows, flow: flows.cancel(flow.id), (*LEAVING, "status:cancelled")),
    "update_state": Operation(
        "running",
        lambda flows, flow: flows.update_state(
            flow, {"x": 1}, next_step="y", increment={"processed": 1}, unset=["messages"]
        ),
        (*FLOW, "status:running"),
    ),
    "replace the state": Operation(
        "running", lambda flows, flow: flows.update_state(flow.id, [1]), (*FLOW, "status:running")
    ),
    "update_and_append": Operation(
        "running",
        lambda flows, flow: flows.update_and_append(
            attrs.evolve(flow, status=FlowStatus.WAITING, wait=WAIT.to_wire(), state={"x": 1}), "parked"
        ),
        (*LEAVING, "status:running"),
    ),
    "update_and_append in place": Operation(
        "waiting",
        lambda flows, flow: flows.update_and_append(attrs.evolve(flow, wait={"kind": "manual"}), "parked"),
        LEAVING,
    ),
    "mutate": Operation(
        "running",
        lambda flows, flow: flows.mutate(
            flow.id, lambda f: attrs.evolve(f, status=FlowStatus.FINISHED, state=[1]), kind="moved"
        ),
        (*FLOW, "status:running", "status:finished"),
    ),
    "append_event": Operation("running", lambda flows, flow: flows.append_event(flow, "note"), FLOW),
    "record_step_observation": Operation(
        "running", lambda flows, flow: flows.record_step_observation(observed(flow.id)), (*FLOW, "steps")
    ),
    "append_event by a brought id": Operation(
        "running", lambda flows, flow: flows.append_event(flow, "note", op_id=brought_id()), (*FLOW, "seen")
    ),
    "record_step_observation by a brought id": Operation(
        "running",
        lambda flows, flow: flows.record_step_observation(observed(flow.id), op_id=brought_id()),
        (*FLOW, "steps", "seen"),
    ),
    "update_state by a brought id": Operation(
        "running",
        lambda flows, flow: flows.update_state(flow, {"x": 1}, op_id=brought_id()),
        (*FLOW, "status:running", "seen"),
    ),
    "finish by a brought id": Operation(
        "running",
        lambda flows, flow: flows.finish(flow.id, op_id=brought_id()),
        (*FLOW, "status:running", "status:finished", "seen"),
    ),
    "delete": Operation(
        "waiting", lambda flows, flow: flows.delete(flow), ("flow", "owner", "due", "waiters", *EVERY_STATUS)
    ),
    "prune_terminal_flows": Operation(
        "finished", lambda flows, _: flows.prune_terminal_flows(timedelta(0)), ("flow", "owner", "status:finished")
    ),
}
TOUCHED = [(name, key) for name, operation in OPERATIONS.items() for key in operation.touches]


def test_every_kind_of_key_is_touched_by_something() -> None:
    """The table below leaves no kind of key out."""
    assert {key for _, key in TOUCHED} == {"flow", "events", "steps", "seen", "owner", "due", "waiters", *EVERY_STATUS}


def begun(flows: Any, begin: str) -> Flow:
    """Make the flow that an operation begins with."""
    if begin == DELETED:
        flow = flow_in(flows, "created")
        flows.delete(flow)
        return flow
    flow = flow_in(flows, begin, wait=WAIT)
    flows.record_step_observation(observed(flow.id, "earlier"))
    return flow


@pytest.mark.parametrize(("name", "key_name"), TOUCHED)
def test_a_key_of_the_wrong_type_stops_a_change_before_it_begins(subject: Subject, name: str, key_name: str) -> None:
    """Each touched key, of each wrong type: a FlowError, and every key of the namespace as it was."""
    flows, operation = subject.manager(), OPERATIONS[name]
    bystander = flow_in(flows, "waiting", wait=WAIT)
    for wrong, put in WRONG.items():
        if wrong == KIND.get(key_name, b"zset"):
            continue
        if operation.begin is None:
            flow = attrs.evolve(bystander, id=UUID(int=bystander.id.int & ~0xFFFF << 32 | uuid4().int % 2**16 << 32))
        else:
            flow = begun(flows, operation.begin)
        key = key_of(subject, flow.id, key_name)
        kept = subject.raw.dump(key)
        subject.raw.delete(key)
        put(subject.raw, key)
        before = dump(subject)
        if name == "prune_terminal_flows" and key_name in {"flow", "owner"}:
            assert operation.call(flows, flow) == 0  # as a listing does, it logs what is damaged and goes on
        else:
            with pytest.raises(FlowError):
                operation.call(flows, flow)
        assert dump(subject) == before, f"{name} wrote although {key!r} is a {wrong!r}"
        subject.raw.delete(key)
        if kept is not None:
            subject.raw.restore(key, 0, kept)
        if name == "prune_terminal_flows":
            flows.delete(flow)
        if operation.begin is not None:
            flows.delete(flow)
    assert flows.get(bystander.id) == bystander


@pytest.mark.parametrize("name", [name for name, operation in OPERATIONS.items() if "events" in operation.touches])
def test_a_trail_that_takes_no_more_stops_a_change_before_it_begins(subject: Subject, name: str) -> None:
    """Somebody gave it the greatest id there is: a FlowError, and every key of the namespace as it was."""
    flows, operation = subject.manager(), OPERATIONS[name]
    bystander = flow_in(flows, "waiting", wait=WAIT)
    flow = attrs.evolve(bystander, id=UUID(int=bystander.id.int ^ 2**64))
    if operation.begin is not None:
        flow = begun(flows, operation.begin)
    key = key_of(subject, flow.id, "events")
    subject.raw.xadd(key, {"rev": 0, "kind": "note", "op": "0", "payload": b"\xc0"}, id=f"{2**64 - 1}-{2**64 - 1}")
    before = dump(subject)
    with pytest.raises(FlowError):
        operation.call(flows, flow)
    assert dump(subject) == before
    subject.raw.delete(*subject.all_keys())


@pytest.mark.parametrize("key_name", ["events", "steps", "seen"])
def test_deletion_is_whole_whatever_trail_and_steps_are(subject: Subject, key_name: str) -> None:
    """A key that is only removed may be of any type: all of the flow goes, or nothing."""
    flows = subject.manager()
    for wrong, put in WRONG.items():
        flow = flow_in(flows, "waiting", wait=WAIT)
        flows.record_step_observation(observed(flow.id), op_id=brought_id())
        key = key_of(subject, flow.id, key_name)
        if wrong != KIND.get(key_name, b"zset"):
            subject.raw.delete(key)
            put(subject.raw, key)
        assert flows.delete(flow)
        assert subject.only_tombstones_of(flow.id)
        subject.raw.delete(subject.flow_key(flow.id))


@pytest.mark.parametrize("key_name", ["flow", "events", "status:running", "waiters"])
def test_an_engine_leaves_a_broken_flow_as_it_is(
    subject: Subject, key_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A key of the wrong type: nothing half done, nothing raised where others can go on."""
    caplog.set_level(logging.CRITICAL)
    flows = subject.manager()
    flow = flow_in(flows, "waiting", wait=Timer(at=datetime(2020, 1, 1, tzinfo=UTC)))
    key = key_of(subject, flow.id, key_name)
    subject.raw.delete(key)
    subject.raw.set(key, "junk")
    other = flow_in(flows, "waiting", wait=WAIT, flow_id=UUID(int=flow.id.int ^ 1))  # in another partition
    report = subject.engine(flows).tick()
    assert (report.resumed, report.errors) == (1, 1)
    assert flows.get(other.id).status is FlowStatus.RUNNING
    if key_name != "flow":
        assert flows.get(flow.id) == flow


def test_reads_of_a_wrong_type_are_refused(subject: Subject) -> None:
    """InvalidData or StorageError, never the client's own error, and the subject is named."""
    flows = subject.manager()
    flow = create(flows)
    for name, read in {
        "flow": lambda: flows.get(flow.id),
        "events": lambda: flows.list_events(flow),
        "steps": lambda: flows.list_steps(flow),
        "owner": lambda: flows.list_by_owner(WHO["owner_session_key"]),
        "status:created": flows.count_by_status,
    }.items():
        key = key_of(subject, flow.id, name)
        subject.raw.delete(key)
        subject.raw.set(key, "junk")
        with pytest.raises(InvalidData) as refused:
            read()
        assert str(flow.id) in str(refused.value) or subject.prefix in str(refused.value)
        subject.raw.delete(key)


def test_a_flow_of_the_wrong_type_hides_no_other(subject: Subject, caplog: pytest.LogCaptureFixture) -> None:
    """The rest of a listing still comes."""
    caplog.set_level(logging.CRITICAL)
    flows = subject.manager()
    first, broken, last = create(flows), create(flows), create(flows)
    key = subject.flow_key(broken.id)
    subject.raw.delete(key)
    subject.raw.set(key, "junk")
    assert flows.list_by_status("created") == [first, last]
    assert flows.list_by_owner(WHO["owner_session_key"]) == [last, first]


# --- what scripts run ------------------------------------------------------------------------------------


@attrs.frozen
class Run:
    """One run of a script: the keys it was given, and what it had the server do."""

    keys: frozenset[bytes]
    commands: list[list[bytes]] = attrs.field(factory=list)


@contextmanager
def monitored(subject: Subject) -> Iterator[list[Run]]:
    """Every script that ran in the block, as MONITOR tells of it."""
    assert subject.backend.server is not None
    runs: list[Run] = []
    connection: Any = redis.Connection  # redis-py does not annotate it
    monitor = connection(port=subject.backend.server.port)
    monitor.send_command("MONITOR")
    assert monitor.read_response() == b"OK"
    try:
        yield runs
        subject.raw.echo("the end")
        while b"the end" not in (line := monitor.read_response()):
            words = [word.replace(rb"\"", b'"') for word in re.findall(rb'"((?:[^"\\]|\\.)*)"', line)]
            if b" lua] " in line:
                runs[-1].commands.append(words)
            elif words[0] in {b"EVALSHA", b"EVAL"}:
                runs.append(Run(frozenset(words[3 : 3 + int(words[2])])))
    finally:
        monitor.disconnect()


# Those a key can be touched by, and TIME and PUBLISH. None deletes something large at once, as DEL does, or is slow
# with everything there is, as KEYS is. What expires is a tombstone.
KEYED = {
    b"COPY", b"EXISTS", b"HDEL", b"HEXISTS", b"HGET", b"HGETALL", b"HINCRBY", b"HKEYS", b"HLEN", b"HMGET", b"HSET",
    b"PERSIST", b"PEXPIRE", b"RENAME", b"UNLINK", b"XADD", b"XINFO", b"XLEN", b"XRANGE", b"XREVRANGE", b"ZADD",
    b"ZCARD", b"ZRANGE", b"ZREM", b"ZSCORE",
}  # fmt: skip


def settle_in_vain(flows: Any, flow: Flow) -> None:
    """Delete a flow, and have an operation of it settled."""
    flows.delete(flow)
    with pytest.raises(FlowNotFound):
        flows.append_event(flow, "note", op_id=drawn_id())


SEEN: dict[str, Callable[[Any, Flow], object]] = {
    **{name: operation.call for name, operation in OPERATIONS.items()},
    "an op id of the caller's": lambda flows, flow: flows.append_event(flow, "note", op_id="ab" * 16),
    "an op id of the library's": lambda flows, flow: flows.append_event(flow, "note", op_id=drawn_id()),
    "an op id of the library's, of no flow": settle_in_vain,
    "a creation's op id": lambda flows, flow: create(flows, flow_id=flow.id, op_id=next(flows.iter_events(flow)).op_id),
    "a view's reads": lambda flows, flow: flows.for_owner(WHO["owner_session_key"]).list_events(flow),
    "a repair": lambda flows, _: flows.doctor(repair=True),
}


@pytest.mark.parametrize("name", SEEN)
def test_a_script_touches_the_keys_it_declares_and_no_other(subject: Subject, name: str) -> None:
    """Or a cluster would part a flow, and a user's rights end midway. Ids of events are the server's."""
    flows = subject.manager()
    begin = OPERATIONS[name].begin if name in OPERATIONS else "waiting"
    flow = begun(flows, begin or "created")
    if begin is None:
        flows.delete(flow)
        subject.raw.delete(subject.flow_key(flow.id))
    with monitored(subject) as runs:
        SEEN[name](flows, flow)
    assert any(run.commands for run in runs)
    for run in runs:
        for words in run.commands:
            command, *rest = [words[0].upper(), *words[1:]]
            if command in {b"TIME", b"PUBLISH"}:
                continue
            assert command in KEYED
            assert set(keys_in(subject, words)) <= run.keys, f"{name}: {words} without its key declared"
            if command == b"PEXPIRE":
                assert rest[0] == subject.flow_key(flow.id)
                assert subject.raw.hexists(rest[0], "gone")
            if command == b"XADD":
                assert b"*" in rest[: rest.index(b"rev")]


def keys_in(subject: Subject, words: list[bytes]) -> list[bytes]:
    """The keys of a command, as the server sees them."""
    keys: list[str] = subject.raw.execute_command("COMMAND GETKEYS", *words)  # type: ignore[no-untyped-call]  # redis-py's
    return [key.encode() for key in keys]


# --- damaged fields ------------------------------------------------------------------------------------

BOMB = b"\x91" * 100_000 + b"\xc0"
JUNK_VALUES = {
    "a reserved byte": b"\xc1",
    "a cut value": b"\xda\xff\xff",
    "more than one value": b"\xc0\xc0",
    "nothing": b"",
    "nesting without end": BOMB,
    "an array of four billion": b"\xdd\xff\xff\xff\xff",
    "a map of four billion": b"\xdf\xff\xff\xff\xff",
    "an unknown extension": b"\xc7\x03\x05abc",
    "a malformed time": b"\xc7\x03\xffabc",
    "a time beyond all years": b"\xc7\x0c\xff\x00\x00\x00\x00\x7f\xff\xff\xff\xff\xff\xff\xff",
    "broken UTF-8": b"\xa2\xff\xfe",
    "broken UTF-8 in a key": b"\x81\xa1\xff\x01",
    "an int key": b"\x81\x01\x01",
    "a list as a key": b"\x81\x90\x01",
    "an integer beyond 64 bits": b"99999999999999999999",
    "no integer": b"12x",
    "a padded integer": b"007",
    "a spaced integer": b"1 ",
    "a lone minus": b"-",
}
DAMAGE: list[tuple[str, bytes | None]] = [
    *(("s:messages", junk) for junk in JUNK_VALUES.values()),
    ("s", b"\xc1"),
    ("wait", b"\xc1"),
    ("wait", BOMB),
    ("wait", msgpack.packb([1])),
    ("status", b"sleeping"),
    ("status", b"\xff"),
    ("status", None),
    ("revision", b"-1"),
    ("revision", b"1.5"),
    ("revision", b"x"),
    ("revision", b""),
    ("revision", None),
    ("cancel_requested", b"2"),
    ("created_at", b"yesterday"),
    ("created_at", b"9" * 40),
    ("created_at", None),
    ("updated_at", b"1e3"),
    ("updated_at", None),
    ("goal", b"\xff\xfe"),
    ("controller_id", None),
    ("owner_session_key", b"\xff"),
    ("etag", b"\xff"),
    ("etag", None),
    ("current_step", None),
]


def damage(subject: Subject, flow: Flow, field: str, junk: bytes | None) -> None:
    """Write junk into a field of a flow, or remove it."""
    if junk is None:
        subject.raw.hdel(subject.flow_key(flow.id), field)
    else:
        subject.raw.hset(subject.flow_key(flow.id), field, junk)


@pytest.mark.parametrize(("field", "junk"), DAMAGE, ids=lambda value: repr(value[:12]) if value else "absent")
def test_bytes_that_make_no_sense_are_named(
    real_subject: Subject, caplog: pytest.LogCaptureFixture, field: str, junk: bytes | None
) -> None:
    """`get` raises InvalidData naming flow and field; listings leave the flow out and the rest comes."""
    caplog.set_level(logging.CRITICAL)
    flows = real_subject.manager()
    first, broken, last = (flow_in(flows, "waiting", wait=WAIT) for _ in range(3))
    damage(real_subject, broken, field, junk)
    with pytest.raises(InvalidData) as refused:
        flows.get(broken.id)
    assert str(broken.id) in str(refused.value)
    assert field in str(refused.value)
    assert len(str(refused.value)) < 1000
    assert flows.list_by_status("waiting") == [first, last]
    assert list(flows.iter_by_owner(WHO["owner_session_key"], page=1)) == [last, first]


def test_a_state_key_of_broken_text_is_named(real_subject: Subject) -> None:
    """The field's name may be hostile as well."""
    flows = real_subject.manager()
    flow = create(flows)
    real_subject.raw.hset(real_subject.flow_key(flow.id), b"s:\xff", b"1")
    with pytest.raises(InvalidData, match=str(flow.id)):
        flows.get(flow.id)


@pytest.mark.parametrize(("field", "junk"), [d for d in DAMAGE if d[0] in {"status", "revision"}], ids=repr)
@pytest.mark.parametrize("verb", ["cancel", "update_state", "request_cancel"])
def test_a_flow_whose_position_makes_no_sense_is_not_changed(
    real_subject: Subject, verb: str, field: str, junk: bytes | None
) -> None:
    """Without a readable status or revision no guard can hold: InvalidData, nothing written."""
    flows = real_subject.manager()
    flow = flow_in(flows, "waiting", wait=WAIT)
    damage(real_subject, flow, field, junk)
    before = dump(real_subject)
    with pytest.raises(InvalidData, match=field):
        getattr(flows, verb)(flow.id)
    assert dump(real_subject) == before


@pytest.mark.parametrize("field", ["s:messages", "goal", "created_at"])
def test_a_refused_verb_changed_nothing(real_subject: Subject, field: str) -> None:
    """On a flow with a damaged field a verb by id is applied, or refused: never refused and applied."""
    flows = real_subject.manager()
    flow = flow_in(flows, "waiting", wait=WAIT)
    damage(real_subject, flow, field, b"\xff")
    before = dump(real_subject)
    try:
        flows.cancel(flow.id)
    except FlowError:
        assert dump(real_subject) == before
    else:
        assert real_subject.raw.hget(real_subject.flow_key(flow.id), "status") == b"cancelled"


def test_a_damaged_event_is_named(real_subject: Subject) -> None:
    """InvalidData names the flow and the entry."""
    flows = real_subject.manager()
    flow = create(flows)
    key = key_of(real_subject, flow.id, "events")
    damaged: list[dict[FieldT, EncodableT]] = [
        {"junk": "junk"},
        {"rev": "x", "kind": "k", "op": "o", "payload": b"\xc0"},
        {"rev": 1, "kind": b"\xff", "op": "o", "payload": b"\xc0"},
        {"rev": 1, "kind": "k", "op": "o", "payload": BOMB},
    ]
    for fields in damaged:
        entry = real_subject.raw.xadd(key, fields)
        assert isinstance(entry, bytes)
        for read in (lambda: flows.list_events(flow), lambda: list(flows.iter_events(flow))):
            with pytest.raises(InvalidData) as refused:
                read()
            assert str(flow.id) in str(refused.value)
            assert entry.decode() in str(refused.value)
        real_subject.raw.xdel(key, entry)


@pytest.mark.parametrize("junk", [b"", b"short", b"\xc1" * 60, b"\x99" + b"\xc0" * 9, BOMB], ids=len)
def test_a_damaged_step_is_named(real_subject: Subject, junk: bytes) -> None:
    """Reading it is refused, naming the flow; observing it anew is refused or mends it."""
    flows = real_subject.manager()
    flow = create(flows)
    flows.record_step_observation(observed(flow.id))
    key = key_of(real_subject, flow.id, "steps")
    real_subject.raw.hset(key, "cron-42", junk)
    reads: list[Callable[[], object]] = [
        lambda: flows.list_steps(flow),
        lambda: flows.find_step_by_run_id(flow, "cron-42"),
    ]
    for read in reads:
        with pytest.raises(InvalidData, match=str(flow.id)):
            read()
    before = dump(real_subject)
    try:
        step = flows.record_step_observation(observed(flow.id))
    except InvalidData:
        assert dump(real_subject) == before
    else:
        assert flows.list_steps(flow) == [step]
