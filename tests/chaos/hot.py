"""One flow with a long trail that many callers change at the same time."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import ClassVar
from uuid import UUID

from redisflow import Flow, FlowManager
from tests.chaos.crowd import Crowd, Writer, any_change, asked, flow_ids
from tests.chaos.ledger import Ask, Entry

_WRITERS = {"sync": 48, "asyncio": 200}
_TRAIL = 4000  # events that are there before anything breaks


class Hot(Crowd):
    """Tens of threads or hundreds of tasks, two managers, and one flow."""

    managers: ClassVar[int] = 2

    def __init__(self, shell: str, seed: int) -> None:
        super().__init__(seed)
        self._how_many = _WRITERS[shell]
        self._flow_id: UUID = next(flow_ids(self.chance))

    def prepare(self, flows: FlowManager) -> None:
        """Create the flow, and give it its trail."""
        self._batch([asked(self.ledger, "create_mirrored", self._flow_id)], flows)
        self._batch([asked(self.ledger, "update_state", self._flow_id) for _ in range(_TRAIL)], flows)

    def writers(self) -> Sequence[Writer]:
        """Make all writers."""
        return [self._writer(Random(self.chance.random())) for _ in range(self._how_many)]

    def _writer(self, chance: Random) -> Writer:
        held: Flow | None = None
        while not self.stopped.is_set():
            if chance.random() < 0.1:
                came: Entry = yield Ask("get", self._flow_id)
            else:
                came = yield any_change(self.ledger, chance, self._flow_id, held)
            held = came.flow or held
