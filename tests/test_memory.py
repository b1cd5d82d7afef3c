"""A flow takes the memory of what is in it, and nobody can tell by its trail how that was done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest

from redisflow import Flow, FlowManager
from tests.support.servers import ENGINES, Engine, Server
from tests.support.subjects import WHO, Backend, Subject, create, flow_in, observed, trail
from tests.support.waiting import wait_until

# Of a flow as in benchmarks/memory.py; what a server says of its own keys is rougher than what they take in all.
TRAIL_AT_MOST = 1_400
FAR_AHEAD = "99999999999999-7"  # milliseconds: the year 5138


@pytest.fixture(scope="module", params=ENGINES, ids=str)
def running_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Every engine: how streams are kept is its own affair."""
    with Server(request.param) as server:
        yield server


@pytest.fixture
def subject(running_server: Server) -> Iterator[Subject]:
    """A namespace on it."""
    backend = Backend.of_server(running_server)
    subject = Subject(backend, None)
    yield subject
    subject.close()
    backend.raw.close()


def ask(subject: Subject, *words: Any) -> Any:
    """Send a command, without redis-py's idea of its reply."""
    return subject.raw.execute_command(*words)  # type: ignore[no-untyped-call]  # redis-py's


def events_key(subject: Subject, flow_id: Any) -> bytes:
    """The stream of a flow."""
    return subject.keyspace.partition_of(flow_id).events(str(flow_id).encode())


def entries_of(subject: Subject, key: bytes) -> Any:
    """What a stream holds."""
    return subject.raw.xrange(key)


def scratch_key(subject: Subject, flow_id: Any) -> bytes:
    """The key that creations of its partition use in passing."""
    return subject.keyspace.partition_of(flow_id).scratch


def lived(flows: Any, *, mirrored: bool = False) -> Flow:
    """A flow with five or six events."""
    flow = flows.create_mirrored(**WHO) if mirrored else flows.start_running(create(flows))
    flow = flows.update_state(flow, {"label": "invoices", "last_message": "inbox/2026/17"})
    flow = flows.update_state(flow, {"sender": "billing@example.org"}, next_step="fetch")
    ended: Flow = flows.finish(flow, {"summary": "10 messages, 1 error"})
    return ended


# --- how much ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_trail_takes_what_is_in_it_from_its_first_event_on(subject: Subject, *, mirrored: bool) -> None:
    """And not the 4 KB a server puts aside for a new stream, neither while the flow lives nor once it has ended."""
    flows = subject.manager()
    young = flows.create_mirrored(**WHO) if mirrored else create(flows)
    ended = lived(flows, mirrored=mirrored)
    sizes = [ask(subject, "MEMORY", "USAGE", events_key(subject, flow.id)) for flow in (young, ended)]
    assert sizes[0] < sizes[1] <= TRAIL_AT_MOST


def test_a_trail_of_many_events_is_not_rewritten(subject: Subject) -> None:
    """Only a creation looks at the whole trail: ending a flow of 5,000 events copies none of them."""
    flows = subject.manager()
    flow = flows.start_running(create(flows))
    key = events_key(subject, flow.id)
    subject.raw.eval(
        "for _ = 1, 5000 do redis.call('XADD', KEYS[1], '*', 'rev', 1, 'kind', 'k', 'op', '', 'payload', ARGV[1]) end",
        1,
        key,
        b"\xda\x03\xe8" + b"x" * 1000,
    )
    ask(subject, "CONFIG", "RESETSTAT")
    flows.finish(flow)
    called = subject.raw.info("commandstats")
    assert {"cmdstat_copy", "cmdstat_rename", "cmdstat_dump", "cmdstat_restore"}.isdisjoint(called)
    assert subject.raw.xlen(key) == 5003


# --- what is seen of it --------------------------------------------------------------------------------


