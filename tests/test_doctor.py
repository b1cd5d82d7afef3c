"""The health check: what it finds, what it mends, and what it leaves alone."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import msgpack
import pytest

from redisflow import FlowManager, FlowStatus, InvalidData, Severity, StorageError, Timer
from redisflow.ops import doctor, findings
from redisflow.ops.findings import KINDS, Findings
from redisflow.ops.namespace import Namespace
from redisflow.ops.server_checks import examine_server
from tests.support.patients import OWNER, SOON, Patient, problems
from tests.support.servers import ENGINES, Server
from tests.support.subjects import Backend, Servers, Subject, create
from tests.support.waiting import wait_until


@pytest.fixture
def patient(subject: Subject, flows: Any) -> Patient:
    """A sound store."""
    return Patient(subject, flows)


# --- a sound store -------------------------------------------------------------------------------------


def test_a_sound_store_is_told_of_in_full(patient: Patient) -> None:
    """Nothing is wrong; flows by status, keys and their memory add up; repairing changes nothing.

    A tombstone takes memory as the hash of a flow does, and is counted with them.
    """
    before = patient.subject.snapshot()
    keys = Counter(key.partition(b"}:")[2].partition(b":")[0].decode() for key in patient.subject.all_keys())
    assert keys["flow"] == sum(patient.flows.count_by_status().values()) + 1
    real = patient.subject.backend.fake is None
    for repair in (False, True):
        diagnosis = patient.diagnose(repair=repair)
        assert problems(diagnosis) == []
        assert diagnosis.mended == {}
        assert diagnosis.severity in {Severity.OK, Severity.INFO}
        assert real or diagnosis.severity is Severity.INFO
        assert patient.subject.snapshot() == before
        assert diagnosis.prefix == patient.subject.prefix
        assert diagnosis.flows == patient.flows.count_by_status()
        assert {usage.kind: usage.keys for usage in diagnosis.memory} == {**dict.fromkeys(doctor._TYPES, 0), **keys}
        assert all((usage.bytes is not None) == (real or usage.keys == 0) for usage in diagnosis.memory)
        assert not any(usage.estimated for usage in diagnosis.memory)


def test_what_fakeredis_cannot_say_is_not_available(flows: Any, subject: Subject) -> None:
    """A real server says everything; of the fake one it is said what could not be looked at."""
    found = {finding.kind: finding for finding in flows.doctor().findings}
    if subject.backend.fake is not None:
        assert set(found) == {"layout", "unavailable"}
        assert found["unavailable"].severity is Severity.INFO
    else:
        assert set(found) == {"server", "eviction", "persistence", "replication", "layout"}
        *_, product, version = found["server"].what.split()  # of a cluster behind the node's port
        engines = {engine.name for engine in ENGINES}
        assert any(f"{product.lower()}-{version}".startswith(engine) for engine in engines)


def test_other_namespaces_are_none_of_its_business(subject: Subject) -> None:
    """Not even one whose prefix begins with this one's."""
    flows, neighbour = subject.manager(), subject.manager(prefix=f"{subject.prefix}2")
    flow = create(neighbour)
    key = neighbour.namespace.keyspace.partition_of(flow.id).status(FlowStatus.CREATED)
    assert subject.raw.zrem(key, str(flow.id)) == 1
    diagnosis = flows.doctor()
    assert problems(diagnosis) == []
    assert sum(usage.keys for usage in diagnosis.memory) == 0
    assert [finding.kind for finding in problems(neighbour.doctor())] == ["missing-entry"]


# --- every kind of damage ------------------------------------------------------------------------------

FOR_42, FOR_43 = b"approvals\0" + b"42\0", b"approvals\0" + b"43\0"

