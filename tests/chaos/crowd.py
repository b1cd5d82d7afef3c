"""Writers whose calls are known by tokens, in threads or in tasks."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack
from random import Random
from typing import Any, ClassVar
from uuid import UUID

import attrs

from redisflow import AsyncFlowManager, Flow, FlowManager, StepObservation
from tests.chaos.findings import Acknowledged, Finding
from tests.chaos.history import Violation
from tests.chaos.ledger import Ask, Entry, Ledger, Life
from tests.chaos.tally import DEADLINE_S, Tally

# Makes calls: one, several in one batch, or something to do aside. It is sent what they came to.
Writer = Generator[Ask | Sequence[Ask] | Callable[[], Any], Any, None]


@attrs.frozen(kw_only=True)
class Judged:
    """What a workload's writers can tell after all is over."""

    flows: int
    acknowledged: Sequence[Acknowledged] = ()
    findings: Sequence[Finding] = ()
    violations: Sequence[Violation] = ()
    undecided: int = 0


class Workload(ABC):
    """Writers, until they are told to stop.

    Attributes:
        deadline_s: theirs.
        ready: set when things may break: those with a short deadline are connected.
        stopped: set when the writers are to come to an end.
    """

    deadline_s: ClassVar[float] = DEADLINE_S

    def __init__(self) -> None:
        self.ready = threading.Event()
        self.tally = Tally(self.deadline_s)
        self.stopped = threading.Event()

    def prepare(self, flows: FlowManager) -> None:  # noqa: B027 - most need nothing
        """Make what must be there before anything breaks."""

    @abstractmethod
    def in_threads(self, make: Callable[[], FlowManager]) -> None:
        """Write until stopped."""

    @abstractmethod
    async def in_tasks(self, make: Callable[[], AsyncFlowManager]) -> None:
        """Write until stopped."""

    @abstractmethod
    def judged(self, flows: FlowManager) -> Judged:
        """Judge what the calls were answered, and tell what must be stored."""


class Crowd(Workload):
    """Writers that a ledger keeps count of.

    Attributes:
        managers: how many they share.
    """

    managers: ClassVar[int] = 3

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.ledger = Ledger(self.tally)
        self.findings: list[Finding] = []
        self.chance = Random(seed)

    @abstractmethod
    def writers(self) -> Sequence[Writer]:
        """Make all writers."""

    def in_threads(self, make: Callable[[], FlowManager]) -> None:
        """Write until stopped, a thread for each writer."""
        writers = self.writers()
        with ExitStack() as stack, ThreadPoolExecutor(len(writers)) as pool:
            managers = [stack.enter_context(make()) for _ in range(self.managers)]
            self.ready.set()
            jobs = [
                pool.submit(self._write, writer, managers[number % len(managers)])
                for number, writer in enumerate(writers)
            ]
            for job in jobs:
                job.result()

    async def in_tasks(self, make: Callable[[], AsyncFlowManager]) -> None:
        """Write until stopped, a task for each writer."""
        async with AsyncExitStack() as stack:
            managers = [await stack.enter_async_context(make()) for _ in range(self.managers)]
            self.ready.set()
            await asyncio.gather(
                *(
                    self._awrite(writer, managers[number % len(managers)])
                    for number, writer in enumerate(self.writers())
                )
            )

    def _write(self, writer: Writer, flows: FlowManager) -> None:
        try:
            wanted = next(writer)
            while True:
                came: Any
                if isinstance(wanted, Ask):
                    with self.ledger.noting(self.ledger.open(wanted)) as came:
                        came.answer = wanted.of(flows)
                elif callable(wanted):
                    came = wanted()
                else:
                    came = self._batch(wanted, flows)
                wanted = writer.send(came)
        except StopIteration:
            return
        except BaseException:
            self.stopped.set()
            raise

    def _batch(self, asks: Sequence[Ask], flows: FlowManager) -> Sequence[Entry]:
        entries = [self.ledger.open(ask) for ask in asks]
        self.ledger.batches.append(entries)
        with flows.batch() as batch:
            queued = [ask.of(batch) for ask in asks]
        for entry, one in zip(entries, queued, strict=True):
            with self.ledger.noting(entry):
                entry.answer = one.result()
        return entries

    async def _awrite(self, writer: Writer, flows: AsyncFlowManager) -> None:
        try:
            wanted = next(writer)
            while True:
                came: Any
                if isinstance(wanted, Ask):
                    with self.ledger.noting(self.ledger.open(wanted)) as came:
                        came.answer = await wanted.of(flows)
                else:
                    assert callable(wanted), "asyncio has no batches"
                    came = await asyncio.to_thread(wanted)
                wanted = writer.send(came)
        except StopIteration:
            return
        except BaseException:
            self.stopped.set()
            raise

    def lives(self, flows: FlowManager) -> Mapping[UUID, Sequence[Life]]:
        """Read all trails."""
        return {flow_id: [Life(list(flows.iter_events(flow_id)))] for flow_id in self.ledger.flow_ids()}

    def judged(self, flows: FlowManager) -> Judged:
        """Hold the ledger against the trails."""
        lives = self.lives(flows)
        findings = [*self.findings, *self.ledger.judged(lives)]
        lasting = [flow_id for flow_id, some in lives.items() if len(some) == 1 and not some[0].is_over]
        acknowledged = list(self.ledger.acknowledged(lasting))
        return Judged(flows=len(lives), acknowledged=acknowledged, findings=findings)


