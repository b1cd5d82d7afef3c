"""Runs a workload while things break, and judges what came of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import attrs

from redisflow import AsyncFlowManager, FlowManager
from redisflow.scripts import Appending
from tests.chaos.auditor import audit
from tests.chaos.batches import Batches
from tests.chaos.crowd import Workload
from tests.chaos.findings import Breach, Damage, Finding
from tests.chaos.handovers import Handovers
from tests.chaos.history import Violation
from tests.chaos.hot import Hot
from tests.chaos.lone import Crowded, Doubtful, Forgetful, LatePackets
from tests.chaos.rebirths import Rebirths
from tests.chaos.stages import PREFIX, STAGES, Stage
from tests.chaos.workload import Teams
from tests.support.servers import Engine

SHELLS = {"sync": 3, "asyncio": 12}  # how many teams
_STARTING_S = 20.0  # of a stage, at most: its writers are not the only ones at work


@attrs.frozen(kw_only=True)
class Scenario:
    """What is done, and where.

    Attributes:
        stage: makes the stage.
        workload: makes the workload for a shell, a seed and a stage.
        shells: those it is for.
        slice_s: seconds of one turn.
    """

    stage: Callable[[Engine], Stage]
    workload: Callable[[str, int, Stage], Workload]
    shells: Sequence[str] = tuple(SHELLS)
    slice_s: float = 25.0


def _teams(shell: str, seed: int, stage: Stage) -> Workload:
    return Teams(SHELLS[shell], seed, changes_only=stage.losable)


SCENARIOS: dict[str, Scenario] = {
    # A failover takes its time.
    **{name: Scenario(stage=stage, workload=_teams, slice_s=40.0) for name, stage in STAGES.items()},
    "late": Scenario(stage=LatePackets, workload=_teams),
    "reborn": Scenario(stage=LatePackets, workload=lambda shell, seed, _: Rebirths(shell, seed)),
    "batches": Scenario(stage=Forgetful, workload=lambda _, seed, __: Batches(seed), shells=("sync",)),
    "handover": Scenario(stage=Doubtful, workload=lambda shell, seed, stage: Handovers(shell, seed, stage.url, PREFIX)),
    "hot": Scenario(stage=Crowded, workload=lambda shell, seed, _: Hot(shell, seed)),
}


@attrs.frozen(kw_only=True)
class Verdict:
    """What a run came to."""

    scenario: str
    seed: int
    seconds: float
    operations: int
    faults: Counter[str]
    kills: int
    late: int
    unknown: int
    settled: int
    not_durable: int
    not_carried_out: Counter[str]
    longest_s: float
    flows: int
    violations: Sequence[Violation]
    undecided: int
    findings: Sequence[Finding]

    def found(self, *damages: Damage | Breach) -> int:
        """How many findings are of those kinds."""
        return sum(finding.damage in damages for finding in self.findings)

    @property
    def flaws(self) -> list[str]:
        """All that must not be, as text."""
        return [*map(str, self.violations), *map(str, self.findings)]


def run(
    name: str, shell: str, engine: Engine, *, seconds: float, seed: int, appending: Appending | None = None
) -> Verdict:
    """Let writers loose on a stage for so long, one fault after the other, and judge.

    Args:
        name: of the scenario.
        shell: of the managers that write.
        engine: the servers'.
        seconds: how long things break.
        seed: of faults and calls.
        appending: the scripts that the writers use, if not the library's.
    """
    scenario = SCENARIOS[name]
    with scenario.stage(engine) as stage:
        workload = scenario.workload(shell, seed, stage)
        options: dict[str, Any] = {
            "prefix": PREFIX,
            "deadline_s": workload.deadline_s,
            "durability": stage.durability,
        }
        failures: list[BaseException] = []

        def made(kind: type[Any]) -> Any:
            flows = kind.from_url(stage.url, **options)
            flows.namespace.appending = appending or flows.namespace.appending
            return flows

        def write() -> None:
            try:
                if shell == "sync":
                    workload.in_threads(lambda: made(FlowManager))
                else:
                    asyncio.run(workload.in_tasks(lambda: made(AsyncFlowManager)))
            except BaseException as error:  # noqa: BLE001 - raised again below
                failures.append(error)
                workload.stopped.set()
                workload.ready.set()

        with FlowManager.from_url(stage.url, **{**options, "deadline_s": _STARTING_S}) as flows:
            workload.prepare(flows)  # the namespace is there before anything breaks
        writing = threading.Thread(target=write)
        writing.start()
        workload.ready.wait(_STARTING_S)
        began_s = time.monotonic()
        try:
            faults = _break(stage, Random(seed), began_s + seconds, workload.stopped)
        finally:
            workload.stopped.set()
            writing.join(180)
        assert not writing.is_alive(), "a writer does not come to an end"
        if failures:
            raise failures[0]
        took_s = time.monotonic() - began_s
        stage.await_healthy()
        about = {"scenario": f"{name}, {shell}, {engine}", "seed": seed, "seconds": took_s, "faults": faults}
        return _judged(stage, workload, about)


def _break(stage: Stage, chance: Random, until_s: float, stopped: threading.Event) -> Counter[str]:
    """Break one thing after the other."""
    faults, done = stage.faults(), Counter[str]()
    order: list[str] = []
    while time.monotonic() < until_s and not stopped.is_set():
        order = order or chance.sample(list(faults), len(faults))  # each as often as the others
        name = order.pop()
        with faults[name](chance):
            time.sleep(chance.uniform(0.2, 1.5))
        done[name] += 1
        time.sleep(chance.uniform(*stage.pauses_s))
    return done


def _judged(stage: Stage, workload: Workload, about: dict[str, Any]) -> Verdict:
    with FlowManager.from_url(stage.url, prefix=PREFIX) as flows:
        judged = workload.judged(flows)
    tally = workload.tally
    return Verdict(
        **about,
        operations=tally.operations,
        kills=stage.kills,
        late=stage.late,
        unknown=tally.unknown - tally.settled,
        settled=tally.settled,
        not_durable=tally.not_durable,
        not_carried_out=tally.not_carried_out,
        longest_s=tally.longest_s,
        flows=judged.flows,
        violations=judged.violations,
        undecided=judged.undecided,
        findings=[
            *judged.findings,
            *_in_doubt(stage, workload),
            *audit(stage.clients(), PREFIX, judged.acknowledged),
        ],
    )


def _in_doubt(stage: Stage, workload: Workload) -> list[Finding]:
    """Find outcomes that must have been known, and what was applied when nothing was unknown any more."""
    tally = workload.tally
    left = tally.unknown - tally.settled
    unexplained = left if stage.comes_back else tally.early  # nothing but the deadline is a reason
    findings = [] if left else [*stage.findings]
    if unexplained:
        findings.append(Finding(Breach.UNKNOWN, None, f"{unexplained} calls: {'; '.join(tally.told)}"))
    return findings