DAMAGES: list[tuple[str, Callable[[Patient], str]]] = [
    ("missing-entry", lambda p: p.strike("finished", "status:finished")),
    ("missing-entry", lambda p: p.strike("created", f"owner:{OWNER.decode()}")),
    ("missing-entry", lambda p: p.strike("timer", "due")),
    ("missing-entry", lambda p: p.strike("deadline", "due")),
    ("missing-entry", lambda p: p.strike("unwanted", "due")),
    ("missing-entry", lambda p: p.strike("event", "waiters", waiting_for=FOR_42)),
    # Of no flow, in each index.
    ("stale-entry", lambda p: p.enlist("absent", "status:running")),
    ("stale-entry", lambda p: p.enlist("absent", "owner:somebody")),
    ("stale-entry", lambda p: p.enlist("absent", "due")),
    ("stale-entry", lambda p: p.enlist("absent", "waiters", waiting_for=FOR_42)),
    # Of one that was deleted, and has left a tombstone.
    ("stale-entry", lambda p: p.enlist("deleted", "status:waiting")),
    ("stale-entry", lambda p: p.enlist("deleted", f"owner:{OWNER.decode()}")),
    ("stale-entry", lambda p: p.enlist("deleted", "due")),
    ("stale-entry", lambda p: p.enlist("deleted", "waiters", waiting_for=FOR_42)),
    # Of a flow that says otherwise.
    ("stale-entry", lambda p: p.enlist("running", "status:failed")),
    ("stale-entry", lambda p: p.enlist("running", "owner:agent:\0}:{")),
    ("stale-entry", lambda p: p.enlist("running", "due")),
    ("stale-entry", lambda p: p.enlist("waiting", "due")),
    ("stale-entry", lambda p: p.enlist("own", "due")),
    ("stale-entry", lambda p: p.enlist("event", "waiters", waiting_for=FOR_43)),
    ("stale-entry", lambda p: p.enlist("failed", "waiters", waiting_for=FOR_42)),
    ("stale-entry", lambda p: p.enlist("event", "waiters")),
    # That can be of no flow.
    ("stale-entry", lambda p: p.scribble(p.key("event", "waiters"), b"\0\xff\0nonsense")),
    ("stale-entry", lambda p: p.scribble(p.key("created", "status:created"), p.member("created").upper()[:-1])),
    ("stale-entry", lambda p: p.scribble(p.key("created", "status:created"), p.member("created").replace(b"-", b""))),
    ("stale-entry", lambda p: p.scribble(p.elsewhere("timer").due, p.member("timer"))),
    ("wrong-score", lambda p: p.enlist("running", "status:running", time.time() * 1_000_000)),
    ("wrong-score", lambda p: p.enlist("cancelled", f"owner:{OWNER.decode()}", float("inf"))),
    ("wrong-score", lambda p: p.enlist("timer", "due", SOON.timestamp() * 1_000_000 + 5)),
    ("wrong-score", lambda p: p.enlist("unwanted", "due", 2**53)),
    ("wrong-score", lambda p: p.enlist("event", "waiters", waiting_for=FOR_42)),
    ("orphan-key", lambda p: p.record("absent", "events")),
    ("orphan-key", lambda p: p.record("absent", "steps")),
    ("orphan-key", lambda p: p.record("absent", "seen")),
    ("orphan-key", lambda p: p.record("deleted", "events")),
    ("orphan-key", lambda p: p.record("deleted", "steps")),
    ("orphan-key", lambda p: p.record("deleted", "seen")),
    ("orphan-key", lambda p: p.overwrite(p.key("running", "scratch"))),
    ("missing-trail", lambda p: p.remove("finished", "events")),
    ("foreign-key", lambda p: p.overwrite(p.key("created", "due") + b"ling:\xff")),
    ("foreign-key", lambda p: p.overwrite(p.key("created", "due") + b":")),
    ("foreign-key", lambda p: p.overwrite(p.key("created", "due")[:-3])),
    ("foreign-key", lambda p: p.overwrite(p.key("created", "due")[:-3] + b"status:asleep")),
    ("foreign-key", lambda p: p.overwrite(p.key("created", "owner:"))),
    ("foreign-key", lambda p: p.overwrite(p.partition("created").flow(b"nonsense"))),
    ("foreign-key", lambda p: p.overwrite(p.elsewhere("timer").flow(p.member("timer")))),
    ("foreign-key", lambda p: p.overwrite(f"{{{p.subject.prefix}:16.0}}:due".encode())),
    ("wrong-type", lambda p: p.overwrite(p.key("absent", "flow"))),
    ("wrong-type", lambda p: p.overwrite(p.key("running", "events"))),
    ("wrong-type", lambda p: p.overwrite(p.key("created", "steps"))),
    ("wrong-type", lambda p: p.overwrite(p.key("created", "seen"))),
    ("wrong-type", lambda p: p.overwrite(p.key("created", "owner:text"))),
    ("wrong-type", lambda p: p.overwrite(p.key("event", "waiters"))),
    ("damaged-flow", lambda p: p.spoil("event", "created_at", "yesterday")),
    ("damaged-flow", lambda p: p.spoil("event", "updated_at", None)),
    ("damaged-flow", lambda p: p.spoil("event", "status", "asleep")),
    ("damaged-flow", lambda p: p.spoil("event", "status", None)),
    ("damaged-flow", lambda p: p.spoil("event", "owner_session_key", None)),
    ("damaged-flow", lambda p: p.spoil("event", "goal", b"\xff")),
    ("damaged-flow", lambda p: p.spoil("event", "revision", "-1")),
    ("damaged-flow", lambda p: p.spoil("event", "s:messages", b"\xc1")),
    ("damaged-flow", lambda p: p.spoil("event", "cancel_requested", "maybe")),
    ("damaged-flow", lambda p: p.spoil("event", "wait", b"\xc1")),
    ("damaged-flow", lambda p: p.spoil("event", "wait", msgpack.packb({"kind": "timer"}))),
    ("damaged-flow", lambda p: p.spoil("timer", "wait", None)),
    ("damaged-flow", lambda p: p.spoil("event", "waiter", None)),
    ("damaged-flow", lambda p: p.spoil("event", "waiter", FOR_43)),
    ("overdue", lambda p: p.make("late", "waiting", wait=Timer(at=datetime.now(UTC) - timedelta(minutes=2)))),
    ("uncancelled", lambda p: p.age("unwanted", int(time.time() - 120) * 1_000_000)),
]  # fmt: skip
MENDABLE = {kind for kind, known in KINDS.items() if known.done}


