"""Many calls on one flow lose their connection at the same time: each is applied once, and few searches settle all."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import attrs
import msgpack
import pytest

from redisflow import AsyncFlowManager, Flow, FlowManager
from redisflow.scripts import SETTLE
from tests.support.lua import EVERY_SCRIPT
from tests.support.proxy import HANG, HANG_REPLY, PASS, Fault, FaultProxy
from tests.support.resends import IDENTITY, sent
from tests.support.servers import ENGINES, Server
from tests.support.waiting import wait_until, wait_until_async

EVENTS, PIPELINED = 10_000, 1000
TASKS, THREADS = 400, 64
PATIENT_S = 120.0  # time must not decide
MOST_ENTRIES = 1000  # of a trail, looked at by one script
# A script of lua/settle.lua stops at so many entries, or so many bytes of payloads, whichever comes first. It reads 100
# entries at a time, in one command; one more finds the newest.
MOST_READS = MOST_ENTRIES // 100 + 1
# The whole trail is searched for the first call that notices the loss, and again for all that come in the meantime.
# On a machine that is busy there may be latecomers.
MOST_SEARCHES = 8
SCRIPTS_A_SEARCH = {10: 11, 5000: 101}  # by the bytes of an event's payload


class Cut:
    """A plan that lets the first calls be applied and holds the others, until the connection is cut.

    Attributes:
        seen: how many calls there were until then.
        is_cut: whether it was; from then on everything passes.
        pages: the number of entries that each settling script was to look at, at most.
    """

    def __init__(self, applied: int) -> None:
        self._applied = applied
        self.seen = 0
        self.is_cut = False
        self.pages: list[int] = []

    def __call__(self, command: list[bytes]) -> Fault:
        if command[1:2] == [SETTLE.source.sha]:
            self.pages.append(int(command[3 + int(command[2]) :][3]))
        if self.is_cut or sent(command) is None:
            return PASS
        self.seen += 1
        return HANG_REPLY if self.seen <= self._applied else HANG


@attrs.frozen
class Hot:
    """A flow with a long trail of recent events, and what stands before its server.

    Attributes:
        payload_bytes: the size of an event's payload.
    """

    flow: Flow
    direct: FlowManager
    raw: Any
    proxy: FaultProxy
    prefix: str
    payload_bytes: int

    def plan(self, applied: int) -> Cut:
        """Have the proxy hold calls, the first of them after they were applied."""
        plan = self.proxy.plan = Cut(applied)
        self.raw.config_resetstat()
        return plan

    def paid(self) -> int:
        """Return how many calls were applied."""
        flow = self.direct.get(self.flow)
        assert flow is not None
        paid: int = flow.state["paid"]
        return paid

    def cut(self, plan: Cut) -> None:
        """Close all connections."""
        plan.is_cut = True
        self.proxy.sever()

    def verify(self, plan: Cut, answers: list[Flow], calls: int) -> None:
        """Check that every call was applied once, and that the trail was searched by few scripts."""
        assert len(answers) == calls
        assert self.paid() == calls
        ops = [event.op_id for event in self.direct.list_events(self.flow, 2 * calls) if event.kind == "state_updated"]
        assert len(ops) == len(set(ops)) == calls
        assert 0 < len(plan.pages) <= MOST_SEARCHES * SCRIPTS_A_SEARCH[self.payload_bytes]
        assert max(plan.pages) <= MOST_ENTRIES
        reads = self.raw.info("commandstats")["cmdstat_xrevrange"]["calls"]
        assert reads <= MOST_READS * len(plan.pages) + 1  # and the one above


@pytest.fixture(scope="module")
def own_server() -> Iterator[Server]:
    """A server of its own, whose statistics are reset. It is not kept from its work by a disk."""
    with Server(ENGINES[0], "--save", "3600 1000000000", persistence=False) as server:
        for script in EVERY_SCRIPT:
            server.client().script_load(script.source.text.decode())
        yield server


@pytest.fixture(params=SCRIPTS_A_SEARCH, ids=lambda size: f"{size}-bytes")
def hot(request: pytest.FixtureRequest, own_server: Server) -> Iterator[Hot]:
    """A running flow whose trail has 10,000 events that are a moment old."""
    prefix, payload_bytes = f"t{uuid4().hex}", request.param
    raw: Any = own_server.client(decode_responses=True)
    with (
        FlowManager.from_url(own_server.url, prefix=prefix) as direct,
        FaultProxy(own_server.port) as proxy,
    ):
        flow = direct.start_running(direct.create_managed(**IDENTITY, state={"paid": 0}))
        key = direct.namespace.keyspace.partition_of(flow.id).events(str(flow.id).encode())
        payload = msgpack.packb("x" * payload_bytes)
        for _ in range(EVENTS // PIPELINED):
            pipeline = own_server.client().pipeline(transaction=False)
            for _ in range(PIPELINED):
                pipeline.xadd(key, {b"rev": b"1", b"kind": b"note", b"op": uuid4().hex, b"payload": payload})
            pipeline.execute()
        yield Hot(flow, direct, raw, proxy, prefix, payload_bytes)
        own_server.client().flushall()


def in_flight(flows: AsyncFlowManager) -> int:
    """Return how many calls wait for their replies."""
    wire: Any = flows._link.wire
    return len(wire._stream._pending)


@pytest.mark.parametrize("applied", [0, TASKS // 2, TASKS])
async def test_tasks_that_lose_their_connection_are_each_applied_once(hot: Hot, applied: int) -> None:
    """Those that were applied before are found; the others are sent again. None remains unknown."""
    async with AsyncFlowManager.from_url(hot.proxy.url, prefix=hot.prefix, deadline_s=PATIENT_S) as flows:
        await flows.get(hot.flow)
        plan = hot.plan(applied)
        tasks = [asyncio.create_task(flows.update_state(hot.flow.id, increment={"paid": 1})) for _ in range(TASKS)]
        await wait_until_async(lambda: in_flight(flows) == TASKS, description="all calls are in flight")
        await wait_until_async(lambda: hot.paid() == applied, description="some of them are applied")
        hot.cut(plan)
        answers = await asyncio.gather(*tasks)
    hot.verify(plan, answers, TASKS)


async def test_tasks_whose_connection_the_server_kills_are_each_applied_once(hot: Hot) -> None:
    """Without a proxy's help: an administrator closes every connection, with as many calls in flight as it finds."""
    async with AsyncFlowManager.from_url(hot.proxy.url, prefix=hot.prefix, deadline_s=PATIENT_S) as flows:
        await flows.get(hot.flow)
        plan = hot.plan(0)
        plan.is_cut = True
        hot.raw.client_pause(60_000, all=False)  # changes wait
        tasks = [asyncio.create_task(flows.update_state(hot.flow.id, increment={"paid": 1})) for _ in range(TASKS)]
        await wait_until_async(lambda: in_flight(flows) == TASKS, description="all calls are in flight")
        hot.raw.client_kill_filter(_type="normal", skipme=True)
        hot.raw.client_unpause()
        answers = await asyncio.gather(*tasks)
    hot.verify(plan, answers, TASKS)


@pytest.mark.parametrize("applied", [0, THREADS // 2, THREADS])
def test_threads_that_lose_their_connections_are_each_applied_once(hot: Hot, applied: int) -> None:
    """They have a connection each, and are settled together all the same."""
    with (
        FlowManager.from_url(
            f"{hot.proxy.url}?socket_timeout={PATIENT_S}",
            prefix=hot.prefix,
            deadline_s=PATIENT_S,
            max_connections=THREADS,
        ) as flows,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        plan = hot.plan(applied)
        calls = [pool.submit(flows.update_state, hot.flow.id, increment={"paid": 1}) for _ in range(THREADS)]
        wait_until(lambda: plan.seen == THREADS, description="all calls are in flight")
        wait_until(lambda: hot.paid() == applied, description="some of them are applied")
        hot.cut(plan)
        answers = [call.result(PATIENT_S) for call in calls]
    hot.verify(plan, answers, THREADS)
