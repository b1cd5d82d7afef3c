"""What both LangGraph savers store per change: a checkpoint of a thread, a new version of all its channels.

Per change, `put(config, checkpoint, metadata, new_versions)`: a checkpoint with the ten values, a new version for
each of the two channels that changed, and metadata that names the step and the patch; its parent is the one before.
That is what a graph does at the end of each super-step and in `update_state`
(https://docs.langchain.com/oss/python/langgraph/persistence), without the graph: what surrounds it is not charged to
the saver. A record is a thread, and its holder keeps the last config, as a running graph does; nothing is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.base.id import uuid6

from benchmarks.peers.contract import STATE, patch_of


class Thread:
    def __init__(self) -> None:
        self.id = str(uuid4())
        self.config: Any = {"configurable": {"thread_id": self.id, "checkpoint_ns": ""}}
        self._versions = dict.fromkeys(STATE, 1)
        self._state = dict(STATE)

    @property
    def read_config(self) -> Any:
        """Names the thread, and so its newest checkpoint."""
        return {"configurable": {"thread_id": self.id, "checkpoint_ns": ""}}

    def first(self) -> tuple[Any, Any, Any, Any]:
        """The arguments of the `put` that creates it."""
        return self._put(-1, STATE)

    def next(self, number: int) -> tuple[Any, Any, Any, Any]:
        """The arguments of the `put` of a change."""
        patch = patch_of(number)
        self._state |= patch
        self._versions |= dict.fromkeys(patch, number + 1)
        return self._put(number, patch)

    def _put(self, step: int, writes: Mapping[str, Any]) -> tuple[Any, Any, Any, Any]:
        checkpoint = {
            **empty_checkpoint(),
            "id": str(uuid6(clock_seq=step)),
            "ts": datetime.now(UTC).isoformat(),
            "channel_values": dict(self._state),
            "channel_versions": dict(self._versions),
        }
        metadata = {"source": "update", "step": step, "writes": dict(writes), "parents": {}}
        return self.config, checkpoint, metadata, {key: self._versions[key] for key in writes}