def test_there_is_damage_of_every_kind() -> None:
    """But for what is no damage."""
    assert {kind for kind, _ in DAMAGES} == KINDS.keys() - {"quiet"}


@pytest.mark.parametrize(("kind", "inflict"), DAMAGES, ids=[f"{kind}-{n}" for n, (kind, _) in enumerate(DAMAGES)])
def test_damage_is_found_as_that_and_nothing_else(
    patient: Patient, kind: str, inflict: Callable[[Patient], str]
) -> None:
    """As often as one looks; then mended where nothing is lost by it, and found no more.

    Flows, trails and steps are the same bytes before and after, whatever it is.
    """
    where = inflict(patient)
    flow_id = patient.ids.get(where)
    damaged, lives = patient.subject.snapshot(), patient.lives()
    diagnosis = patient.diagnose()
    (found,) = problems(diagnosis)
    assert (found.kind, found.flow_id, found.mended) == (kind, flow_id, False)
    assert flow_id is not None or found.key == where
    assert found.advice
    assert diagnosis.left[kind] == 1
    assert diagnosis.severity is found.severity
    assert problems(patient.diagnose()) == [found]
    assert patient.subject.snapshot() == damaged

    diagnosis = patient.diagnose(repair=True)
    (treated,) = problems(diagnosis)
    if kind not in MENDABLE:
        assert treated == found
        assert patient.subject.snapshot() == damaged
        return
    assert diagnosis.mended == {kind: 1}
    assert diagnosis.severity in {Severity.OK, Severity.INFO}
    assert (treated.kind, treated.flow_id, treated.key, treated.mended) == (kind, flow_id, found.key, True)
    assert treated.what == f"{found.what}: {KINDS[kind].done}"
    assert problems(patient.diagnose()) == []
    gone = (found.key or "").encode() if kind == "orphan-key" else b""
    assert patient.lives() == {key: life for key, life in lives.items() if key != gone}


def test_a_flow_whose_hash_is_gone_leaves_an_orphan_and_stale_entries(patient: Patient) -> None:
    """Each of them is found by itself, and afterwards it is as if the flow had been deleted."""
    patient.remove("event", "flow")
    expected = {"orphan-key": 1, "stale-entry": 3}  # of status, owner and waiters
    assert patient.diagnose().left.items() >= expected.items()
    assert patient.diagnose(repair=True).mended == expected
    assert problems(patient.diagnose()) == []
    traces = [key for key, held in patient.subject.snapshot().items() if str(patient.ids["event"]) in f"{key!r}{held}"]
    assert traces == []


def test_what_was_mended_works_again(patient: Patient) -> None:
    """Timers and deadlines pass, an event finds who waits for it, a requested cancel comes."""
    for name in ("timer", "event", "deadline", "unwanted"):
        patient.raw.delete(patient.key(name, "due"), patient.key(name, "waiters"))
    engine = patient.subject.engine(patient.flows)
    assert engine.resume_waiters("approvals", "42") == []
    assert patient.diagnose(repair=True).mended == {"missing-entry": 4}
    assert [flow.id for flow in engine.resume_waiters("approvals", "42")] == [patient.ids["event"]]
    engine.tick(now=SOON + timedelta(seconds=1))
    statuses = [patient.flows.get(patient.ids[name]).status.value for name in ("timer", "deadline", "unwanted")]
    assert statuses == ["running", "running", "cancelled"]
    assert problems(patient.diagnose()) == []


