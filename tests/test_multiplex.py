"""Many tasks, one connection: every reply reaches the task it belongs to, whatever happens to the others."""

from __future__ import annotations

import asyncio
import gc
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from redisflow import AsyncFlowManager, Flow, OutcomeUnknown, StorageError
from redisflow.multiplex import MultiplexedWire
from tests.support.proxy import HANG_REPLY, FaultProxy, delay
from tests.support.servers import ENGINES, Server
from tests.support.waiting import wait_until_async


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server for the tests of this file."""
    with Server(ENGINES[0]) as server:
        yield server


@pytest.fixture
async def flows(server: Server) -> AsyncIterator[AsyncFlowManager]:
    """A manager whose connections are called `shared`."""
    async with AsyncFlowManager.from_url(f"{server.url}?client_name=shared", prefix=f"m-{uuid4().hex[:8]}") as flows:
        yield flows


async def running(flows: AsyncFlowManager, **state: Any) -> Flow:
    """A flow in its first step."""
    flow = await flows.create_managed(
        controller_id="c", goal="g", owner_session_key="o", requester_origin="r", state=state
    )
    return await flows.start_running(flow)


def open_files() -> int:
    """How many file descriptors this process has."""
    return len(list(Path("/dev/fd").iterdir()))


def connections(server: Server, name: str) -> int:
    """How many connections of that name the server has."""
    return [client["name"] for client in server.client().client_list()].count(name)


async def test_a_thousand_tasks_share_one_connection_and_get_their_own_replies(
    server: Server, flows: AsyncFlowManager
) -> None:
    """Each task sees just the state it wrote, over and over."""

    async def live(n: int) -> None:
        flow = await running(flows, n=n)
        for step in range(5):
            flow = await flows.update_state(flow, {"step": [n, step]})
            read = await flows.get(flow)
            assert read == flow
            assert flow.state == {"n": n, "step": [n, step]}

    await asyncio.gather(*(live(n) for n in range(1000)))
    assert connections(server, "shared") == 1


async def test_replies_of_cancelled_callers_go_to_nobody(flows: AsyncFlowManager) -> None:
    """The others read on as if nothing had been; what was cancelled was applied once, or not at all."""
    chance = random.Random(7)
    flow_ids = [(await running(flows, n=n)).id for n in range(50)]

    async def one(n: int) -> bool:
        flow = await flows.update_state(flow_ids[n], increment={"count": 1})
        assert flow.state["n"] == n
        return True

    for _ in range(40):
        tasks = [asyncio.create_task(one(n)) for n in range(50)]
        await asyncio.sleep(0)
        for task in chance.sample(tasks, 20):
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(outcome is True or isinstance(outcome, asyncio.CancelledError) for outcome in done)
    for n, flow in enumerate(await flows.get_many(flow_ids)):
        assert flow is not None
        assert flow.state["n"] == n
        assert flow.state["count"] == flow.revision - 1 <= 40


async def test_a_large_packet_does_not_hold_small_ones_up(server: Server) -> None:
    """It travels on a connection of its own: while its request is held up, small calls go through."""
    with FaultProxy(server.port) as proxy:
        async with AsyncFlowManager.from_url(proxy.url, prefix=f"m-{uuid4().hex[:8]}") as flows:
            small, large = await running(flows), await running(flows)

            def plan(command: list[bytes]) -> Any:
                return delay(5.0) if sum(map(len, command)) > 100_000 else delay(0.0)

            proxy.plan = plan
            held_up = asyncio.create_task(flows.update_state(large, {"blob": b"x" * 200_000}))
            for step in range(20):
                small = await flows.update_state(small, {"step": step})
            assert not held_up.done()
            held_up.cancel()
            with pytest.raises(asyncio.CancelledError):
                await held_up


async def test_a_server_that_hangs_is_given_up_and_every_call_in_flight_settled(server: Server) -> None:
    """Their replies never come; each is sent again on a new connection and applied once."""
    with FaultProxy(server.port) as proxy:
        url = f"{proxy.url}?socket_timeout=0.3"
        async with AsyncFlowManager.from_url(url, prefix=f"m-{uuid4().hex[:8]}") as flows:
            started = [await running(flows) for _ in range(100)]
            proxy.inject(HANG_REPLY)
            updated = await asyncio.gather(*(flows.update_state(flow, increment={"n": 1}) for flow in started))
            assert proxy.faults["hang_reply"] == 1
            for flow in updated:
                assert (flow.state["n"], flow.revision) == (1, 2)
                assert len(await flows.list_events(flow)) == 3


async def test_a_call_is_given_up_at_its_own_deadline_though_the_connection_lives(server: Server) -> None:
    """The socket timeout is far away: the call is settled all the same, and its late reply goes to nobody."""
    with FaultProxy(server.port) as proxy:
        url = f"{proxy.url}?socket_timeout=600"
        prefix = f"m-{uuid4().hex[:8]}"
        async with (
            AsyncFlowManager.from_url(url, prefix=prefix, deadline_s=0.5) as flows,
            AsyncFlowManager.from_url(server.url, prefix=prefix) as direct,
        ):
            flow = await running(direct)
            await direct.update_state(flow.id, {"blob": None})  # the server knows the script now
            for blob in (b"", b"x" * 200_000):  # over the shared connection, and over one of its own
                proxy.inject(HANG_REPLY)
                with pytest.raises(OutcomeUnknown, match=str(flow.id)):
                    await flows.update_state(flow.id, {"blob": blob})
                read = await direct.get(flow)
                assert read is not None
                assert read.state["blob"] == blob


async def test_more_callers_than_may_be_under_way_wait_for_room(
    flows: AsyncFlowManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing piles up beyond the bound, and everybody gets a turn."""
    monkeypatch.setattr("redisflow.multiplex._MAX_UNDER_WAY", 8)
    flow = await running(flows, n=0)
    assert isinstance(flows._link.wire, MultiplexedWire)
    stream = flows._link.wire._stream
    assert stream is not None
    most, send = 0, stream.send

    def counted(*packet: Any) -> Any:
        nonlocal most
        future = send(*packet)
        most = max(most, len(stream._pending))
        return future

    monkeypatch.setattr(stream, "send", counted)
    await asyncio.gather(*(flows.update_state(flow.id, increment={"n": 1}) for _ in range(500)))
    read = await flows.get(flow)
    assert read is not None
    assert read.state["n"] == 500
    assert most == 8


