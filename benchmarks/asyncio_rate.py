"""The rate of awaited calls, one process: every caller drives its own flow and passes the `Flow` it holds.

Subject: `await flows.update_state(flow, patch)` of 1, 50 and 500 tasks. Yardsticks, of as many tasks:

- a bare protocol loop, the least that asyncio asks for: one connection, an `asyncio.Protocol`, `hiredis` to pack
  and parse, writes joined once per turn of the loop, a future per call;
- redis-py's asyncio client and `await client.evalsha(sha, n, *keys, *args)`, with a pool that has a connection for
  each call under way; for 500 tasks also with one of 50, which is faster there.

Fair, because the yardsticks send what the library's own operations would, recorded beforehand for other flows like
these, so that the script does the same work and gives the same small reply. What the library does for its caller
(checks, encoding, operation ids, the new flow) is on its side of the scale alone.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from uuid import uuid4

import hiredis
import redis.asyncio

from benchmarks.lives import ScriptCall, create, fields_of, is_small, load_scripts, recorded
from benchmarks.measure import Command, Curve, Plan, Row, compare, interleaved
from benchmarks.server import Server
from redisflow import AsyncFlowManager, Flow, FlowManager
from redisflow.ops import changes

_BARE, _EACH, _FEW = "bare protocol loop", "redis-py, a connection each", "redis-py, 50 connections"
# How many tasks, and the least ratio to a yardstick; those without one are in the picture alone.
_TARGETS: dict[int, dict[str, float | None]] = {
    1: {_BARE: None, _EACH: 0.95},
    10: {},
    50: {_BARE: 0.75, _EACH: 3.0},
    200: {},
    500: {_BARE: 0.75, _EACH: 5.0, _FEW: None},
}
_CALLS = 20_000  # of all callers together; of one caller a tenth
_FEW_CONNECTIONS = 50

# Carries out one recorded command.
Client = Callable[[Command], Awaitable[Any]]


def run(server: Server, plan: Plan) -> Iterator[Row | Curve]:
    """Measure the rows, and the curves from the same rounds."""
    rates: dict[str, list[tuple[float, float]]] = {}
    with (
        server.client() as client,
        FlowManager.from_url(server.url, prefix="rate") as flows,
        asyncio.Runner() as runner,
    ):
        for callers, targets in _TARGETS.items():
            client.flushall()
            load_scripts(flows)
            calls = plan.size(_CALLS) // callers // (10 if callers == 1 else 1)
            recorded = partial(_recorded_rate, flows, callers, calls)
            contestants = {
                "redisflow": partial(_library_rate, server, flows, callers, calls),
                _BARE: partial(recorded, partial(_bare, server)),
                _EACH: partial(recorded, partial(_pooled, server, callers)),
            }
            if callers > _FEW_CONNECTIONS:
                contestants[_FEW] = partial(recorded, partial(_pooled, server, _FEW_CONNECTIONS))
            rounds = interleaved(plan.repeats, *[partial(_in_loop, runner, rate) for rate in contestants.values()])
            measured = dict(zip(contestants, zip(*rounds, strict=True), strict=True))
            for yardstick, at_least in targets.items():
                pairs = list(zip(measured["redisflow"], measured[yardstick], strict=True))
                name = f"asyncio update_state, {callers} {'caller' if callers == 1 else 'callers'}"
                yield compare(name, yardstick, pairs, unit="calls/s", at_least=at_least)
            for contestant, all_rates in measured.items():
                rates.setdefault(contestant, []).append((callers, statistics.median(all_rates)))
    for contestant, points in rates.items():
        yield Curve("Rate against concurrency", contestant, "concurrent callers", "calls per second", points)


def _in_loop(runner: asyncio.Runner, rate: Callable[[], Any]) -> float:
    measured: float = runner.run(rate())
    return measured


def _running(flows: FlowManager) -> Flow:
    return flows.start_running(create(flows, uuid4(), uuid4().hex))


async def _library_rate(server: Server, sync_flows: FlowManager, callers: int, calls: int) -> float:
    made = [_running(sync_flows) for _ in range(callers)]

    async def drive(flow: Flow) -> Flow:
        for number in range(calls):
            flow = await flows.update_state(flow, {"processed": number, "last_message": "inbox/2026/17"})
        return flow

    async with AsyncFlowManager.from_url(server.url, prefix="rate") as flows:
        began = time.perf_counter()
        driven = await asyncio.gather(*map(drive, made))
        seconds = time.perf_counter() - began
    assert all(flow.revision == calls + 1 for flow in driven)
    return callers * calls / seconds


async def _recorded_rate(flows: FlowManager, callers: int, calls: int, connected: Callable[[], Any]) -> float:
    made = [_running(flows) for _ in range(callers)]
    scripts = [_recorded(flows, flow, calls) for flow in made]

    async def drive(call: Client, flow: Flow, script_calls: Sequence[ScriptCall]) -> list[Any]:
        replies = [fields_of(flow)[b"updated_at"]]
        for script_call in script_calls:
            replies.append(await call(script_call.after(replies[-1])))
        return replies

    async with connected() as call:
        began = time.perf_counter()
        replies = await asyncio.gather(*[drive(call, *one) for one in zip(made, scripts, strict=True)])
        seconds = time.perf_counter() - began
    assert all(is_small(reply) for of_one in replies for reply in of_one), replies[0][:3]
    read = flows.get_many(made)
    assert all(flow is not None and flow.revision == calls + 1 for flow in read)
    return callers * calls / seconds


def _recorded(flows: FlowManager, flow: Flow, calls: int) -> list[ScriptCall]:
    script_calls = []
    for number in range(calls):
        patch = {"processed": number, "last_message": "inbox/2026/17"}
        operation = changes.update_state(
            flows.namespace, flow, patch, next_step=None, increment=None, unset=(), expected_revision=None, op_id=None
        )
        script_call, flow = recorded(flow, operation)
        script_calls.append(script_call)
    return script_calls


@asynccontextmanager
async def _pooled(server: Server, connections: int) -> AsyncIterator[Client]:
    """redis-py, as its documentation has it for more callers than connections: a pool that makes them wait."""
    pool = redis.asyncio.BlockingConnectionPool(
        host="127.0.0.1", port=server.port, max_connections=connections, timeout=None
    )
    async with redis.asyncio.Redis.from_pool(pool) as client:
        await asyncio.gather(*[client.ping() for _ in range(connections)])  # connected before time is taken

        async def call(command: Command) -> Any:
            _, script, count, *given = command
            return await client.evalsha(script.decode(), int(count), *given)

        yield call


@asynccontextmanager
async def _bare(server: Server) -> AsyncIterator[Client]:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_connection(_BareProtocol, "127.0.0.1", server.port)
    yield protocol.call
    transport.close()


class _BareProtocol(asyncio.Protocol):
    """Nothing but the bytes: no limits, no errors, no cancellation."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader()
        self._unsent: list[bytes] = []
        self._waiting: deque[asyncio.Future[Any]] = deque()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def call(self, command: Command) -> asyncio.Future[Any]:
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent.append(hiredis.pack_command(command))  # type: ignore[arg-type]  # hiredis means tuple[…, ...]
        future = self._loop.create_future()
        self._waiting.append(future)
        return future

    def _flush(self) -> None:
        self._transport.write(b"".join(self._unsent))
        self._unsent.clear()

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        while (reply := self._reader.gets()) is not False:
            self._waiting.popleft().set_result(reply)
