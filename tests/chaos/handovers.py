"""Calls whose outcome is unknown, which other processes settle by the operation's id."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from random import Random
from typing import Any, ClassVar
from uuid import UUID

from redisflow import AsyncFlowManager, Flow, FlowError, FlowManager, OutcomeUnknown
from tests.chaos.crowd import Crowd, Writer, any_change, asked, flow_ids
from tests.chaos.findings import Breach, Finding
from tests.chaos.ledger import Ask, End, Entry, Life
from tests.chaos.tally import DEADLINE_S

_GROUPS, _MEMBERS, _CALLS = {"sync": 3, "asyncio": 8}, 4, 40
_MOST_TRIES = 5

_flows: FlowManager  # of a settling process


def _open(url: str, prefix: str) -> None:
    global _flows  # noqa: PLW0603 - a process has one
    _flows = FlowManager.from_url(url, prefix=prefix, deadline_s=DEADLINE_S)


def _settle(ask: Ask, op_id: str) -> tuple[End, Flow | None, FlowError | None]:
    """Call again with the id of the operation."""
    try:
        answer = ask.of(_flows, op_id=op_id)
    except OutcomeUnknown as error:
        return End.UNKNOWN, None, error
    except FlowError as error:
        return End.REFUSED, None, error
    parts = answer if isinstance(answer, tuple) else (answer,)
    return End.DONE, next((part for part in parts if isinstance(part, Flow)), None), None


def _ready() -> None:
    _flows.connect()


class Handovers(Crowd):
    """Writers that give up soon, and two processes that settle what they gave up: one of them, or both at once."""

    deadline_s: ClassVar[float] = 0.15  # one attempt

    def __init__(self, shell: str, seed: int, url: str, prefix: str) -> None:
        super().__init__(seed)
        self._groups = _GROUPS[shell]
        self._where = url, prefix
        self._processes: list[ProcessPoolExecutor] = []
        self._deleted: set[UUID] = set()

    def prepare(self, flows: FlowManager) -> None:
        """Start the processes that settle."""
        flows.connect()
        context = multiprocessing.get_context("spawn")
        for _ in range(2):
            self._processes.append(ProcessPoolExecutor(1, context, _open, self._where))
        for ready in [process.submit(_ready) for process in self._processes]:
            ready.result(60)

    def in_threads(self, make: Callable[[], FlowManager]) -> None:
        """Write until stopped, and end the processes."""
        try:
            super().in_threads(make)
        finally:
            self._end()

    async def in_tasks(self, make: Callable[[], AsyncFlowManager]) -> None:
        """Write until stopped, and end the processes."""
        try:
            await super().in_tasks(make)
        finally:
            self._end()

    def _end(self) -> None:
        for process in self._processes:
            process.shutdown()

    def writers(self) -> Sequence[Writer]:
        """Make groups of writers that share a flow at a time."""
        writers = []
        for _ in range(self._groups):
            ids = [flow_id for flow_id, _ in zip(flow_ids(self.chance), range(1000), strict=False)]
            writers += [self._member(ids, number, Random(self.chance.random())) for number in range(_MEMBERS)]
        return writers

    def _member(self, ids: Sequence[UUID], number: int, chance: Random) -> Writer:
        own = flow_ids(chance)
        for flow_id in ids:
            held: Flow | None = None
            if number == 0:
                yield from self._sure(asked(self.ledger, "create_mirrored", flow_id), chance)
            for _ in range(_CALLS):
                if self.stopped.is_set():
                    return
                if chance.random() < 0.05:
                    yield from self._short_life(next(own), chance)
                came: Entry = yield from self._sure(any_change(self.ledger, chance, flow_id, held), chance)
                held = came.flow or held

    def _short_life(self, flow_id: UUID, chance: Random) -> Writer:
        """Create a flow that is nobody else's, and delete it."""
        created: Entry = yield from self._sure(asked(self.ledger, "create_managed", flow_id), chance)
        if created.end is not End.DONE:
            return
        self._deleted.add(flow_id)
        deleted: Entry = yield from self._sure(Ask("delete", flow_id), chance)
        if deleted.end is End.DONE and deleted.answer is False:
            self.findings.append(Finding(Breach.ANSWER, flow_id, f"nobody else deleted it: {deleted}"))
        if deleted.end is End.REFUSED:
            self._deleted.discard(flow_id)

    def _sure(self, ask: Ask, chance: Random) -> Any:
        """Make a call. Where its outcome is unknown, have it settled."""
        came: Entry = yield ask
        if came.end is End.UNKNOWN:
            how_many = chance.choice([1, 2, 2])
            processes = chance.sample(self._processes, how_many)
            pause_s = chance.choice([0.0, 0.0, 0.3])
            yield lambda: self._hand_over(came, processes, pause_s)
        return came

    def _hand_over(self, entry: Entry, processes: Sequence[ProcessPoolExecutor], pause_s: float) -> None:
        """Have a call settled, by all these processes at the same time, until none of them is in doubt."""
        assert isinstance(entry.error, OutcomeUnknown)
        ask, op_id = entry.ask, entry.error.op_id
        time.sleep(pause_s)
        outcomes: list[tuple[End, Flow | None, FlowError | None]] = []
        ends: list[End] = [End.UNKNOWN]
        tries = 0
        while End.UNKNOWN in ends and tries < _MOST_TRIES:
            tries += 1
            started: list[Future[Any]] = [process.submit(_settle, ask, op_id) for process in processes]
            outcomes = [one.result() for one in started]
            ends = [end for end, _, _ in outcomes]
        # What one of them was refused another may have done a moment later.
        entry.end = next((end for end in (End.DONE, End.UNKNOWN) if end in ends), End.REFUSED)
        entry.answer = next((flow for end, flow, _ in outcomes if end is End.DONE), None)
        if entry.end is not End.DONE:
            entry.error = next(error for end, _, error in outcomes if end is entry.end)
        entry.returned_s = time.monotonic()
        self.tally.settled += entry.end is not End.UNKNOWN
        if entry.end is End.UNKNOWN:
            self.findings.append(Finding(Breach.UNKNOWN, entry.ask.flow_id, f"not settled: {entry}"))

    def lives(self, flows: FlowManager) -> Mapping[UUID, Sequence[Life]]:
        """Read all trails. Of flows that were deleted there is none."""
        gone = {flow_id: [Life([], is_over=True, is_certain=False)] for flow_id in self._deleted}
        for flow_id in self._deleted:
            if flows.get(flow_id) is not None:
                self.findings.append(Finding(Breach.ANSWER, flow_id, "it was deleted, and is there"))
        return {**super().lives(flows), **gone}