async def test_closing_settles_calls_under_way_and_leaves_nothing_behind(server: Server) -> None:
    """They are told that their outcome is unknown, or get their reply; no task and no connection survives."""
    flows = AsyncFlowManager.from_url(f"{server.url}?client_name=closed", prefix=f"m-{uuid4().hex[:8]}", deadline_s=0.5)
    flow = await running(flows)
    calls = [asyncio.create_task(flows.update_state(flow.id, {"n": n})) for n in range(20)]
    await asyncio.sleep(0)
    await flows.aclose()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(outcome, Flow | OutcomeUnknown | StorageError) for outcome in outcomes)
    await flows.aclose()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    await wait_until_async(lambda: connections(server, "closed") == 0, description="the connections to be gone")


OUTLIVING = """
import asyncio, sys
from redisflow import AsyncFlowManager, StorageError

flows = AsyncFlowManager.from_url(sys.argv[1], prefix=sys.argv[2])
calls = []


async def begin():
    flow = await flows.create_mirrored(
        controller_id="c", goal="g", owner_session_key="o", requester_origin="r", state={"n": 0}
    )
    calls.extend(asyncio.ensure_future(flows.update_state(flow.id, increment={"n": 1})) for _ in range(50))
    await asyncio.sleep(0)
    return flow


async def go_on(flow):
    try:
        await flows.get(flow)
    except StorageError as error:
        assert "another event loop" in str(error)
    await flows.aclose()
    read = await flows.get(flow)
    assert read.state["n"] == read.revision - 1 <= 50
    await flows.aclose()


flow = asyncio.run(begin())
assert all(call.cancelled() for call in calls)
asyncio.run(go_on(flow))
print("went on")
"""


def test_a_manager_outlives_an_event_loop_that_ended_with_calls_under_way(server: Server) -> None:
    """From another loop it says so; closed there, it goes on there, and nothing was applied twice."""
    # In a process of its own: Python complains, when it likes, of what a loop left open.
    command = [sys.executable, "-W", "ignore", "-c", OUTLIVING, server.url, f"m-{uuid4().hex[:8]}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stdout) == (0, "went on\n"), result.stderr


async def test_opening_and_closing_many_times_leaks_nothing(server: Server) -> None:
    """Neither connections, nor tasks, nor open files, nor objects, nor what the collector would complain of."""

    async def cycle(times: int) -> tuple[int, int]:
        for _ in range(times):
            async with AsyncFlowManager.from_url(f"{server.url}?client_name=closed", prefix="cycles") as flows:
                await flows.count_by_status()
        gc.collect()
        return open_files(), len(gc.get_objects())

    files, objects = await cycle(100)
    files_after, objects_after = await cycle(10_000)
    assert files_after == files
    assert objects_after - objects < 1000  # a tenth of an object for each cycle
    assert asyncio.all_tasks() == {asyncio.current_task()}
    await wait_until_async(lambda: connections(server, "closed") == 0, description="the connections to be gone")
