"""The rate of awaited calls, one process: every caller drives its own flow and passes the `Flow` it holds.

Subject: `await flows.update_state(flow, patch)` of 1, 50 and 500 tasks. Yardsticks, of as many tasks:

- a bare protocol loop, the least that asyncio asks for: one connection, an `asyncio.Protocol`, `hiredis` to pack
  and parse, writes joined once per turn of the loop, a future per call;
- redis-py's asyncio client with a pool of connections and `await client.evalsha(sha, n, *keys, *args)`.

Fair, because the yardsticks send what the library's own operations would, recorded beforehand for other flows like
these, so that the script does the same work and gives the same small reply. What the library does for its caller
(checks, encoding, operation ids, the new flow) is on its side of the scale alone.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from uuid import uuid4

import hiredis
import redis.asyncio

from benchmarks.lives import answered, create, is_small, load_scripts
from benchmarks.measure import Command, Plan, Row, compare, interleaved
from benchmarks.server import Server
from redisflow import AsyncFlowManager, Flow, FlowManager
from redisflow.ops import changes

_YARDSTICKS = ("bare protocol loop", "redis-py, pooled")
# How many tasks, and the least ratio to each yardstick.
_CALLERS: dict[int, tuple[float | None, float | None]] = {1: (None, 0.95), 50: (0.75, 3.0), 500: (0.75, 5.0)}
_CALLS = 20_000  # of all callers together; of one caller a tenth
_POOLED = 50  # connections of redis-py's pool: more were slower

# Carries out one recorded command.
Client = Callable[[Command], Awaitable[Any]]


def run(server: Server, plan: Plan) -> Iterator[Row]:
    """Measure the rows."""
    with (
        server.client() as client,
        FlowManager.from_url(server.url, prefix="rate") as flows,
        asyncio.Runner() as runner,
    ):
        for callers, targets in _CALLERS.items():
            client.flushall()
            load_scripts(flows)
            calls = plan.size(_CALLS) // callers // (10 if callers == 1 else 1)
            contestants = (
                partial(_library_rate, server, flows, callers, calls),
                partial(_recorded_rate, flows, callers, calls, partial(_bare, server)),
                partial(_recorded_rate, flows, callers, calls, partial(_pooled, server)),
            )
            rounds = interleaved(plan.repeats, *[partial(_in_loop, runner, rate) for rate in contestants])
            for column, (yardstick, at_least) in enumerate(zip(_YARDSTICKS, targets, strict=True), 1):
                pairs = [(rates[0], rates[column]) for rates in rounds]
                name = f"asyncio update_state, {callers} callers"
                yield compare(name, yardstick, pairs, unit="calls/s", at_least=at_least)


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

    async def drive(call: Client, commands: Sequence[Command]) -> list[Any]:
        return [await call(command) for command in commands]

    async with connected() as call:
        began = time.perf_counter()
        replies = await asyncio.gather(*[drive(call, commands) for commands in scripts])
        seconds = time.perf_counter() - began
    assert all(is_small(reply) for of_one in replies for reply in of_one), replies[0][:3]
    read = flows.get_many(made)
    assert all(flow is not None and flow.revision == calls + 1 for flow in read)
    return callers * calls / seconds


def _recorded(flows: FlowManager, flow: Flow, calls: int) -> list[Command]:
    commands = []
    for number in range(calls):
        patch = {"processed": number, "last_message": "inbox/2026/17"}
        operation = changes.update_state(
            flows.namespace, flow, patch, next_step=None, increment=None, unset=(), expected_revision=None, op_id=None
        )
        command, flow = answered(operation)
        commands.append(command)
    return commands


@asynccontextmanager
async def _pooled(server: Server) -> AsyncIterator[Client]:
    """redis-py, as its documentation has it for more callers than connections: a pool that makes them wait."""
    pool = redis.asyncio.BlockingConnectionPool(
        host="127.0.0.1", port=server.port, max_connections=_POOLED, timeout=None
    )
    async with redis.asyncio.Redis.from_pool(pool) as client:

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
