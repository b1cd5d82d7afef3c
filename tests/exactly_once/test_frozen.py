"""A server that freezes and goes on, and calls whose callers do not wait for them: each change is there once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager

import pytest

from redisflow import AsyncFlowManager, Flow, FlowManager, FlowStatus
from tests.support.lua import EVERY_SCRIPT
from tests.support.proxy import HANG, HANG_REPLY, Fault, FaultProxy, delay
from tests.support.resends import VERBS, prepared
from tests.support.servers import ENGINES, Server
from tests.support.waiting import wait_until, wait_until_async

CALLERS, FLOWS = 12, 3


@pytest.fixture
def freezing() -> Iterator[tuple[Server, FaultProxy]]:
    """A server of the test's own, which knows every script, and a proxy that goes on when the server does not."""
    with Server(ENGINES[0]) as server, FaultProxy(server.port) as proxy:
        for script in EVERY_SCRIPT:
            server.client().script_load(script.source.text.decode())
        yield server, proxy


@contextmanager
def frozen(server: Server) -> Iterator[None]:
    """It accepts connections and answers nothing; what was sent to it runs when it goes on."""
    server.pause()
    try:
        yield
    finally:
        server.resume()


def assert_each_applied_once(server: Server, made: list[Flow]) -> None:
    """The callers have shared the flows: each flow has been added to by all of its callers, once by each."""
    with FlowManager.from_url(server.url) as flows:
        for flow in flows.get_many(made):
            assert flow is not None
            assert (flow.state["n"], flow.revision) == (CALLERS // FLOWS, 1 + CALLERS // FLOWS)
            added = [event.op_id for event in flows.iter_events(flow) if event.kind == "state_updated"]
            assert len(added) == len(set(added)) == CALLERS // FLOWS


def test_calls_to_a_frozen_server_are_applied_once_in_threads(freezing: tuple[Server, FaultProxy]) -> None:
    """Each was sent, timed out and tried again, perhaps more than once: the thaw finds all that was sent."""
    server, proxy = freezing
    with (
        FlowManager.from_url(f"{proxy.url}?socket_timeout=0.2", deadline_s=60) as flows,
        ThreadPoolExecutor(CALLERS) as pool,
    ):
        made = [prepared(flows, FlowStatus.RUNNING) for _ in range(FLOWS)]
        proxy.plan = lambda _: delay(0.02)  # so that there come to be connections for all: what is sent over them runs

        def side_by_side() -> bool:
            wait([pool.submit(flows.get, made[n % FLOWS]) for n in range(CALLERS)])
            return proxy.connections >= CALLERS

        wait_until(side_by_side, description="a connection for each caller")
        before = proxy.connections
        with frozen(server):
            calls = [pool.submit(flows.update_state, made[n % FLOWS], increment={"n": 1}) for n in range(CALLERS)]
            wait_until(lambda: proxy.connections >= before + 2 * CALLERS, description="second and third attempts")
        for call in calls:
            assert 1 <= call.result(60).state["n"] <= CALLERS // FLOWS
    assert_each_applied_once(server, made)


async def test_calls_to_a_frozen_server_are_applied_once_in_tasks(freezing: tuple[Server, FaultProxy]) -> None:
    """The same in asyncio, where all of them share a connection."""
    server, proxy = freezing
    async with AsyncFlowManager.from_url(f"{proxy.url}?socket_timeout=0.2", deadline_s=60) as flows:
        with FlowManager.from_url(server.url) as direct:
            made = [prepared(direct, FlowStatus.RUNNING) for _ in range(FLOWS)]
        assert await flows.get_many(made) == made
        before = proxy.connections
        with frozen(server):
            calls = [
                asyncio.create_task(flows.update_state(made[n % FLOWS], increment={"n": 1})) for n in range(CALLERS)
            ]
            await wait_until_async(lambda: proxy.connections >= before + 2, description="a third attempt")
        for flow in await asyncio.gather(*calls):
            assert 1 <= flow.state["n"] <= CALLERS // FLOWS
    assert_each_applied_once(server, made)


@pytest.mark.parametrize("fault", [HANG_REPLY, HANG], ids=["applied", "not-applied"])
@pytest.mark.parametrize(
    "name", ["update_state", "set_waiting", "finish", "update_and_append", "append_event", "record_step_observation"]
)
async def test_the_op_id_of_a_cancelled_call_settles_it(
    proxy: FaultProxy, direct: FlowManager, prefix: str, name: str, fault: Fault
) -> None:
    """Whoever did not wait for the outcome repeats the call with its op id: it is applied once, then or now."""
    status, kind, verb = VERBS[name]
    flow, op_id = prepared(direct, status), "c0" * 16
    async with AsyncFlowManager.from_url(f"{proxy.url}?socket_timeout=0.5", prefix=prefix) as flows:
        proxy.inject(fault)
        call = asyncio.create_task(verb(flows, flow, op_id))  # type: ignore[arg-type]  # it calls a method
        await wait_until_async(lambda: proxy.faults[fault.kind], description="the call to be under way")
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert [event.op_id for event in direct.iter_events(flow)].count(op_id) == (fault is HANG_REPLY)
        for _ in range(2):
            assert await verb(flows, flow, op_id)  # type: ignore[arg-type]  # as above
    assert [event.kind for event in direct.iter_events(flow) if event.op_id == op_id] == [kind]
    assert direct.get(flow).state["n"] == (5 if name == "update_state" else 0)  # type: ignore[union-attr]  # it exists
