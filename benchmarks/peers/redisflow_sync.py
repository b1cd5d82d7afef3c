"""redisflow, called by threads. Runs with the interpreter of the benchmarks, not in the peers' environment.

Per change: `flow = flows.update_state(flow, patch)`, passing the flow the call before returned, as the README has it.
Callers of one shared flow pass the newest copy this process has seen. One round trip of one Lua script: guards, the
changed keys, the revision, the index by status, the event, all or nothing.

Guarantees: applied exactly once even when a reply is lost; change and event together; no update lost; any number of
processes. Durable after a crash of the server: as the server is configured (the rows say how); a crash of the client
loses nothing. History: every event with its patch, in a stream per flow.
"""

from __future__ import annotations

import warnings
from importlib.metadata import version
from pathlib import Path

from benchmarks.peers.contract import KIND, STATE, Stored, ThreadsPeer, patch_of
from redisflow import Flow, FlowManager


class Redisflow(ThreadsPeer):
    def open(self, folder: Path, redis_url: str) -> None:  # noqa: ARG002  # the server has its own
        warnings.filterwarnings("ignore", message="the server keeps nothing")  # on purpose, unless the row says AOF
        self._flows = FlowManager.from_url(redis_url, prefix="peers")
        self._held: list[Flow] = []

    def about(self) -> str:
        return f"redisflow {version('redisflow')}, redis-py {version('redis')}"

    def create(self, records: int) -> None:
        self._held = [
            self._flows.create_mirrored(
                controller_id="kate/inbox",
                goal="triage inbox",
                owner_session_key="agent:kate",
                requester_origin="user-1",
                current_step="classify",
                state=STATE,
            )
            for _ in range(records)
        ]

    def change(self, record: int, number: int) -> bool:
        self._held[record] = self._flows.update_state(self._held[record], patch_of(number))
        return True

    def stored(self, record: int) -> Stored:
        flow = self._flows.get(self._held[record].id)
        assert flow is not None
        events = self._flows.list_events(flow, limit=None)
        return Stored(flow.state, sum(event.kind == KIND for event in events))

    def close(self) -> None:
        self._flows.close()
