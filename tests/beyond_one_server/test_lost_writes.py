"""When a replica takes over that lacks changes: what was confirmed is there, what was not is told of, nothing mixes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from uuid import UUID, uuid4

import pytest

from redisflow import Flow, NotDurable, OutcomeUnknown, RevisionMismatch, StorageError
from redisflow.keys import DEFAULT_PARTITIONS, Keyspace
from tests.beyond_one_server.conftest import Open
from tests.support.clusters import Cluster, Node
from tests.support.patients import problems
from tests.support.proxy import FaultProxy
from tests.support.servers import ENGINES, QUICK_SYNC, Server
from tests.support.subjects import WHO
from tests.support.waiting import wait_until

SOON_S = 0.1  # for a replica that will not say anything


class Pair:
    """A primary, and a replica that can be parted from it; clients come through a proxy to the one in charge."""

    def __init__(self, stack: ExitStack) -> None:
        self.primary, self.replica = (stack.enter_context(Server(ENGINES[0], *QUICK_SYNC)) for _ in range(2))
        self.proxy = stack.enter_context(FaultProxy(self.primary.port))
        self.replica.raw.replicaof("127.0.0.1", self.primary.port)
        wait_until(
            lambda: self.primary.raw.info("replication").get("slave0", {}).get("state") == "online",
            description="the replica follows",
        )

    def part(self) -> None:
        """From now on the replica hears of no change."""
        self.replica.raw.replicaof("NO", "ONE")

    def take_over(self) -> None:
        """The primary is gone for good; who knew it finds the replica there."""
        self.primary.kill()
        self.proxy.target_port = self.replica.port


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two servers of the test's own."""
    with ExitStack() as stack:
        yield Pair(stack)


def test_what_was_confirmed_outlives_the_primary_and_the_rest_was_told_of(open_url: Open, pair: Pair) -> None:
    """Of changes that wait for all replicas none is lost, but those that raised `NotDurable`."""
    flows = open_url(pair.proxy.url, durability="all", confirm_within_s=10.0)
    hasty = open_url(pair.proxy.url, durability="all", confirm_within_s=SOON_S)
    flow = flows.create_mirrored(**WHO, state={"n": 0})
    for _ in range(10):
        flow = flows.update_state(flow, increment={"n": 1})
    pair.part()
    with pytest.raises(NotDurable) as told:
        hasty.update_state(flow, increment={"n": 1})
    lost = told.value.flow
    assert lost is not None
    assert lost.state["n"] == 11
    local = flows.with_durability("local")
    assert local.update_state(lost, increment={"n": 1}).state["n"] == 12  # acknowledged
    pair.take_over()
    assert local.get(flow) == flow
    assert [event.revision for event in local.iter_events(flow)] == list(range(12))
    assert problems(local.doctor()) == []
    # The lost change is as one that never was: its op id carries it out, once.
    for _ in range(2):
        again = local.update_state(flow.id, increment={"n": 1}, op_id=lost.etag)
        assert (again.state["n"], again.revision) == (11, 12)


def test_a_revision_that_is_used_again_is_told_from_the_one_that_was_lost(open_url: Open, pair: Pair) -> None:
    """A compare with the `Flow` held fails on the other writer's revision of the same number, by each verb."""
    flows, others = open_url(pair.proxy.url, confirm_within_s=10.0), open_url(pair.proxy.url)
    flow = flows.with_durability("all").create_mirrored(**WHO, state={"n": 0})
    pair.part()
    held = flows.update_state(flow, {"by": "me"})
    pair.take_over()
    theirs = others.update_state(flow.id, {"by": "them"})
    assert theirs.revision == held.revision
    compares: list[Callable[[], object]] = [
        lambda: flows.update_state(held, {"x": 1}, expected_revision=held.revision),
        lambda: flows.finish(held, expected_revision=held.revision),
        lambda: flows.update_and_append(held, "note"),
        lambda: flows.delete(held, expected_revision=held.revision),
    ]
    for compare in compares:
        with pytest.raises(RevisionMismatch):
            compare()
    assert flows.get(flow) == theirs
    # Without a compare, a merge into what there is: and what comes back is that, not the copy with the lost change.
    assert flows.update_state(held, {"x": 1}).state == {"n": 0, "by": "them", "x": 1}


