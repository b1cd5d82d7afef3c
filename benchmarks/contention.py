"""Many writers of one flow: 64 threads, and 64 asyncio tasks, beside the same writers with a flow each.

Subject: all writers update one flow. Yardstick: each writer has a flow of its own. Both pass ids, so both are
answered the whole flow, and what is compared is contention alone: whoever shares a flow with 63 others has no
current copy of it. For information also with Flows: there the yardstick's copies are current, and its replies
short, while those of the shared flow never are.

Fair, because the patch, the number of calls and the manager are the same. Every call must succeed and count: a
writer that raises, or a revision that is not the number of calls, ends the benchmark as broken.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from uuid import uuid4

from benchmarks.lives import create
from benchmarks.measure import Plan, Row, compare, interleaved
from benchmarks.server import Server
from redisflow import AsyncFlowManager, Flow, FlowManager

_WRITERS = 64
_CALLS = 50

# Takes the flows, one for each writer; the calls each makes; whether by id. Returns seconds, and what each had last.
Writers = Callable[[Sequence[Flow], int, bool], tuple[float, list[Flow]]]


def run(server: Server, plan: Plan) -> Iterator[Row]:
    """Measure the rows."""
    with server.client() as client, FlowManager.from_url(server.url, prefix="many") as flows:
        client.flushall()
        with ThreadPoolExecutor(_WRITERS) as pool:
            yield from _rows("threads", flows, plan, partial(_by_threads, flows, pool))
        with asyncio.Runner() as runner:
            task_flows = AsyncFlowManager.from_url(server.url, prefix="many")
            yield from _rows("tasks", flows, plan, lambda *work: runner.run(_by_tasks(task_flows, *work)))
            runner.run(task_flows.aclose())


def _rows(writers: str, flows: FlowManager, plan: Plan, write: Writers) -> Iterator[Row]:
    calls = plan.size(_CALLS)
    for by, at_least in (("by id", 0.9), ("by Flow", None)):
        measure = partial(_rate, flows, write, calls, by_id=by == "by id")
        rounds = interleaved(plan.repeats, partial(measure, shared=True), partial(measure, shared=False))
        pairs = [(one, each) for one, each in rounds]
        name = f"{_WRITERS} {writers}, 1 flow, {by}"
        yield compare(name, f"{_WRITERS} flows", pairs, unit="calls/s", at_least=at_least)


def _rate(flows: FlowManager, write: Writers, calls: int, *, by_id: bool, shared: bool) -> float:
    """Calls per second of all writers together."""
    made = [flows.start_running(create(flows, uuid4(), uuid4().hex)) for _ in range(1 if shared else _WRITERS)]
    seconds, updated = write(made * (_WRITERS // len(made)), calls, by_id)
    expected = made[0].revision + calls * (_WRITERS // len(made))
    assert max(flow.revision for flow in updated) == expected, "changes were lost"
    assert shared or all(flow.revision == expected for flow in updated), "changes were lost"
    return _WRITERS * calls / seconds


def _by_threads(
    flows: FlowManager, pool: ThreadPoolExecutor, targets: Sequence[Flow], calls: int, by_id: bool
) -> tuple[float, list[Flow]]:
    started = Barrier(_WRITERS + 1)

    def write(flow: Flow) -> Flow:
        started.wait()
        for number in range(calls):
            flow = flows.update_state(flow.id if by_id else flow, {"processed": number})
        return flow

    writers = [pool.submit(write, flow) for flow in targets]
    started.wait()
    began = time.perf_counter()
    updated = [writer.result() for writer in writers]
    return time.perf_counter() - began, updated


async def _by_tasks(
    flows: AsyncFlowManager, targets: Sequence[Flow], calls: int, by_id: bool
) -> tuple[float, list[Flow]]:
    async def write(flow: Flow) -> Flow:
        for number in range(calls):
            flow = await flows.update_state(flow.id if by_id else flow, {"processed": number})
        return flow

    began = time.perf_counter()
    updated = await asyncio.gather(*map(write, targets))
    return time.perf_counter() - began, updated