def described(subject: Subject, key: bytes) -> Any:
    """All that a server says of a stream."""
    return ask(subject, "XINFO", "STREAM", key, "FULL", "COUNT", 0)


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_trail_is_what_it_would_be_had_it_just_been_appended_to(subject: Subject, *, mirrored: bool) -> None:
    """Entries, ids, and everything XINFO says: the same as of a stream made by XADD alone."""
    flows = subject.manager()
    for flow in (flows.create_mirrored(**WHO) if mirrored else create(flows), lived(flows, mirrored=mirrored)):
        key, twin = events_key(subject, flow.id), b"twin:" + str(flow.id).encode()
        for entry_id, fields in entries_of(subject, key):
            subject.raw.xadd(twin, fields, id=entry_id)
        assert described(subject, key) == described(subject, twin)
        assert entries_of(subject, key) == entries_of(subject, twin)
        assert subject.raw.pttl(key) == -1
        subject.raw.delete(twin)


def test_nothing_else_is_left_behind(subject: Subject) -> None:
    """A creation leaves the flow, its trail and two index entries."""
    flow = create(subject.manager())
    partition = subject.keyspace.partition_of(flow.id)
    member = str(flow.id).encode()
    owner = WHO["owner_session_key"].encode()
    assert set(subject.all_keys()) == {
        partition.flow(member), partition.events(member), partition.owner(owner), partition.status(flow.status)
    }  # fmt: skip


def test_ids_grow_although_the_clock_was_stepped_back(subject: Subject) -> None:
    """The last id ever given is kept with the trail, across a creation too."""
    flows, flow_id = subject.manager(), uuid4()
    key = events_key(subject, flow_id)
    subject.raw.xadd(key, {"x": "y"}, id=FAR_AHEAD)
    subject.raw.xdel(key, FAR_AHEAD)
    flow = flows.start_running(create(flows, flow_id=flow_id))
    flows.append_event(flow, "note")
    ids = [event.id for event in flows.iter_events(flow)]
    assert ids == [f"99999999999999-{n}" for n in (8, 9, 10)]


def test_a_trail_that_was_there_before_its_flow_is_added_to(subject: Subject) -> None:
    """What somebody wrote under the key of a flow to come is kept, whatever its size."""
    flows, flow_id = subject.manager(), uuid4()
    key = events_key(subject, flow_id)
    old = [subject.raw.xadd(key, {"n": n}) for n in range(300)]
    create(flows, flow_id=flow_id)
    assert [entry_id for entry_id, _ in entries_of(subject, key)][:-1] == old


@pytest.mark.parametrize("kind", ["string", "list", "hash", "stream", "zset"])
def test_whatever_is_under_the_key_used_in_passing_does_not_matter(subject: Subject, kind: str) -> None:
    """A creation replaces it; the flow is whole."""
    flows, flow_id = subject.manager(), uuid4()
    key = scratch_key(subject, flow_id)
    put: dict[str, list[Any]] = {
        "string": ["SET", key, "junk"],
        "list": ["RPUSH", key, "junk"],
        "hash": ["HSET", key, "junk", "junk"],
        "stream": ["XADD", key, FAR_AHEAD, "junk", "junk"],
        "zset": ["ZADD", key, 1, "junk"],
    }
    ask(subject, *put[kind])
    flow = create(flows, flow_id=flow_id)
    assert [event.kind for event in flows.iter_events(flow)] == ["created"]
    assert not subject.raw.exists(key)


def test_an_ended_flow_takes_notes_and_observations(subject: Subject) -> None:
    """Its trail grows as any other, and every reader sees it."""
    flows = subject.manager()
    flow = lived(flows)
    before = trail(flows, flow)
    for n in range(150):  # beyond one node of a stream
        flows.append_event(flow, "note", {"n": n})
        flows.record_step_observation(observed(flow.id, f"run-{n}"))
    assert trail(flows, flow)[: len(before)] == before
    assert len(trail(flows, flow)) == len(before) + 300
    assert [event.kind for event in flows.list_events(flow, limit=2)] == ["step_observed", "note"]
    assert [event.kind for event in flows.watch(flow, after="0-0")][-1] == "finished"
    assert len(flows.list_steps(flow)) == 150


