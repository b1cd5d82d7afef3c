"""On a cluster: slots that move, nodes that come, primaries that are replaced, in the midst of calls."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
import redis
from redis.asyncio.cluster import RedisCluster as AsyncRedisCluster

from redisflow import (
    AsyncFlowManager,
    Flow,
    FlowManager,
    FlowStatus,
    InvalidData,
    Manual,
    NewFlow,
    StorageError,
)
from redisflow.keys import DEFAULT_PARTITIONS, Keyspace
from tests.beyond_one_server.conftest import Open
from tests.support.clusters import Cluster, Node, SlotMove
from tests.support.patients import problems
from tests.support.servers import ENGINES, Engine, Server
from tests.support.subjects import NEWEST, WHO, LoopThread, observed
from tests.support.waiting import wait_until


@pytest.fixture
def prefix() -> str:
    """A namespace of the test's own."""
    return f"t-{secrets.token_hex(6)}"


@pytest.fixture
def flows(open_url: Open, cluster: Cluster, prefix: str) -> Any:
    """A manager on the cluster."""
    return open_url(cluster.url, prefix=prefix)


def in_partition(number: int) -> UUID:
    """A new id whose flow lives in that partition."""
    return UUID(int=secrets.randbits(120) * DEFAULT_PARTITIONS + number)


def places(cluster: Cluster, prefix: str, number: int = 0) -> tuple[int, Node, Node]:
    """The slot of a partition, its node, and another one with slots."""
    slot = Keyspace.of(prefix, DEFAULT_PARTITIONS).partitions[number].slot
    source = cluster.primary_of(slot)
    target = next(node for node in cluster.primaries if node is not source and node.myself().ranges)
    return slot, source, target


# --- connecting ----------------------------------------------------------------------------------------


def test_one_node_leads_to_all(open_url: Open, cluster: Cluster, prefix: str) -> None:
    """A replica's address will do, and nodes that are not there do no harm."""
    replica = next(node for node in cluster.nodes if node.role == "replica")
    flows = open_url(f"redis+cluster://127.0.0.1:1,{replica.address}/?socket_timeout=2", prefix=prefix)
    made = [flows.create_managed(**WHO) for _ in range(DEFAULT_PARTITIONS)]
    assert flows.get_many(made) == made
    assert all(client.dbsize() for client in cluster.clients())


def test_a_lone_server_is_no_cluster(open_url: Open, cluster: Cluster) -> None:
    """And a node alone is not to be used as one; both say what to do."""
    with pytest.raises(StorageError, match=r"redis\+cluster://"):
        open_url(cluster.nodes[0].server.url).connect()
    with Server(ENGINES[0]) as server, pytest.raises(StorageError, match="cluster"):
        open_url(f"redis+cluster://127.0.0.1:{server.port}").connect()


@pytest.mark.parametrize("url", ["redis+cluster://localhost:7000/1", "redis+cluster://localhost:port"])
def test_a_url_that_makes_no_sense_is_refused(open_url: Open, url: str) -> None:
    """A cluster has one database."""
    with pytest.raises(InvalidData, match="not a usable URL"):
        open_url(url).connect()


def test_where_nobody_answers_it_is_a_storage_error(open_url: Open) -> None:
    """At the deadline."""
    with pytest.raises(StorageError, match="no node of the cluster answers"):
        open_url("redis+cluster://127.0.0.1:1", deadline_s=0.2).connect()


def test_a_cluster_client_is_taken_as_it_is(cluster: Cluster, prefix: str, loop_thread: LoopThread) -> None:
    """Its settings and nodes; it stays open, and its automatic resends are not used."""
    client = redis.RedisCluster(host="127.0.0.1", port=cluster.nodes[0].server.port)
    with FlowManager(client, prefix=prefix) as flows:
        flow = flows.create_managed(**WHO)
    assert client.ping(target_nodes=redis.RedisCluster.RANDOM)
    client.close()

    async def read() -> Flow | None:
        client = AsyncRedisCluster(host="127.0.0.1", port=cluster.nodes[0].server.port)
        async with AsyncFlowManager(client, prefix=prefix) as flows:
            found = await flows.get(flow.id)
        await client.aclose()
        return found

    assert loop_thread.run(read()) == flow


# --- slots on their way --------------------------------------------------------------------------------

