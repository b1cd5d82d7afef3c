"""How long one caller waits: to see a change, to be resumed by a timer, for one call among others.

These rows stand for themselves, because their targets do: milliseconds that a user would notice.

- Seen: a manager's `wait_for`, blocked on an idle server, until it returns the flow that another manager finishes. The
  clock starts before `finish` is called, so it holds both the change and the sight of it.
- Resumed: 1,000 timers, a millisecond apart, and one engine running. A resume's lateness is `updated_at`, the server's
  clock, less the timer's time. The timers are set while the engine sleeps: due later than it wakes by itself, after a
  second, and due sooner, so that it has to be told.
- Called: each `update_state` of 1, 50 and 500 concurrent callers, a flow each, passing the flow they got before. 500
  threads share the 50 connections a manager has unless told otherwise.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import chain
from threading import Barrier, Event
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import attrs

from benchmarks.lives import create
from benchmarks.measure import Curve, Plan, Row, alone, interleaved, percentile
from benchmarks.server import Server
from redisflow import AsyncFlowManager, AsyncWaitEngine, Flow, FlowManager, FlowStatus, Timer, WaitEngine

if TYPE_CHECKING:
    import redis

_PREFIX = "latency"
_SIGHTS = 500
_TIMERS = 1000
_CALLS = 5000
_CALLERS = (1, 50, 500)
_PERCENTS = (50, 95, 99, 99.9)


@attrs.frozen
class Stage:
    """A server with a sync manager, and asyncio ones in an event loop of this thread."""

    client: redis.Redis
    flows: FlowManager
    runner: asyncio.Runner
    task_flows: AsyncFlowManager
    other_task_flows: AsyncFlowManager

    @classmethod
    @contextmanager
    def on(cls, server: Server) -> Iterator[Stage]:
        """Set it up on a server, empty."""
        with (
            server.client() as client,
            FlowManager.from_url(server.url, prefix=_PREFIX) as flows,
            asyncio.Runner() as runner,
        ):
            client.flushall()
            stage = cls(client, flows, runner, *(AsyncFlowManager.from_url(server.url, prefix=_PREFIX) for _ in "12"))
            try:
                yield stage
            finally:
                runner.run(stage.task_flows.aclose())
                runner.run(stage.other_task_flows.aclose())

    def running(self, how_many: int) -> list[Flow]:
        """Make running flows."""
        return [self.flows.start_running(create(self.flows, uuid4(), uuid4().hex)) for _ in range(how_many)]

    def one_is_blocked(self) -> bool:
        """Whether the server has a blocked reader."""
        return bool(self.client.info("clients")["blocked_clients"])


def run(server: Server, plan: Plan) -> Iterator[Row | Curve]:
    """Measure the rows."""
    with Stage.on(server) as stage, ThreadPoolExecutor(max(_CALLERS)) as pool:
        yield from _sights(stage, pool, plan)
        yield from _resumes(stage, plan)
        yield from _calls(stage, pool, plan)


# --- seen ------------------------------------------------------------------------------------------------


def _sights(stage: Stage, pool: ThreadPoolExecutor, plan: Plan) -> Iterator[Row]:
    how_many = plan.size(_SIGHTS)
    rounds = interleaved(
        plan.repeats,
        lambda: [stage.runner.run(_task_sight(stage, flow)) for flow in stage.running(how_many)],
        lambda: [_thread_sight(stage, pool, flow) for flow in stage.running(how_many)],
    )
    for name, repeats in zip(("asyncio", "sync"), zip(*rounds, strict=True), strict=True):
        for percent, at_most in ((50, 2), (99, 10)):
            figures = [percentile(samples, percent) for samples in repeats]
            yield alone(f"{name} wait_for sees a finish, p{percent}", figures, unit="ms", at_most=at_most)


async def _task_sight(stage: Stage, flow: Flow) -> float:
    async def see() -> float:
        await stage.other_task_flows.wait_for(flow.id)
        return time.perf_counter()

    seeing = asyncio.create_task(see())
    while not stage.one_is_blocked():  # noqa: ASYNC110 - the server sets no event
        await asyncio.sleep(0.001)
    began = time.perf_counter()
    await stage.task_flows.finish(flow)
    return 1000 * (await seeing - began)


def _thread_sight(stage: Stage, pool: ThreadPoolExecutor, flow: Flow) -> float:
    def see() -> float:
        stage.flows.wait_for(flow.id)
        return time.perf_counter()

    seeing = pool.submit(see)
    while not stage.one_is_blocked():
        time.sleep(0.001)
    began = time.perf_counter()
    stage.flows.finish(flow)
    return 1000 * (seeing.result() - began)


# --- resumed ---------------------------------------------------------------------------------------------

# Returns what stops the engine, and its run.
Engine = Callable[[Stage], tuple[Event | asyncio.Event, Coroutine[Any, Any, None]]]


def _in_thread(stage: Stage) -> tuple[Event, Coroutine[Any, Any, None]]:
    stop = Event()
    return stop, asyncio.to_thread(WaitEngine(stage.flows).run, stop=stop)


def _in_task(stage: Stage) -> tuple[asyncio.Event, Coroutine[Any, Any, None]]:
    stop = asyncio.Event()
    return stop, AsyncWaitEngine(stage.other_task_flows).run(stop=stop)


def _resumes(stage: Stage, plan: Plan) -> Iterator[Row]:
    how_many = plan.size(_TIMERS)
    for when, ahead_s in (("due in 1.5 s", 1.5), ("due in 0.5 s", 0.5)):
        late = partial(_late_ms, stage, how_many, ahead_s)
        rounds = interleaved(plan.repeats, partial(late, _in_thread), partial(late, _in_task))
        for engine, figures in zip(("WaitEngine", "AsyncWaitEngine"), zip(*rounds, strict=True), strict=True):
            yield alone(f"{engine} p99 late, {when}", figures, unit="ms", at_most=25)


def _late_ms(stage: Stage, how_many: int, ahead_s: float, engine: Engine) -> float:
    """How late an engine that runs is with all but a hundredth of the timers of a second."""
    flows = stage.running(how_many)
    stop, run = engine(stage)
    return percentile(stage.runner.run(_latenesses_ms(stage.task_flows, flows, ahead_s, stop, run)), 99)


async def _latenesses_ms(
    manager: AsyncFlowManager,
    flows: Sequence[Flow],
    ahead_s: float,
    stop: Event | asyncio.Event,
    run: Coroutine[Any, Any, None],
) -> list[float]:
    running = asyncio.create_task(run)
    await asyncio.sleep(0.1)  # by now it has found nothing, and sleeps
    first = datetime.now(UTC) + timedelta(seconds=ahead_s)
    timers = [Timer(at=first + n * timedelta(seconds=1) / len(flows)) for n in range(len(flows))]
    waiting = await asyncio.gather(*map(manager.set_waiting, flows, timers))
    await asyncio.sleep((timers[-1].at - datetime.now(UTC)).total_seconds())
    async with asyncio.timeout(10):
        while (await manager.count_by_status())[FlowStatus.WAITING]:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.05)
    stop.set()
    await running
    resumed = await manager.get_many(flow.id for flow in flows)
    # On a slow machine the first may be past when they are set, and are due from then on.
    since = [max(timer.at, flow.updated_at) for timer, flow in zip(timers, waiting, strict=True)]
    late = [flow.updated_at - due for flow, due in zip(resumed, since, strict=True) if flow is not None]
    assert len(late) == len(flows)
    assert min(late) >= timedelta(0), "resumed early"
    return [1000 * by.total_seconds() for by in late]


# --- called ----------------------------------------------------------------------------------------------


def _calls(stage: Stage, pool: ThreadPoolExecutor, plan: Plan) -> Iterator[Curve]:
    calls = plan.size(_CALLS)
    contestants: dict[str, Callable[[], list[float]]] = {}
    for callers in _CALLERS:
        plural = "s" if callers > 1 else ""
        contestants[f"{callers} asyncio task{plural}"] = partial(_by_tasks, stage, callers, calls)
        contestants[f"{callers} thread{plural}"] = partial(_by_threads, stage, pool, callers, calls)
    rounds = interleaved(plan.repeats, *contestants.values())
    for label, repeats in zip(contestants, zip(*rounds, strict=True), strict=True):
        points = [
            (f"p{percent}", statistics.median(percentile(samples, percent) for samples in repeats))
            for percent in _PERCENTS
        ]
        yield Curve("Latency of update_state", label, "percentile", "ms per call", points)


def _by_tasks(stage: Stage, callers: int, calls: int) -> list[float]:
    async def call(flow: Flow) -> list[float]:
        samples = []
        for number in range(calls // callers):
            began = time.perf_counter()
            flow = await stage.task_flows.update_state(flow, {"processed": number})
            samples.append(1000 * (time.perf_counter() - began))
        return samples

    async def all_call(flows: Sequence[Flow]) -> list[list[float]]:
        return await asyncio.gather(*map(call, flows))

    return list(chain(*stage.runner.run(all_call(stage.running(callers)))))


def _by_threads(stage: Stage, pool: ThreadPoolExecutor, callers: int, calls: int) -> list[float]:
    started = Barrier(callers)

    def call(flow: Flow) -> list[float]:
        samples = []
        started.wait()
        for number in range(calls // callers):
            began = time.perf_counter()
            flow = stage.flows.update_state(flow, {"processed": number})
            samples.append(1000 * (time.perf_counter() - began))
        return samples

    return list(chain(*pool.map(call, stage.running(callers))))
