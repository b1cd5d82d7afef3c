"""The clusters that tests run on do what they say, on every engine."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import AskError, MovedError, TryAgainError
from redis.retry import Retry

from tests.support.clusters import PROXY_HOST, Cluster, Node, SlotMove
from tests.support.leftovers import nothing_left, processes_in
from tests.support.proxy import CUT_REPLY
from tests.support.servers import ENGINES, Server
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="proxies use 127.0.0.2, which Linux answers on")

SLOT = key_slot(b"{moving}")
KEYS = [f"{{moving}}:{number}" for number in range(10)]


@pytest.fixture(scope="module", params=ENGINES, ids=str)
def shared_cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """One proxied cluster per engine, which leaves no process and no folder behind."""
    with nothing_left(), Cluster(request.param, proxied=True) as running:
        yield running


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Cluster:
    """A healthy, empty cluster; who is primary depends on the tests before."""
    shared_cluster.await_healthy()
    for client in shared_cluster.clients():
        client.flushall()
    return shared_cluster


def follower(cluster: Cluster) -> redis.RedisCluster:
    """Return a client that follows what the nodes tell it."""
    return redis.RedisCluster.from_url(f"redis://{cluster.up[0].address}")


def fill(cluster: Cluster) -> dict[str, bytes]:
    """Write keys all over the cluster, and wait until the replicas have them."""
    written = {f"key-{number}": b"%d" % number for number in range(200)}
    with follower(cluster) as client:
        client.mset_nonatomic(written)
    pairs = [(primary, replica) for primary in cluster.primaries for replica in cluster.replicas_of(primary)]
    wait_until(lambda: all(size(one) == size(other) for one, other in pairs), description="replicas have all keys")
    return written


def size(node: Node) -> int:
    """Return how many keys it has."""
    return int(node.server.raw.dbsize())


def holds(cluster: Cluster, written: dict[str, bytes]) -> bool:
    """Whether a client that comes now finds every key."""
    with follower(cluster) as client:
        return bool(client.mget_nonatomic(list(written)) == list(written.values()))


def test_a_cluster_serves_all_slots_and_every_primary_has_a_replica(cluster: Cluster) -> None:
    """A client that follows the announced topology reaches every node, and only through the proxies."""
    written = fill(cluster)
    assert holds(cluster, written)
    assert len(cluster.primaries) == 3
    assert [len(cluster.replicas_of(primary)) for primary in cluster.primaries] == [1, 1, 1]
    assert sum(client.dbsize() for client in cluster.clients()) == len(written)
    assert len({cluster.primary_of(slot) for slot in (0, 8_000, 16_383)}) == 3
    addresses = {f"{PROXY_HOST}:{node.proxy.port}" for node in cluster.nodes if node.proxy}
    assert len(addresses) == 6
    assert set(cluster.url.removeprefix("redis+cluster://").split(",")) == addresses
    for node in cluster.nodes:
        with redis.RedisCluster.from_url(f"redis://{node.address}") as client:
            assert {found.name for found in client.get_nodes()} == addresses


def test_a_fault_hits_the_clients_of_one_node_and_nothing_else(cluster: Cluster) -> None:
    """A proxy loses what its node's clients say; the nodes talk to each other past it."""
    primary = cluster.primary_of(SLOT)
    (replica,) = cluster.replicas_of(primary)
    assert primary.proxy
    assert replica.proxy
    direct = primary.server.client()
    direct.set(KEYS[0], 1)
    with redis.Redis(host=PROXY_HOST, port=primary.proxy.port, retry=Retry(NoBackoff(), 0)) as client:
        primary.proxy.inject(CUT_REPLY, "INCRBY")
        with pytest.raises(redis.ConnectionError):
            client.incr(KEYS[0])
        assert client.get(KEYS[0]) == b"2"
    before = [primary.proxy.connections, replica.proxy.connections]
    cluster.restart(replica)
    cluster.await_healthy()
    direct.set(KEYS[0], 3)
    assert direct.wait(1, 5000) == 1
    assert [primary.proxy.connections, replica.proxy.connections] == before


def test_a_failover_by_command_changes_roles_and_loses_nothing(cluster: Cluster) -> None:
    """Handed over, forced or taken over: the replica is primary, and the old primary follows it."""
    written = fill(cluster)
    for how, primary in zip(("", "FORCE", "TAKEOVER"), cluster.primaries, strict=True):
        (replica,) = cluster.replicas_of(primary)
        slot = primary.myself().ranges[0][0]
        cluster.fail_over(replica, how)
        assert cluster.primary_of(slot) is replica
        assert (replica.role, primary.role) == ("primary", "replica")
        assert cluster.replicas_of(replica) == [primary]
    assert holds(cluster, written)