VERBS: dict[str, Callable[[Any, Flow], Any]] = {
    "update_state": lambda flows, flow: flows.update_state(flow, {"x": 1}),
    "by id": lambda flows, flow: flows.update_state(flow.id, {"x": 1}),
    "set_waiting": lambda flows, flow: flows.set_waiting(flow, Manual()),
    "finish": lambda flows, flow: flows.finish(flow, {"x": 1}),
    "append_event": lambda flows, flow: flows.append_event(flow, "note"),
    "observe": lambda flows, flow: flows.record_step_observation(observed(flow.id)),
    "mutate": lambda flows, flow: flows.mutate(flow, lambda now: now, kind="looked"),
    "create": lambda flows, flow: flows.create_managed(**WHO, flow_id=UUID(int=flow.id.int + DEFAULT_PARTITIONS)),
    "delete": lambda flows, flow: flows.delete(flow),
    "get": lambda flows, flow: flows.get(flow),
    "events": lambda flows, flow: list(flows.iter_events(flow)),
    "by owner": lambda flows, _: flows.list_by_owner(WHO["owner_session_key"]),
    "prune": lambda flows, _: flows.prune_terminal_flows(timedelta(0)),
}


@contextmanager
def on_the_way(cluster: Cluster, prefix: str, keys: int) -> Iterator[SlotMove]:
    """The slot of partition 0 on its way to another node, so many of its keys there."""
    slot, source, target = places(cluster, prefix)
    move = SlotMove(cluster, slot, source, target)
    move.begin()
    for _ in range(keys):
        move.move_keys(1)
    try:
        yield move
    finally:
        move.finish()
        cluster.await_healthy()


@pytest.mark.parametrize("name", VERBS)
@pytest.mark.parametrize("keys", [0, 1, 3, 100])
def test_a_verb_goes_through_while_its_slot_moves(
    flows: Any, cluster: Cluster, prefix: str, name: str, keys: int
) -> None:
    """At once where all its keys are on one node, else when the slot has moved: never an error, never a half."""
    flow = flows.create_mirrored(**WHO, flow_id=in_partition(0), state={"n": 0})
    flows.record_step_observation(observed(flow.id, result="kept"))
    with ThreadPoolExecutor(1) as pool:
        with on_the_way(cluster, prefix, keys):
            calling: Future[Any] = pool.submit(VERBS[name], flows, flow)
            done = threading.Event()
            calling.add_done_callback(lambda _: done.set())
            done.wait(0.1)  # some can only wait
        calling.result(30)
    found = flows.get(flow)
    if name == "delete":
        assert found is None
        return
    trail = list(flows.iter_events(flow))
    assert [event.revision for event in trail if event.kind not in {"note", "step_observed"}] == list(
        range(found.revision + 1)
    )
    assert flows.list_steps(flow)[0].run_id == observed(flow.id).run_id
    assert problems(flows.doctor()) == []


def test_following_goes_on_while_a_slot_moves(flows: Any, open_url: Open, cluster: Cluster, prefix: str) -> None:
    """`watch` misses nothing and `wait_for` comes to its end: their connections follow the slot."""
    flow = flows.create_mirrored(**WHO, flow_id=in_partition(0))
    other = open_url(cluster.url, prefix=prefix)
    with ThreadPoolExecutor(2) as pool:
        watching = pool.submit(lambda: [event.kind for event in flows.watch(flow, after="0-0", timeout=60)])
        waiting = pool.submit(lambda: flows.wait_for(flow, timeout=60))
        slot, source, target = places(cluster, prefix)
        for origin, goal in ((source, target), (target, source)):
            cluster.move_slots([slot], origin, goal, keys_per_migrate=1)
            flow = other.update_state(flow, {"at": str(goal)})
        other.finish(flow)
        assert watching.result(60) == ["created", "started", "state_updated", "state_updated", "finished"]
        assert waiting.result(60).status == "finished"


