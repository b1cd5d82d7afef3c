"""redisflow, called by asyncio tasks. All else is as in `redisflow_sync.py`."""

from __future__ import annotations

import warnings
from importlib.metadata import version
from pathlib import Path

from benchmarks.peers.contract import KIND, STATE, Stored, TasksPeer, patch_of
from redisflow import AsyncFlowManager, Flow


class Redisflow(TasksPeer):
    async def open(self, folder: Path, redis_url: str) -> None:  # noqa: ARG002  # the server has its own
        warnings.filterwarnings("ignore", message="the server keeps nothing")  # on purpose, unless the row says AOF
        self._flows = AsyncFlowManager.from_url(redis_url, prefix="peers")
        self._held: list[Flow] = []

    async def about(self) -> str:
        return f"redisflow {version('redisflow')}, redis-py {version('redis')}"

    async def create(self, records: int) -> None:
        self._held = [
            await self._flows.create_mirrored(
                controller_id="kate/inbox",
                goal="triage inbox",
                owner_session_key="agent:kate",
                requester_origin="user-1",
                current_step="classify",
                state=STATE,
            )
            for _ in range(records)
        ]

    async def change(self, record: int, number: int) -> bool:
        self._held[record] = await self._flows.update_state(self._held[record], patch_of(number))
        return True

    async def stored(self, record: int) -> Stored:
        flow = await self._flows.get(self._held[record].id)
        assert flow is not None
        events = await self._flows.list_events(flow, limit=None)
        return Stored(flow.state, sum(event.kind == KIND for event in events))

    async def close(self) -> None:
        await self._flows.aclose()
