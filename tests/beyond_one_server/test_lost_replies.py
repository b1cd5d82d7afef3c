"""Replies lost on a cluster and behind Sentinel: each change is there once, and only we send again."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any
from uuid import uuid4

import pytest
import redis
import redis.asyncio
from redis.asyncio.cluster import RedisCluster as AsyncRedisCluster
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.sentinel import Sentinel

from redisflow import AsyncFlowManager, Flow, FlowManager, NewFlow
from tests.beyond_one_server.conftest import Open
from tests.support.clusters import Cluster
from tests.support.proxy import CUT_REPLY, PASS, Fault, FaultProxy
from tests.support.resends import sent
from tests.support.servers import ENGINES, Server
from tests.support.subjects import WHO, LoopThread

FLOWS, CALLERS = 16, 4  # of each flow


class LosingFirst:
    """A plan that loses the reply to each call's first sending, and keeps what was sent."""

    def __init__(self) -> None:
        self.spans: dict[bytes, list[bytes]] = {}

    def __call__(self, command: list[bytes]) -> Fault:
        if (call := sent(command)) is None:
            return PASS
        _, op, span = call
        spans = self.spans.setdefault(op, [])
        spans.append(span)
        return CUT_REPLY if len(spans) == 1 else PASS

    def assert_only_we_sent_again(self, op_id: str) -> None:
        """The second sending says that it is one; a client's own would be the first, word for word."""
        first, *later = self.spans[op_id.encode()]
        assert first == b""
        assert later
        assert all(later)


@pytest.fixture(scope="module")
def proxied() -> Iterator[Cluster]:
    """Three primaries, each behind a proxy."""
    with Cluster(ENGINES[0], replicas=0, proxied=True) as cluster:
        yield cluster


@pytest.fixture
def losing(proxied: Cluster) -> Iterator[LosingFirst]:
    """The plan of all proxies, once it is set."""
    plan = LosingFirst()
    yield plan
    for node in proxied.nodes:
        assert node.proxy is not None
        node.proxy.plan = lambda _: PASS


def lose(cluster: Cluster, plan: LosingFirst) -> None:
    """Begin."""
    for node in cluster.nodes:
        assert node.proxy is not None
        node.proxy.plan = plan


def test_replies_lost_on_every_node_double_nothing(open_url: Open, proxied: Cluster, losing: LosingFirst) -> None:
    """Several callers add to each flow at once, so that a resend finds others' changes behind its own."""
    flows = open_url(proxied.url, prefix=f"t-{uuid4().hex[:8]}", deadline_s=60.0)
    made = flows.create_many([NewFlow(**WHO, state={"n": 0}) for _ in range(FLOWS)])
    made = [flows.start_running(flow) for flow in made]
    for flow in made:  # the nodes know the script
        flows.update_state(flow.id, increment={"n": 0})
    lose(proxied, losing)
    if isinstance(getattr(flows, "target", None), AsyncFlowManager):

        async def all_at_once() -> None:
            async with asyncio.TaskGroup() as tasks:
                for flow in made * CALLERS:
                    tasks.create_task(flows.target.update_state(flow.id, increment={"n": 1}))

        flows._thread.run(all_at_once())
    else:
        with ThreadPoolExecutor(FLOWS) as pool:
            for call in [pool.submit(flows.update_state, flow.id, increment={"n": 1}) for flow in made * CALLERS]:
                call.result(60)
    assert len(losing.spans) == FLOWS * CALLERS
    for flow in flows.get_many(made):
        assert (flow.state["n"], flow.revision) == (CALLERS, 2 + CALLERS)
        added = [event.op_id for event in flows.iter_events(flow) if event.kind == "state_updated"]
        assert len(set(added)) == len(added) == 1 + CALLERS


def test_a_batch_whose_replies_are_lost_is_carried_out_once(proxied: Cluster, losing: LosingFirst) -> None:
    """On the nodes where they were lost, and on the others."""
    with FlowManager.from_url(proxied.url, prefix=f"t-{uuid4().hex[:8]}", deadline_s=60.0) as flows:
        made = flows.create_many([NewFlow(**WHO, state={"n": 0}) for _ in range(FLOWS)])
        with flows.batch() as batch:
            for flow in made:
                batch.update_state(flow.id, increment={"n": 1})
        assert proxied.nodes[0].proxy is not None
        proxied.nodes[0].proxy.plan = losing
        with flows.batch() as batch:
            queued = [batch.update_state(flow.id, increment={"n": 1}) for flow in made for _ in range(CALLERS)]
        assert losing.spans
        for one in queued:
            assert 2 <= one.result().state["n"] <= 1 + CALLERS
        assert [flow and (flow.state["n"], flow.revision) for flow in flows.get_many(made)] == [
            (1 + CALLERS, 1 + CALLERS)
        ] * FLOWS