def test_a_follower_that_has_seen_what_was_lost_misses_nothing_that_was_not(open_url: Open, pair: Pair) -> None:
    """It goes on behind the id of a lost event: everything written from then on has a later one."""
    flows, others = open_url(pair.proxy.url, confirm_within_s=10.0), open_url(pair.proxy.url)
    flow = flows.with_durability("all").create_mirrored(**WHO)
    (_, before) = flows.iter_events(flow)
    pair.part()
    watched = flows.watch(flow, after=before.id, timeout=60)
    others.update_state(flow, {"by": "me"})
    lost = next(watched)
    pair.take_over()
    theirs = others.update_state(flow.id, {"by": "them"})
    others.finish(flow.id)
    behind = list(flows.iter_events(flow, after=lost.id))
    assert [(event.kind, event.revision) for event in behind] == [("state_updated", lost.revision), ("finished", 3)]
    assert behind[0].op_id == theirs.etag
    assert list(watched) == behind


# --- on a cluster --------------------------------------------------------------------------------------


def test_a_primary_that_freezes_and_comes_back_costs_nobody_a_confirmed_change(open_url: Open) -> None:
    """Its replica takes over meanwhile; what it still had to acknowledge, nobody is told was confirmed."""
    with Cluster(ENGINES[0]) as cluster:
        flows = open_url(
            f"{cluster.url}/?socket_timeout=0.5", deadline_s=60.0, durability="replicas:1", confirm_within_s=5.0
        )
        made = [flows.create_mirrored(**WHO, flow_id=in_partition(n), state={"n": 0}) for n in range(4)]
        primary = cluster.primary_of(Keyspace.of("redisflow", DEFAULT_PARTITIONS).partitions[0].slot)
        (replica,) = cluster.replicas_of(primary)
        over = threading.Event()

        def write(flow: Flow) -> tuple[int, int]:
            confirmed = unconfirmed = 0
            while not over.is_set() or confirmed < 10:
                try:
                    flows.update_state(flow.id, increment={"n": 1})
                    confirmed += 1
                except NotDurable:
                    unconfirmed += 1
            return confirmed, unconfirmed

        with ThreadPoolExecutor(len(made)) as pool:
            writing = [pool.submit(write, flow) for flow in made]
            wait_until(lambda: flows.get(made[0]).state["n"] > 10, description="the writers write")
            primary.server.pause()
            try:
                wait_until(lambda: replica.role == "primary", description="the replica takes over", timeout_s=60)
            finally:
                primary.server.resume()
            cluster.await_healthy()
            over.set()
            counts = [job.result(60) for job in writing]
        for flow, (confirmed, unconfirmed) in zip(flows.get_many(made), counts, strict=True):
            assert confirmed <= flow.state["n"] <= confirmed + unconfirmed
            assert flow.revision == 1 + flow.state["n"]


def in_partition(number: int) -> UUID:
    """A new id whose flow lives in that partition."""
    return UUID(int=uuid4().int // DEFAULT_PARTITIONS * DEFAULT_PARTITIONS + number)


def test_a_slot_that_nobody_serves_is_waited_for(open_url: Open) -> None:
    """CLUSTERDOWN: a primary without a replica is gone; when it is back, calls go on, and nothing was changed."""
    with Cluster(ENGINES[0], "--appendfsync", "always", replicas=0) as cluster:
        flows = open_url(cluster.url, deadline_s=60.0)
        made = [flows.create_mirrored(**WHO, flow_id=in_partition(n), state={"n": 0}) for n in range(16)]
        gone, *others = cluster.nodes
        gone.server.kill()
        wait_until(
            lambda: all("cluster_state:fail" in node.cluster("INFO") for node in others), description="it is missed"
        )
        hasty = open_url(cluster.url, deadline_s=0.2)
        with pytest.raises(StorageError) as refused:
            hasty.update_state(made[15], increment={"n": 1})
        assert not isinstance(refused.value, OutcomeUnknown)
        before = refusals(others)
        with ThreadPoolExecutor(16) as pool:
            calls = [pool.submit(flows.update_state, flow, increment={"n": 1}) for flow in made]
            wait_until(lambda: refusals(others) >= before + 30, description="further tries")
            cluster.restart(gone)
            assert [call.result(60).state["n"] for call in calls] == [1] * 16
        cluster.await_healthy()
        assert problems(flows.doctor()) == []


def refusals(nodes: list[Node]) -> int:
    """How often they have said CLUSTERDOWN."""
    stats = [node.server.raw.info("errorstats") for node in nodes]
    return sum(int(each.get("errorstat_CLUSTERDOWN", {"count": 0})["count"]) for each in stats)