# --- who waits for it ----------------------------------------------------------------------------------


def blocked_clients(subject: Subject) -> int:
    """How many wait for something."""
    blocked: int = subject.raw.info("clients")["blocked_clients"]
    return blocked


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_reader_that_waits_for_the_first_event_gets_it(subject: Subject, *, mirrored: bool) -> None:
    """XREAD BLOCK of a trail that does not exist yet, as long as it takes."""
    flows, flow_id = subject.manager(), uuid4()
    key, already = events_key(subject, flow_id), blocked_clients(subject)
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(subject.raw.xread, {key: start}, block=10_000) for start in ("0-0", "$", "1-1")]
        wait_until(lambda: blocked_clients(subject) == already + 3, description="three blocked readers")
        creating = flows.create_mirrored if mirrored else flows.create_managed
        flow = creating(**WHO, flow_id=flow_id)
        entries = entries_of(subject, key)
        for reader in waiting:
            assert reader.result() == [[key, entries]]
    assert len(entries) == flow.revision + 1


ENDINGS: dict[str, Callable[[Any, Flow], Flow]] = {
    "finished": lambda flows, flow: flows.finish(flow),
    "failed": lambda flows, flow: flows.fail(flow, "broken"),
    "cancelled": lambda flows, flow: flows.cancel(flow),
}


@pytest.mark.parametrize("status", ENDINGS)
def test_a_blocked_follower_sees_the_event_that_ends_a_flow(subject: Subject, status: str) -> None:
    """`watch` and `wait_for`, in the middle of an XREAD BLOCK, for each way to end."""
    flows, follower = subject.manager(), subject.manager()
    flow, already = flow_in(flows, "running"), blocked_clients(subject)
    with ThreadPoolExecutor(2) as pool:
        watching = pool.submit(lambda: [event.kind for event in follower.watch(flow, timeout=20)])
        waiting = pool.submit(follower.wait_for, flow, timeout=20)
        wait_until(lambda: blocked_clients(subject) == already + 2, description="two blocked followers")
        ended = ENDINGS[status](flows, flow)
        assert watching.result() == [status]
        assert waiting.result() == ended


# --- copies of it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_a_replica_and_a_restart_have_the_same(engine: Engine) -> None:
    """Entry by entry and id by id, by replication and by the append-only file, and later ids go on from there."""
    with Server(engine) as primary, Server(engine, persistence=False) as replica:
        replica.client().replicaof("127.0.0.1", primary.port)
        wait_until(
            lambda: replica.client().info("replication")["master_link_status"] == "up", description="a replica in sync"
        )
        with FlowManager.from_url(primary.url) as flows:
            made = [lived(flows, mirrored=mirrored) for mirrored in (False, True)]
            made.append(create(flows))
            primary.client().wait(1, 10_000)
            trails = {flow.id: list(flows.iter_events(flow)) for flow in made}
            infos = [primary.client().xinfo_stream(key, full=True) for key in streams_of(primary)]
        assert streams_of(replica) == streams_of(primary)
        assert [replica.client().xinfo_stream(key, full=True) for key in streams_of(replica)] == infos
        primary.stop()
        primary.start()
        with FlowManager.from_url(primary.url) as flows:
            assert {flow.id: list(flows.iter_events(flow)) for flow in made} == trails
            for flow in made:
                assert flows.append_event(flow, "note").id > trails[flow.id][-1].id
            assert flows.prune_terminal_flows(timedelta(0)) == 2


def streams_of(server: Server) -> list[bytes]:
    """Every trail on a server."""
    return sorted(server.client().scan_iter(_type="stream"))
