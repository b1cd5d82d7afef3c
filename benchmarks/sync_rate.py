"""The rate of sync calls: `flows.update_state(flow, patch)` beside redis-py's bare `evalsha` of the same script.

Subject: one thread that passes the flow it got from the call before. Yardstick: `redis.Redis` with its default
settings and `client.evalsha(sha, n, *keys, *args)`, the arguments recorded beforehand from the library's own
operation for another flow like it, so that the script does the same work and gives the same small reply.

A batch of the library is compared with its own single calls.

Fair, because what the library does for its caller (checks, encoding, a new operation id, the new flow) is on its
side of the scale, and on the other side nothing but the client.
"""

from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from benchmarks.lives import create, fields_of, is_small, load_scripts, recorded
from benchmarks.measure import Plan, Row, compare, interleaved
from benchmarks.server import Server
from redisflow import Flow, FlowManager, NewFlow
from redisflow.ops import changes

if TYPE_CHECKING:
    import redis

_CALLS = 200
# Short turns, and many: neighbours in time are disturbed alike.
_TURNS = 12
_BATCH = 5_000


def run(server: Server, plan: Plan) -> Iterator[Row]:
    """Measure the rows."""
    transports = (
        ("TCP", server.client(), server.url, 0.9),
        ("Unix socket", server.unix_client(), server.unix_url, None),
    )
    for transport, client, url, at_least in transports:
        with client, FlowManager.from_url(url, prefix="rate") as flows:
            client.flushall()
            load_scripts(flows)
            calls = plan.size(_CALLS)
            rates = partial(_library_rate, flows, calls), partial(_client_rate, flows, client, calls)
            pairs = [(a, b) for a, b in interleaved(plan.repeats * _TURNS, *rates)]
            yield compare(f"sync update_state, {transport}", "bare evalsha", pairs, unit="calls/s", at_least=at_least)
            yield _batches(flows, plan, transport)


def _batches(flows: FlowManager, plan: Plan, transport: str) -> Row:
    """A batch of many flows beside single calls."""
    new = NewFlow(controller_id="c", goal="g", owner_session_key="o", requester_origin="r", state={"messages": 10})
    with flows.batch() as batch:
        started = [batch.start_running(flow) for flow in flows.create_many([new] * plan.size(_BATCH))]
    made = [one.result() for one in started]
    rates = partial(_batch_rate, flows, made), partial(_library_rate, flows, plan.size(_CALLS))
    pairs = [(a, b) for a, b in interleaved(plan.repeats, *rates)]
    name = f"sync batch of {len(made):,}, {transport}"
    return compare(name, "single calls", pairs, unit="calls/s", at_least=3.0)


def _batch_rate(flows: FlowManager, made: list[Flow]) -> float:
    began = time.perf_counter()
    with flows.batch() as batch:
        queued = [
            batch.update_state(flow, {"processed": number, "last_message": "inbox/2026/17"})
            for number, flow in enumerate(made)
        ]
    made[:] = [one.result() for one in queued]
    return len(made) / (time.perf_counter() - began)


def profile(server: Server, calls: int) -> None:
    """Print where the time of sync calls goes."""
    with FlowManager.from_url(server.url, prefix="rate") as flows:
        flow = _running(flows)
        profiler = cProfile.Profile()
        profiler.runcall(_update, flows, flow, calls)
        pstats.Stats(profiler).sort_stats("tottime").print_stats(40)


def _running(flows: FlowManager) -> Flow:
    return flows.start_running(create(flows, uuid4(), uuid4().hex))


def _update(flows: FlowManager, flow: Flow, calls: int) -> Flow:
    for number in range(calls):
        flow = flows.update_state(flow, {"processed": number, "last_message": "inbox/2026/17"})
    return flow


def _library_rate(flows: FlowManager, calls: int) -> float:
    flow = _running(flows)
    began = time.perf_counter()
    updated = _update(flows, flow, calls)
    rate = calls / (time.perf_counter() - began)
    assert updated.revision == flow.revision + calls
    return rate


def _client_rate(flows: FlowManager, client: redis.Redis, calls: int) -> float:
    flow = first = _running(flows)
    calls_made = []
    for number in range(calls):
        patch = {"processed": number, "last_message": "inbox/2026/17"}
        operation = changes.update_state(
            flows.namespace, flow, patch, next_step=None, increment=None, unset=(), expected_revision=None, op_id=None
        )
        call, flow = recorded(flow, operation)
        calls_made.append(call)
    replies: list[Any] = []
    reply: Any = fields_of(first)[b"updated_at"]
    began = time.perf_counter()
    for call in calls_made:
        _, script, count, *given = call.after(reply)
        reply = client.evalsha(script.decode(), int(count), *given)
        replies.append(reply)
    rate = calls / (time.perf_counter() - began)
    assert all(map(is_small, replies)), replies[:3]
    read = flows.get(first)
    assert read is not None
    assert read.revision == first.revision + calls
    return rate
