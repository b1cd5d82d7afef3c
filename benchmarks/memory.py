"""What a flow takes of the server's memory: while it lives, and once it has ended.

These rows stand for themselves. Every flow has ten state keys and five events, an id as the library draws it, and an
owner who has ten flows; the library made it. Two ways to count, both on an otherwise empty server:

- The growth of `used_memory`, divided by the flows: indexes, tables and the allocator's rounding up included. The
  target, 1,800 bytes, is this figure's for an ended flow: most flows of any store have ended. It hardly differs
  between repeats, so the largest size is measured once.
- `MEMORY USAGE` with `SAMPLES 0`, of the keys that are the flow's own, and of each index divided by the flows in it. An
  owner's flows are spread over the partitions: ten of them are in seven or eight sorted sets, which makes the owner's
  index the dearer one. It leaves out the table of all keys, and Redis 7.0 says more for a stream than it takes.
"""

from __future__ import annotations

import asyncio
import statistics
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING
from uuid import uuid4

from benchmarks.measure import Curve, Plan, RawConnection, Row, alone, pack
from benchmarks.server import Server
from redisflow import AsyncFlowManager, Flow

if TYPE_CHECKING:
    import redis

_SIZES = (1_000, 10_000, 100_000)
_CALLERS = 300
_PER_OWNER = 10
_AT_MOST = 1_800
_PER_PACKET = 1000
_CREATED = {"messages": 10, "processed": 0, "errors": ["timeout"], "mailbox": "inbox/2026/17"}
_FIRST = {"processed": 3, "last_message": "inbox/2026/17", "label": "invoices"}
_LATER = {"processed": 7, "sender": "billing@example.org", "approved": True, "attachments": ["march.pdf"]}
_LAST = {"summary": "10 messages, 1 error"}
_OF_INDEXES = {
    b"owner": "owner index",
    b"status": "other indexes",
    b"due": "other indexes",
    b"waiters": "other indexes",
}


def run(server: Server, plan: Plan) -> Iterator[Row | Curve]:
    """Measure the rows."""
    few, some, many = (plan.size(size) for size in _SIZES)
    with server.client() as client, RawConnection(server.port) as connection:
        _fill(server, _PER_OWNER, ended=True)  # from now on the server has the scripts
        for kind, ended, at_most in (("live", False, None), ("ended", True, _AT_MOST)):
            name = f"memory, {kind} flow"
            in_all, by_key = [], []
            for _ in range(plan.repeats):
                in_all.append(_growth(server, client, some, ended=ended))
                by_key.append(_by_key(client, connection, some))
            once = _growth(server, client, many, ended=ended)
            yield alone(f"{name}, of {some:,}", in_all, unit="bytes", at_most=at_most)
            yield alone(f"{name}, of {many:,}, once", [once], unit="bytes", at_most=at_most)
            for part in by_key[0]:
                yield alone(f"{name}: {part}", [sizes[part] for sizes in by_key], unit="bytes")
            points = [
                (few, _growth(server, client, few, ended=ended)),
                (some, statistics.median(in_all)),
                (many, once),
            ]
            yield Curve("Memory of a flow", kind, "flows in the store", "bytes per flow", points)


def _growth(server: Server, client: redis.Redis, flows: int, *, ended: bool) -> float:
    """What `used_memory` grows by for each of so many flows."""
    client.execute_command("FLUSHALL", "SYNC")  # type: ignore[no-untyped-call]  # redis-py's own call leaves out SYNC
    before = client.info("memory")["used_memory"]
    _fill(server, flows, ended=ended)
    return float(client.info("memory")["used_memory"] - before) / flows


def _by_key(client: redis.Redis, connection: RawConnection, flows: int) -> dict[str, float]:
    """`MEMORY USAGE` of every key there is, summed by what it belongs to, for each of so many flows."""
    sizes: Counter[str] = Counter()
    keys: list[bytes] = list(client.scan_iter(count=_PER_PACKET))
    for start in range(0, len(keys), _PER_PACKET):
        packet = keys[start : start + _PER_PACKET]
        asked = pack([(b"MEMORY", b"USAGE", key, b"SAMPLES", b"0") for key in packet])
        for key, size in zip(packet, connection.exchange(asked, len(packet)), strict=True):
            kind, _, _ = key.partition(b"}:")[2].partition(b":")
            sizes[_OF_INDEXES.get(kind, "own keys")] += size
    return {part: sizes[part] / flows for part in ("own keys", "owner index", "other indexes")}


def _fill(server: Server, flows: int, *, ended: bool) -> None:
    async def fill() -> None:
        owners = iter(range(flows // _PER_OWNER))
        async with AsyncFlowManager.from_url(server.url, prefix="memory") as manager:

            async def live() -> None:
                for _ in owners:
                    owner = f"agent:kate:session:{uuid4().hex[:12]}"
                    for _ in range(_PER_OWNER):
                        flow = await _lived(manager, owner, ended=ended)
                        assert len(flow.state) == 10

            await asyncio.gather(*(live() for _ in range(_CALLERS)))

    asyncio.run(fill())


async def _lived(flows: AsyncFlowManager, owner: str, *, ended: bool) -> Flow:
    """Make a flow with ten state keys and five events."""
    flow = await flows.create_managed(
        controller_id="kate/inbox",
        goal="triage inbox",
        owner_session_key=owner,
        requester_origin="user-1",
        current_step="classify",
        state=_CREATED,
    )
    flow = await flows.start_running(flow)
    flow = await flows.update_state(flow, _FIRST)
    flow = await flows.update_state(flow, _LATER, next_step="fetch")
    return await (flows.finish(flow, _LAST) if ended else flows.update_state(flow, _LAST))