def test_running_flows_that_have_gone_quiet_are_mentioned(patient: Patient) -> None:
    """After a day unless another span is given; that is information, and no reason to be alarmed."""
    assert "quiet" not in patient.diagnose().left
    diagnosis = patient.diagnose(quiet_after=timedelta(0))
    (quiet,) = [finding for finding in diagnosis.findings if finding.kind == "quiet"]
    assert (quiet.flow_id, quiet.severity) == (patient.ids["running"], Severity.INFO)
    assert diagnosis.severity is Severity.INFO


@pytest.mark.parametrize("span", [1, None, timedelta(-1)])
def test_a_span_that_is_none_is_refused(flows: Any, span: Any) -> None:
    """Before anything is looked at."""
    with pytest.raises(InvalidData, match="quiet_after"):
        flows.doctor(quiet_after=span)


def test_a_ruined_store_has_a_report_of_bounded_size(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is wrong is counted, so much of it is kept, and all of it is mended."""
    monkeypatch.setattr(findings, "KEPT", 20)
    patient.raw.zadd(patient.key("created", "due"), {f"junk-{n}": n for n in range(300)})
    for repair in (False, True):
        diagnosis = patient.diagnose(repair=repair)
        assert len(problems(diagnosis)) == 20
        assert (diagnosis.mended if repair else diagnosis.left)["stale-entry"] == 300
    assert problems(patient.diagnose()) == []


def test_an_index_of_many_pages_is_read_to_its_end(patient: Patient) -> None:
    """More entries than one look at a set brings, nearly all of them right."""
    number = patient.partition("created").number
    ids = [UUID(int=16 * n + number) for n in range(400)]
    for flow_id in ids:
        create(patient.flows, owner_session_key="many", flow_id=flow_id)
    assert patient.raw.zcard(patient.key("created", "owner:many")) == len(ids)
    patient.enlist("created", "owner:many", 5)
    assert [finding.flow_id for finding in problems(patient.diagnose())] == [patient.ids["created"]]


# --- the server ----------------------------------------------------------------------------------------

INFO = {
    "redis_version": "7.4.0",
    "maxmemory_policy": "noeviction",
    "maxmemory": "0",
    "maxmemory_human": "0B",
    "aof_enabled": "1",
    "aof_last_write_status": "ok",
    "aof_last_bgrewrite_status": "ok",
    "rdb_last_bgsave_status": "ok",
    "role": "master",
    "connected_slaves": "0",
}
CONFIG = {"save": "", "min-replicas-to-write": "0"}


def said(
    info: dict[str, str] | StorageError, config: dict[str, str] | StorageError = CONFIG, meta: Any = (b"1", b"16")
) -> list[tuple[str, str, str]]:
    """What is made of a server's answers: severity, kind and text of what is not in order."""
    namespace, found = Namespace("p"), Findings()
    namespace.connected(16)
    op: Any = examine_server(namespace, found)
    next(op)
    op.send((None,))
    lines = info if isinstance(info, StorageError) else "".join(f"{k}:{v}\r\n" for k, v in info.items()).encode()
    flat = config if isinstance(config, StorageError) else [part.encode() for pair in config.items() for part in pair]
    op.send([lines, flat])
    with pytest.raises(StopIteration):
        op.send([list(meta)])
    return [(f.severity.value, f.kind, f.what) for f in found.all() if f.severity is not Severity.OK]


TRUNCATING = {"aof-load-truncated": "yes"}
REFUSED = StorageError("CONFIG GET: refused", "NOPERM")


@pytest.mark.parametrize(
    ("info", "config", "expected"),
    [
        ({}, {}, []),
        ({"maxmemory_policy": "allkeys-lru"}, {}, ["error eviction allkeys-lru"]),
        ({"maxmemory_policy": "volatile-ttl", "maxmemory": "9"}, {}, ["info eviction volatile-ttl"]),
        ({"aof_enabled": "0"}, {}, ["warning persistence loses every flow"]),
        ({"aof_enabled": "0"}, {"save": "3600 1"}, ["info persistence snapshots 3600 1"]),
        ({"aof_enabled": "0"}, REFUSED, ["info persistence no append-only file", "info unavailable CONFIG GET"]),
        ({}, REFUSED, ["info unavailable CONFIG GET"]),
        ({"aof_last_write_status": "err"}, {}, ["error persistence append-only"]),
        ({"rdb_last_bgsave_status": "err"}, {}, ["error persistence snapshot"]),
        ({"aof_last_bgrewrite_status": "err"}, {}, ["warning persistence rewrite"]),
        ({"role": "slave", "master_link_status": "up"}, {}, ["warning replication up"]),
        ({"role": "slave", "master_link_status": "down"}, {}, ["error replication down"]),
        ({"connected_slaves": "1", "slave0": "ip=10.0.0.1,port=6379,state=online,lag=0"}, {}, []),
        (
            {"connected_slaves": "1", "slave0": "ip=10.0.0.1,port=6379,state=wait_bgsave,lag=0"},
            {},
            ["warning replication 10.0.0.1:6379 is not online: wait_bgsave"],
        ),
        ({"min_slaves_good_slaves": "1"}, {"min-replicas-to-write": "2"}, ["error replication 1 of 2"]),
        ({"min_slaves_good_slaves": "2"}, {"min-replicas-to-write": "2"}, []),
        ({}, TRUNCATING, ["info persistence half a change"]),
        ({"valkey_version": "9.1.1"}, TRUNCATING, ["info persistence half a change"]),
        ({"valkey_version": "9.1.2"}, TRUNCATING, []),
        ({"valkey_version": "10.0.0-rc1"}, TRUNCATING, []),
        ({"aof_enabled": "0"}, TRUNCATING | {"save": "3600 1"}, ["info persistence snapshots 3600 1"]),
    ],
    ids=str,
)
def test_what_a_server_says_is_judged(info: dict[str, str], config: Any, expected: list[str]) -> None:
    """What loses flows or refuses changes is an error; what may is a warning; what is not best is mentioned."""
    found = said(INFO | info, config if isinstance(config, StorageError) else CONFIG | config)
    assert len(found) == len(expected)
    for line in expected:
        severity, kind, part = line.split(" ", 2)
        assert any((s, k) == (severity, kind) and part in what for s, k, what in found), (line, found)


def test_a_server_that_says_nothing_is_told_of() -> None:
    """What could not be looked at is named; the namespace is looked at all the same."""
    (found,) = said(StorageError("INFO: unknown", "ERR"))
    assert found[:2] == ("info", "unavailable")
    assert "INFO" in found[2]


@pytest.mark.parametrize("meta", [(None, None), (b"1", b"8"), (b"2", b"16")])
def test_a_namespace_that_was_changed_under_its_users_is_an_error(meta: Any) -> None:
    """Whoever connects next would look for flows in other places."""
    ((severity, kind, what),) = said(INFO, meta=meta)
    assert (severity, kind) == ("error", "layout")
    assert "16" in what


def test_a_primary_its_replica_and_a_server_that_keeps_nothing() -> None:
    """As they are: each says what it is, and a replica is no place for a flow."""
    with Server(ENGINES[0]) as primary, Server(ENGINES[0], persistence=False) as replica:
        with FlowManager.from_url(primary.url) as flows:
            create(flows)
        replica.client().replicaof("127.0.0.1", primary.port)
        wait_until(
            lambda: replica.client().info("replication")["master_link_status"] == "up", description="a replica in sync"
        )
        with FlowManager.from_url(primary.url) as flows:
            found = {finding.kind: finding for finding in flows.doctor().findings}
            assert found["replication"].what == "primary, 1 replica"
        with pytest.warns(RuntimeWarning, match="disk"), FlowManager.from_url(replica.url) as flows:
            diagnosis = flows.doctor()
        assert {finding.kind for finding in problems(diagnosis)} == {"persistence", "replication"}
        assert diagnosis.flows[FlowStatus.CREATED] == 1


def test_a_full_server_can_be_examined_and_mended(servers: Servers) -> None:
    """Looking needs no memory, and what is mended is small."""
    subject = Subject(Backend.of_server(servers.of(ENGINES[0])), None)
    patient = Patient(subject, subject.manager())
    patient.strike("timer", "due")
    patient.raw.config_set("maxmemory", "1")
    try:
        assert [finding.kind for finding in problems(patient.diagnose())] == ["missing-entry"]
        assert patient.diagnose(repair=True).mended == {"missing-entry": 1}
    finally:
        patient.raw.config_set("maxmemory", "0")
    assert problems(patient.diagnose()) == []
    subject.close()
