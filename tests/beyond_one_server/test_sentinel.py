"""Behind Sentinel: the primary is found, and left when another one takes its place."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis.asyncio
from redis.sentinel import Sentinel

from redisflow import AsyncFlowManager, Flow, FlowManager, InvalidData, StorageError
from tests.beyond_one_server.conftest import Open
from tests.support.sentinels import Sentinels
from tests.support.servers import ENGINES
from tests.support.subjects import WHO, LoopThread
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def group() -> Iterator[Sentinels]:
    """A primary, two replicas, three Sentinels."""
    with Sentinels(ENGINES[0]) as group:
        yield group


@pytest.fixture
def flows(open_url: Open, group: Sentinels) -> Any:
    """A manager that asks them."""
    group.await_healthy()
    return open_url(group.url, deadline_s=60.0, confirm_within_s=30.0)


def test_the_primary_is_found(flows: Any, group: Sentinels) -> None:
    """Some of the Sentinels are enough."""
    flow = flows.create_managed(**WHO)
    assert group.primary().client().exists(flows.namespace.keyspace.partition_of(flow.id).flow(str(flow.id).encode()))


def test_a_sentinel_that_is_gone_does_no_harm(open_url: Open, group: Sentinels) -> None:
    """The next one is asked."""
    url = group.url.replace("redis+sentinel://", "redis+sentinel://127.0.0.1:1,")
    assert open_url(url).create_managed(**WHO).revision == 0


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("redis+sentinel://localhost:26379", InvalidData),
        ("redis+sentinel://localhost:26379/", InvalidData),
        ("redis+sentinel://127.0.0.1:1/flows", StorageError),
    ],
)
def test_a_url_that_leads_nowhere_is_refused(open_url: Open, url: str, error: type[Exception]) -> None:
    """Without a name at once; without an answer at the deadline."""
    with pytest.raises(error):
        open_url(url, deadline_s=0.2).connect()


def test_an_unknown_name_is_refused(open_url: Open, group: Sentinels) -> None:
    """No Sentinel knows such a primary."""
    with pytest.raises(StorageError, match="nobody"):
        open_url(group.url.replace("/flows/", "/nobody/"), deadline_s=0.2).connect()


def test_sentinels_need_not_speak_tls_where_servers_do(open_url: Open, group: Sentinels) -> None:
    """By default they must. These do not, and nor does the server they name."""
    url = group.url.replace("redis+", "rediss+") + "?socket_timeout=0.2"
    with pytest.raises(StorageError, match="no Sentinel answers"):
        open_url(url, deadline_s=0.2).connect()
    with pytest.raises(StorageError, match="cannot connect"):
        open_url(f"{url}&sentinel_ssl=false", deadline_s=0.2).connect()


def test_a_planned_failover_is_followed_at_once(flows: Any, group: Sentinels) -> None:
    """Nobody gets an error, and the old primary, which goes on for a while, is left: all is confirmed and kept."""
    durable = flows.with_durability("replicas:2")
    flow = flows.create_mirrored(**WHO, state={"n": 0})
    over = threading.Event()

    def write() -> int:
        confirmed = 0
        while not over.is_set() or confirmed < 10:
            durable.update_state(flow.id, increment={"n": 1})
            confirmed += 1
        return confirmed

    old = group.primary()
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        assert group.fail_over() is not old
        group.await_healthy()
        over.set()
        confirmed = writing.result(60)
    after = flows.get(flow)
    assert after.state["n"] == confirmed
    assert after.revision == 1 + confirmed


def test_connections_leave_the_old_primary(flows: Any, group: Sentinels) -> None:
    """Those that are idle too: what is written next is on the new one, though the old one would still take it."""
    flow = flows.with_durability("replicas:2").create_mirrored(**WHO)
    group.fail_over()
    wait_until(lambda: _is_at(flows.update_state(flow.id, {"x": 1}), flows, group), description="it is left")
    group.await_healthy()


def _is_at(flow: Flow, flows: Any, group: Sentinels) -> bool:
    key = flows.namespace.keyspace.partition_of(flow.id).flow(str(flow.id).encode())
    return bool(group.primary().client().hget(key, "etag") == flow.etag.encode())


def test_a_crashed_primary_is_replaced_and_calls_wait_for_it(flows: Any, group: Sentinels) -> None:
    """Within their deadline."""
    flow = flows.with_durability("replicas:2").create_mirrored(**WHO)
    old = group.kill_primary()
    assert flows.update_state(flow, {"x": 1}).revision == 2
    assert group.primary() is not old
    group.restart(old)
    group.await_healthy()
    assert flows.get(flow).revision == 2


def test_closing_leaves_nothing_behind(group: Sentinels) -> None:
    """No thread, no task, no connection to a Sentinel."""
    threads = threading.active_count()
    for _ in range(3):
        with FlowManager.from_url(group.url) as flows:
            flows.create_managed(**WHO)
    assert threading.active_count() == threads

    async def use() -> None:
        async with AsyncFlowManager.from_url(group.url) as flows:
            await flows.create_managed(**WHO)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(use())
    wait_until(
        lambda: not any("pubsub" in str(client["flags"]) or client["sub"] != "0" for client in _ours(group)),
        description="nobody listens",
    )


def _ours(group: Sentinels) -> list[dict[str, Any]]:
    known = {sentinel.port for sentinel in group.sentinels}
    clients: list[dict[str, Any]] = []
    for sentinel in group.sentinels:
        clients += sentinel.raw.client_list()
    return [client for client in clients if int(client["addr"].rpartition(":")[2]) not in known]


def test_a_client_of_sentinels_is_taken_as_it_is(group: Sentinels, loop_thread: LoopThread) -> None:
    """What `master_for` returns."""
    group.await_healthy()
    places = [("127.0.0.1", sentinel.port) for sentinel in group.sentinels]
    sentinel: Any = Sentinel(places)  # type: ignore[no-untyped-call]  # redis-py's
    client = sentinel.master_for("flows")
    with FlowManager(client, prefix="taken") as flows:
        flow = flows.create_managed(**WHO)
    for one in (client, *sentinel.sentinels):
        one.close()

    async def read() -> Flow | None:
        sentinel: Any = redis.asyncio.Sentinel(places)  # type: ignore[no-untyped-call]  # redis-py's
        client = sentinel.master_for("flows")
        async with AsyncFlowManager(client, prefix="taken") as flows:
            found = await flows.get(flow.id)
        for one in (client, *sentinel.sentinels):
            await one.aclose()
        return found

    assert loop_thread.run(read()) == flow
