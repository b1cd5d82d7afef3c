"""Writers that call and note: what was asked and answered, and when, and which changes were acknowledged."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from random import Random
from typing import Any
from uuid import UUID

import attrs

from redisflow import (
    AsyncFlowManager,
    Flow,
    FlowError,
    FlowEvent,
    FlowManager,
    NotDurable,
    OutcomeUnknown,
    StorageError,
)
from tests.chaos.crowd import Judged, Workload
from tests.chaos.findings import Acknowledged
from tests.chaos.history import UNKNOWN, Operation, Outcome, Undecided, Violation, check
from tests.chaos.simulated import Choose, any_call, any_update
from tests.chaos.specification import CREATIONS, READS, Noted, Refusal, Version
from tests.chaos.tally import Tally
from tests.support.resends import IDENTITY

MEMBERS, CALLS = 4, 25  # of a team, and of each of them on one flow


class Recorder:
    """Notes the calls on one flow.

    Where a failover may lose what replicas have not confirmed, only confirmed changes count: what a read or a refusal
    has seen may be gone a moment later.
    """

    def __init__(self, flow_id: UUID, tally: Tally, *, changes_only: bool = False) -> None:
        self.flow_id = flow_id
        self.history: list[Operation] = []
        self.acknowledged: list[Acknowledged] = []
        self._unconfirmed: list[tuple[Operation, Flow]] = []
        self._tally = tally
        self._changes_only = changes_only

    def call(self, flows: FlowManager, process: int, verb: str, arguments: dict[str, Any], ref: Any) -> Flow | None:
        """Call a verb; return the flow, where it answered with one."""
        with self._noting(process, verb, arguments) as noting:
            noting.answer = getattr(flows, verb)(*self._place(verb, ref), **self._all(verb, arguments))
        return noting.flow

    async def acall(
        self, flows: AsyncFlowManager, process: int, verb: str, arguments: dict[str, Any], ref: Any
    ) -> Flow | None:
        """Call a verb, and return the flow, in asyncio."""
        with self._noting(process, verb, arguments) as noting:
            noting.answer = await getattr(flows, verb)(*self._place(verb, ref), **self._all(verb, arguments))
        return noting.flow

    def _place(self, verb: str, ref: Any) -> tuple[Any, ...]:
        return () if verb in CREATIONS else (ref,)

    def _all(self, verb: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return {**IDENTITY, "flow_id": self.flow_id, **arguments} if verb in CREATIONS else arguments

    @contextmanager
    def _noting(self, process: int, verb: str, arguments: dict[str, Any]) -> Iterator[_Noting]:
        noting, tally, invoked_s = _Noting(), self._tally, time.monotonic()
        outcome: Outcome
        seen = True
        try:
            yield noting
        except OutcomeUnknown as error:
            outcome = UNKNOWN
            tally.doubt(error, time.monotonic() - invoked_s)
        except NotDurable as error:
            outcome, noting.flow = UNKNOWN, error.flow
            tally.not_durable += 1
        except StorageError as error:
            tally.not_carried_out[error.code or type(error.__cause__).__name__] += 1
            seen = False
            outcome = None
        except FlowError as error:
            outcome = Refusal.of(error)
            seen = not self._changes_only
        else:
            outcome = self._answered(verb, noting)
            seen = not (self._changes_only and verb in READS)
        returned_s = time.monotonic()
        tally.operations += 1
        tally.longest_s = max(tally.longest_s, returned_s - invoked_s)
        if seen:
            operation = Operation(process, verb, arguments, invoked_s, returned_s, outcome)
            self.history.append(operation)
            if outcome is UNKNOWN and noting.flow is not None:
                self._unconfirmed.append((operation, noting.flow))

    def confirm(self, flows: FlowManager) -> None:
        """Take for answered what replicas had not confirmed in time, and was not lost: it is in the trail."""
        if self._unconfirmed:
            kept = {event.op_id for event in flows.iter_events(self.flow_id)}
            for operation, flow in self._unconfirmed:
                if flow.etag in kept:
                    place = self.history.index(operation)
                    self.history[place] = attrs.evolve(operation, outcome=Version.of(flow))

    def _answered(self, verb: str, noting: _Noting) -> Outcome:
        answer = noting.answer
        if isinstance(answer, FlowEvent):
            self.acknowledged.append(Acknowledged(self.flow_id, answer.op_id, answer.revision, answer.kind))
            return Noted(answer.revision)
        if not isinstance(answer, Flow):
            return None
        noting.flow = answer
        if verb not in READS:
            self.acknowledged.append(Acknowledged(self.flow_id, answer.etag, answer.revision))
        return Version.of(answer)


@attrs.define
class _Noting:
    """What a call has come to."""

    answer: Any = None
    flow: Flow | None = None


class Teams(Workload):
    """Teams of writers, each with one flow after the other, until they are told to stop."""

    def __init__(self, how_many: int, seed: int, *, changes_only: bool) -> None:
        super().__init__()
        self.how_many = how_many
        self.seed = seed
        self.changes_only = changes_only
        self.recorders: list[Recorder] = []
        self.ready.set()

    def in_threads(self, make: Callable[[], FlowManager]) -> None:
        """Write until stopped, with a manager for each team."""

        def team(number: int) -> None:
            with make() as flows, ThreadPoolExecutor(MEMBERS) as members:
                for recorder, choose, chance in self._rounds(number):
                    jobs = [
                        members.submit(_write, recorder, flows, n, choose, Random(chance.random()))
                        for n in range(MEMBERS)
                    ]
                    for job in jobs:
                        job.result()

        with ThreadPoolExecutor(self.how_many) as pool:
            for done in [pool.submit(team, number) for number in range(self.how_many)]:
                done.result()

    async def in_tasks(self, make: Callable[[], AsyncFlowManager]) -> None:
        """Write until stopped, all teams with one manager."""

        async def team(flows: AsyncFlowManager, number: int) -> None:
            for recorder, choose, chance in self._rounds(number):
                await asyncio.gather(
                    *(_awrite(recorder, flows, n, choose, Random(chance.random())) for n in range(MEMBERS))
                )

        async with make() as flows:
            await asyncio.gather(*(team(flows, number) for number in range(self.how_many)))

    def judged(self, flows: FlowManager) -> Judged:
        """Look at each flow once more, and hold its history against the rules."""
        violations: list[Violation] = []
        undecided = 0
        for recorder in self.recorders:
            recorder.call(flows, MEMBERS, "get", {}, recorder.flow_id)
            recorder.confirm(flows)
            try:
                violation = check(recorder.history)
            except Undecided:
                undecided += 1
            else:
                violations += [] if violation is None else [violation]
        return Judged(
            flows=len(self.recorders),
            acknowledged=[change for recorder in self.recorders for change in recorder.acknowledged],
            violations=violations,
            undecided=undecided,
        )

    def _rounds(self, number: int) -> Iterator[tuple[Recorder, Choose, Random]]:
        chance = Random(f"{self.seed} {number}")
        while not self.stopped.is_set():
            flow_id = UUID(int=chance.getrandbits(128), version=4)
            recorder = Recorder(flow_id, self.tally, changes_only=self.changes_only)
            self.recorders.append(recorder)
            yield recorder, chance.choice([any_call, any_update]), chance


_Calls = Generator[tuple[str, dict[str, Any], Any], Flow | None, None]


def _calls(recorder: Recorder, process: int, choose: Choose, chance: Random) -> _Calls:
    """The calls of one writer, by the copy it holds or by the id. It is sent what each came to."""
    held: Flow | None = None
    if process == 0:
        held = yield "create_mirrored", {"state": {"n": 0}}, None
    for _ in range(CALLS):
        verb, arguments = choose(chance, held.revision if held else 0)
        ref = held if held and chance.random() < 0.7 else recorder.flow_id
        came_to: Flow | None = yield verb, arguments, ref
        held = came_to or held


def _write(recorder: Recorder, flows: FlowManager, process: int, choose: Choose, chance: Random) -> None:
    calls = _calls(recorder, process, choose, chance)
    came_to: Flow | None = None
    with suppress(StopIteration):
        while True:
            verb, arguments, ref = calls.send(came_to)
            came_to = recorder.call(flows, process, verb, arguments, ref)


async def _awrite(recorder: Recorder, flows: AsyncFlowManager, process: int, choose: Choose, chance: Random) -> None:
    calls = _calls(recorder, process, choose, chance)
    came_to: Flow | None = None
    with suppress(StopIteration):
        while True:
            verb, arguments, ref = calls.send(came_to)
            came_to = await recorder.acall(flows, process, verb, arguments, ref)