# --- calls with tokens -----------------------------------------------------------------------------------------

_WEIGHTS = {
    "update_state": 12,
    "append_event": 3,
    "resume": 3,
    "set_waiting": 2,
    "record_step_observation": 1,
    "update_and_append": 1,
}


def asked(ledger: Ledger, verb: str, ref: Flow | UUID, **more: Any) -> Ask:
    """Make a call of that verb with a token of its own."""
    token = ledger.token()
    flow_id = ref.id if isinstance(ref, Flow) else ref
    arguments: dict[str, dict[str, Any]] = {
        "create_managed": {"goal": token, "state": {"n": 0}},
        "create_mirrored": {"goal": token, "state": {"n": 0}},
        "start_running": {},
        "update_state": {"patch": {"token": token}, "increment": {"n": 1}},
        "append_event": {"kind": "note", "payload": {"token": token}},
        "resume": {"state_patch": {"token": token}},
        "set_waiting": {"wait": {"kind": "chaos", "token": token}},
        "finish": {"final_state": {"token": token}},
        "record_step_observation": {"observation": StepObservation(flow_id, token, "task", "running")},
        "update_and_append": {"kind": "rewritten", "payload": {"token": token}},
    }
    return Ask(verb, ref, {**arguments[verb], **more}, token if verb != "start_running" else "")


def any_change(ledger: Ledger, chance: Random, flow_id: UUID, held: Flow | None) -> Ask:
    """Draw a change that leaves the flow alive, by its id or by the copy that is held."""
    verb = chance.choices([*_WEIGHTS], [*_WEIGHTS.values()])[0]
    ref = held if held is not None and chance.random() < 0.6 else flow_id
    more: dict[str, Any] = {}
    if held is not None and chance.random() < 0.15:
        more["expected_revision"] = held.revision
    if chance.random() < 0.2:
        more["op_id"] = UUID(int=chance.getrandbits(128), version=4)
    if verb == "update_and_append":
        if held is None:
            verb = "update_state"
        else:
            more.pop("expected_revision", None)
            ref = attrs.evolve(held, current_step=f"s{chance.randint(0, 9)}")
    return asked(ledger, verb, ref, **more)


def flow_ids(chance: Random) -> Iterator[UUID]:
    """Draw ids of flows."""
    while True:
        yield UUID(int=chance.getrandbits(128), version=4)