def assert_added_once(flows: FlowManager, flow: Flow) -> None:
    """By one event."""
    assert flow.state["n"] == 1
    assert [event.kind for event in flows.iter_events(flow)] == ["created", "state_updated"]


def test_a_cluster_clients_own_resending_is_off(proxied: Cluster, losing: LosingFirst, loop_thread: LoopThread) -> None:
    """Ten times, by default: a handed-in client's settings are taken, but for that."""
    prefix, (host, port) = f"t-{uuid4().hex[:8]}", proxied.nodes[0].address.split(":")
    with FlowManager.from_url(proxied.url, prefix=prefix) as direct, ExitStack() as stack:
        client = redis.RedisCluster(host=host, port=int(port))
        stack.callback(client.close)
        flows = stack.enter_context(FlowManager(client, prefix=prefix))
        first, second = (flows.create_managed(**WHO, state={"n": 0}) for _ in range(2))
        lose(proxied, losing)
        first = flows.update_state(first, increment={"n": 1})
        losing.assert_only_we_sent_again(first.etag)

        async def update() -> Flow:
            client = AsyncRedisCluster(host=host, port=int(port))
            async with AsyncFlowManager(client, prefix=prefix) as flows:
                flow = await flows.update_state(second, increment={"n": 1})
            await client.aclose()
            return flow

        second = loop_thread.run(update())
        losing.assert_only_we_sent_again(second.etag)
        assert_added_once(direct, first)
        assert_added_once(direct, second)


def test_a_sentinel_clients_own_resending_is_off(loop_thread: LoopThread) -> None:
    """Told to resend, a client that `master_for` returned does not, in our hands."""
    losing = LosingFirst()
    with (
        Server(ENGINES[0]) as server,
        FaultProxy(server.port) as proxy,
        Server(ENGINES[0], "--sentinel", persistence=False) as watching,
        FlowManager.from_url(server.url) as direct,
    ):
        watching.raw.execute_command("SENTINEL", "MONITOR", "flows", "127.0.0.1", proxy.port, 1)
        places, resending = [("127.0.0.1", watching.port)], {"retry_on_error": [redis.ConnectionError]}
        first, second = (direct.create_managed(**WHO, state={"n": 0}) for _ in range(2))
        direct.update_state(direct.create_managed(**WHO).id, increment={"n": 1})
        proxy.plan = losing
        sentinel: Any = Sentinel(places)  # type: ignore[no-untyped-call]  # redis-py's
        client = sentinel.master_for("flows", **resending)
        with FlowManager(client) as flows:
            first = flows.update_state(first, increment={"n": 1})
        for one in (client, *sentinel.sentinels):
            one.close()
        losing.assert_only_we_sent_again(first.etag)

        async def update() -> Flow:
            sentinel: Any = AsyncSentinel(places)  # type: ignore[no-untyped-call]  # redis-py's
            client = sentinel.master_for("flows", **resending)
            async with AsyncFlowManager(client) as flows:
                flow = await flows.update_state(second, increment={"n": 1})
            for one in (client, *sentinel.sentinels):
                await one.aclose()
            return flow

        second = loop_thread.run(update())
        losing.assert_only_we_sent_again(second.etag)
        assert_added_once(direct, first)
        assert_added_once(direct, second)


def test_hundreds_of_calls_at_once_are_all_served(open_url: Open, proxied: Cluster) -> None:
    """No caller is turned away because others are under way."""
    flows = open_url(proxied.url, prefix=f"t-{uuid4().hex[:8]}", max_connections=4)
    made = flows.create_many([NewFlow(**WHO) for _ in range(FLOWS)])
    if isinstance(getattr(flows, "target", None), AsyncFlowManager):

        async def all_at_once() -> list[Flow]:
            return list(await asyncio.gather(*(flows.target.get(made[n % FLOWS].id) for n in range(300))))

        found = flows._thread.run(all_at_once())
    else:
        with ThreadPoolExecutor(100) as pool:
            found = list(pool.map(lambda n: flows.get(made[n % FLOWS].id), range(300)))
    assert found == [made[n % FLOWS] for n in range(300)]