@pytest.mark.parametrize("engine", NEWEST, ids=str)
def test_a_live_resharding_costs_nobody_an_error(open_url: Open, engine: Engine) -> None:
    """Writers on every flow while all slots of the namespace move, some to a node that had none: each change once."""
    with Cluster(engine, replicas=0) as cluster:
        flows = open_url(cluster.url)
        made = [flows.create_mirrored(**WHO, flow_id=in_partition(n % 16), state={"n": 0}) for n in range(32)]
        moving = threading.Event()

        def write(flow: Flow) -> int:
            count = 0
            while not moving.is_set() or count < 3:
                flow = flows.update_state(flow, increment={"n": 1})
                count += 1
            return count

        with ThreadPoolExecutor(8) as pool:
            writing = [pool.submit(write, flow) for flow in made[:8]]
            empty = cluster.add_empty_node()
            for number, partition in enumerate(Keyspace.of("redisflow", DEFAULT_PARTITIONS).partitions):
                source = cluster.primary_of(partition.slot)
                others = [node for node in cluster.primaries if node is not source]
                target = empty if number % 2 else others[number % len(others)]
                cluster.move_slots([partition.slot], source, target, keys_per_migrate=3)
            moving.set()
            counts = [job.result(60) for job in writing]
        after = flows.get_many(made)
        assert [flow.state["n"] for flow in after[:8]] == counts
        assert [flow.revision for flow in after[:8]] == [1 + count for count in counts]
        assert flows.list_by_owner(WHO["owner_session_key"]) == sorted(after, key=lambda f: f.created_at, reverse=True)
        assert problems(flows.doctor()) == []
        assert empty.server.client().dbsize() > 0


def test_several_verbs_of_a_flow_keep_their_order_in_a_batch(cluster: Cluster, prefix: str) -> None:
    """On nodes that know no script, and with the slot on its way."""
    with FlowManager.from_url(cluster.url, prefix=prefix) as flows:
        made = flows.create_many([NewFlow(**WHO, flow_id=in_partition(n % 16)) for n in range(64)])
        for client in cluster.clients():
            client.script_flush()
        with ThreadPoolExecutor(1) as pool:
            with on_the_way(cluster, prefix, 5), flows.batch() as batch:
                for flow in made:
                    batch.start_running(flow.id)
                    batch.update_state(flow.id, {"x": 1})
                    batch.append_event(flow.id, "note")
                last = [batch.finish(flow.id) for flow in made[1::16]]
                sent = pool.submit(batch.send)
                wait_until(lambda: sent.done() or True, description="it is on its way")
            sent.result(60)
        assert {one.result().status for one in last} == {FlowStatus.FINISHED}
        kinds = {tuple(event.kind for event in flows.iter_events(flow)) for flow in made}
        usual = ("created", "started", "state_updated", "note")
        assert kinds == {usual, (*usual, "finished")}


# --- primaries replaced --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["", "FORCE", "TAKEOVER"])
def test_a_planned_failover_costs_nobody_a_confirmed_change(
    open_url: Open, cluster: Cluster, prefix: str, how: str
) -> None:
    """Calls go on with the promoted replica, and each is confirmed and applied once."""
    flows = open_url(cluster.url, prefix=prefix, deadline_s=60.0, confirm_within_s=30.0)
    made = [flows.create_mirrored(**WHO, flow_id=in_partition(n), state={"n": 0}) for n in range(DEFAULT_PARTITIONS)]
    _, primary, _ = places(cluster, prefix)
    durable = flows.with_durability("replicas:1")
    over = threading.Event()

    def write() -> int:
        rounds = 0
        while not over.is_set() or rounds < 3:
            for flow in made:
                durable.update_state(flow.id, increment={"n": 1})
            rounds += 1
        return rounds

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        cluster.fail_over(cluster.replicas_of(primary)[0], how)
        over.set()
        rounds = writing.result(120)
    for flow in flows.get_many(made):
        assert flow.state["n"] == rounds
        assert flow.revision == 1 + rounds


def test_a_crashed_primary_is_replaced_and_calls_wait_for_it(open_url: Open, prefix: str) -> None:
    """Within their deadline; what replicas had is there."""
    with Cluster(ENGINES[0]) as cluster:
        flows = open_url(cluster.url, prefix=prefix, deadline_s=60.0).with_durability("replicas:1")
        made = [flows.create_mirrored(**WHO, flow_id=in_partition(n), state={"n": 0}) for n in range(16)]
        _, primary, _ = places(cluster, prefix)
        cluster.kill(primary)
        local = flows.with_durability("local")
        assert [local.update_state(flow, {"x": 1}).revision for flow in made] == [2] * 16
        assert len(local.list_by_owner(WHO["owner_session_key"])) == 16
        cluster.restart(primary)
        cluster.await_healthy()
        assert problems(local.doctor()) == []
