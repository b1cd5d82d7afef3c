"""Runs a workload while things break, and judges what came of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any

import attrs

from redisflow import AsyncFlowManager, FlowManager
from tests.chaos.auditor import audit
from tests.chaos.findings import Damage, Finding
from tests.chaos.history import Undecided, Violation, check
from tests.chaos.stages import PREFIX, STAGES, Stage
from tests.chaos.workload import MEMBERS, Recorder, Teams
from tests.support.servers import Engine

SHELLS = {"sync": 3, "asyncio": 12}  # how many teams
DEADLINE_S = 20.0


@attrs.frozen(kw_only=True)
class Verdict:
    """What a run came to."""

    scenario: str
    seed: int
    seconds: float
    operations: int
    faults: Counter[str]
    kills: int
    unknown: int
    not_durable: int
    not_carried_out: Counter[str]
    longest_s: float
    flows: int
    violations: Sequence[Violation]
    undecided: int
    findings: Sequence[Finding]

    def found(self, *damages: Damage) -> int:
        """How many findings are of those kinds."""
        return sum(finding.damage in damages for finding in self.findings)

    @property
    def flaws(self) -> list[str]:
        """All that must not be, as text."""
        return [*map(str, self.violations), *map(str, self.findings)]


def run(stage_name: str, shell: str, engine: Engine, *, seconds: float, seed: int) -> Verdict:
    """Let writers loose on a stage for so long, one fault after the other, and judge."""
    with STAGES[stage_name](engine) as stage:
        teams = Teams(SHELLS[shell], seed, stage.losable)
        options: dict[str, Any] = {"prefix": PREFIX, "deadline_s": DEADLINE_S, "durability": stage.durability}
        failures: list[BaseException] = []

        def write() -> None:
            try:
                if shell == "sync":
                    teams.in_threads(lambda: FlowManager.from_url(stage.url, **options))
                else:
                    asyncio.run(teams.in_tasks(lambda: AsyncFlowManager.from_url(stage.url, **options)))
            except BaseException as error:  # noqa: BLE001 - raised again below
                failures.append(error)
                teams.stopped.set()

        FlowManager.from_url(stage.url, **options).connect()  # the namespace is there before anything breaks
        writing = threading.Thread(target=write)
        began_s = time.monotonic()
        writing.start()
        try:
            faults = _break(stage, Random(seed), began_s + seconds, teams.stopped)
        finally:
            teams.stopped.set()
            writing.join(180)
        assert not writing.is_alive(), "a writer does not come to an end"
        if failures:
            raise failures[0]
        took_s = time.monotonic() - began_s
        stage.await_healthy()
        about = {"scenario": f"{stage_name}, {shell}, {engine}", "seed": seed, "seconds": took_s, "faults": faults}
        return _judged(stage, teams, about)


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
        time.sleep(chance.uniform(0.05, 0.3))
    return done


def _judged(stage: Stage, teams: Teams, about: dict[str, Any]) -> Verdict:
    with FlowManager.from_url(stage.url, prefix=PREFIX) as flows:
        for recorder in teams.recorders:
            recorder.call(flows, MEMBERS, "get", {}, recorder.flow_id)
            recorder.confirm(flows)
    violations, undecided = _checked(teams.recorders)
    acknowledged = [change for recorder in teams.recorders for change in recorder.acknowledged]
    tally = teams.tally
    return Verdict(
        **about,
        operations=tally.operations,
        kills=stage.kills,
        unknown=tally.unknown,
        not_durable=tally.not_durable,
        not_carried_out=tally.not_carried_out,
        longest_s=tally.longest_s,
        flows=len(teams.recorders),
        violations=violations,
        undecided=undecided,
        findings=audit(stage.clients(), PREFIX, acknowledged),
    )


def _checked(recorders: Sequence[Recorder]) -> tuple[list[Violation], int]:
    violations, undecided = [], 0
    for recorder in recorders:
        try:
            violation = check(recorder.history)
        except Undecided:
            undecided += 1
        else:
            violations += [] if violation is None else [violation]
    return violations, undecided