def test_a_dead_primary_is_replaced_and_comes_back_as_a_replica(cluster: Cluster) -> None:
    """Its replica takes its slots over with all that was replicated; restarted, it follows."""
    written = fill(cluster)
    dead = cluster.primary_of(SLOT)
    (heir,) = cluster.replicas_of(dead)
    cluster.kill(dead)
    assert dead not in cluster.up
    cluster.await_healthy()
    assert cluster.primary_of(SLOT) is heir
    assert holds(cluster, written)
    cluster.restart(dead)
    cluster.await_healthy()
    assert cluster.replicas_of(heir) == [dead]
    assert size(dead) == size(heir)


def test_a_frozen_node_answers_nobody_until_it_goes_on(cluster: Cluster) -> None:
    """It is no part of what is up; resumed, it catches up."""
    primary = cluster.primary_of(SLOT)
    (replica,) = cluster.replicas_of(primary)
    cluster.pause(replica)
    try:
        assert replica not in cluster.up
        client = primary.server.client()
        client.set(KEYS[0], 1)
        assert client.wait(1, 50) == 0
    finally:
        cluster.resume(replica)
    assert client.wait(1, 5000) == 1
    cluster.await_healthy()
    assert cluster.replicas_of(primary) == [replica]


def test_a_slot_can_be_held_half_way(cluster: Cluster) -> None:
    """Some keys here, some there: the source sends clients on for those it has not, and those who want both wait."""
    source = cluster.primary_of(SLOT)
    target = next(node for node in cluster.primaries if node is not source)
    client = source.server.client()
    client.mset(dict.fromkeys(KEYS, 1))
    move = SlotMove(cluster, SLOT, source, target)
    move.begin()
    assert move.move_keys(3) == 3
    assert [node.cluster("COUNTKEYSINSLOT", SLOT) for node in (source, target)] == [7, 3]
    sent_on = []
    for key in KEYS:
        try:
            client.get(key)
        except AskError as error:
            sent_on.append((key, f"{error.host}:{error.port}"))
    assert [address for _, address in sent_on] == [target.address] * 3
    with pytest.raises(TryAgainError):
        client.mget(KEYS)
    with target.server.raw.pipeline(transaction=False) as pipeline:
        for key, _ in sent_on:
            pipeline.execute_command("ASKING")
            pipeline.get(key)
        assert pipeline.execute() == [True, "1"] * 3
    assert cluster.primary_of(SLOT) is source
    move.finish()
    cluster.await_healthy()
    assert cluster.primary_of(SLOT) is target
    assert target.server.client().mget(KEYS) == [b"1"] * 10
    with pytest.raises(MovedError) as moved:
        client.mget(KEYS)
    assert f"{moved.value.host}:{moved.value.port}" == target.address


def test_slots_move_while_clients_go_on(cluster: Cluster) -> None:
    """Whoever reads during a resharding finds every key, and so does who comes later."""
    written = fill(cluster)
    source = cluster.primary_of(SLOT)
    target = next(node for node in cluster.primaries if node is not source)
    moving = some_slots(source, written)
    with follower(cluster) as client, ThreadPoolExecutor(1) as pool:
        resharding = pool.submit(cluster.move_slots, moving, source, target, keys_per_migrate=1, pause_between=0.01)
        while not resharding.done():
            assert client.mget_nonatomic(list(written)) == list(written.values())
        resharding.result()
    assert {cluster.primary_of(slot) for slot in moving} == {target}
    assert holds(cluster, written)


def test_a_new_node_serves_what_it_is_given(cluster: Cluster) -> None:
    """Empty at first, and known to all; then it has the keys of its slots."""
    written = fill(cluster)
    node = cluster.add_empty_node()
    assert node.role == "primary"
    assert not node.myself().slots
    source = cluster.primary_of(SLOT)
    moving = some_slots(source, written)
    cluster.move_slots(moving, source, node)
    assert {cluster.primary_of(slot) for slot in moving} == {node}
    assert size(node) == sum(key_slot(key.encode()) in moving for key in written) >= len(moving)
    assert holds(cluster, written)


def some_slots(source: Node, written: dict[str, bytes]) -> list[int]:
    """Return slots of a primary that have keys."""
    served = [slot for slots in source.myself().ranges for slot in slots]
    return sorted({key_slot(key.encode()) for key in written}.intersection(served))[:5]


# --- what is left behind


def test_a_cluster_whose_fourth_node_does_not_start_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nodes before it end with it."""
    start = Server.start
    before: list[int] = []

    def start_three(server: Server) -> None:
        if len(before) == 3:
            server.config_args += ("--no-such-setting", "1")
        start(server)
        before.append(server.pid)

    monkeypatch.setattr(Server, "start", start_three)
    with nothing_left(), pytest.raises(RuntimeError, match="no-such-setting"), Cluster(ENGINES[0], proxied=True):
        pass
    assert len(before) == 3


def test_a_cluster_that_does_not_become_healthy_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes that do not find together end, a frozen one too."""
    with nothing_left() as folder:

        def give_up(cluster: Cluster) -> None:
            assert len(processes_in(folder)) >= 6
            cluster.pause(cluster.nodes[0])
            raise LookupError

        monkeypatch.setattr(Cluster, "await_healthy", give_up)
        with pytest.raises(LookupError), Cluster(ENGINES[0], proxied=True):
            pass
