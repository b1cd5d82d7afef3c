"""`python -m tests.chaos`: break things for a while, and tell what came of it."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from secrets import randbelow

from rich.console import Console
from rich.table import Table

from tests.chaos.findings import Breach, Damage
from tests.chaos.suite import SCENARIOS, Verdict, run
from tests.support.servers import ENGINES

_LEAST_WIDTH = 200  # what the table takes


def main() -> int:
    """Run the scenarios in turn until the time is up. Returns 1 if anything was found that must not be."""
    scenarios = {
        f"{name}-{shell}": scenario.slice_s for name, scenario in SCENARIOS.items() for shell in scenario.shells
    }
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=main.__doc__)
    parser.add_argument("--minutes", type=float, default=40.0, help="how long, all scenarios together (40)")
    parser.add_argument("--seed", type=int, default=randbelow(10**6), help="of faults and calls; a random one")
    parser.add_argument("--only", action="append", choices=scenarios, help="a scenario; may be repeated")
    parser.add_argument("--engine", choices=[engine.name for engine in ENGINES], help="otherwise all of them in turn")
    options = parser.parse_args()
    console = Console(width=max(Console().width, _LEAST_WIDTH))
    engines = [engine for engine in ENGINES if options.engine in {None, engine.name}]
    chosen = options.only or list(scenarios)
    # In each turn every scenario has its slice, on fresh servers. The slices are then made to fill the time.
    turn_s = sum(scenarios[scenario] for scenario in chosen)
    turns = max(1, round(options.minutes * 60 / turn_s))
    stretch = options.minutes * 60 / turns / turn_s
    console.print(f"seed {options.seed}: {len(chosen)} scenarios, {turns} turns of {stretch * turn_s:.0f} s")
    verdicts = []
    for turn in range(turns):
        for place, scenario in enumerate(chosen, turn):  # each scenario on another engine than the turn before
            name, _, shell = scenario.partition("-")
            engine, seconds = engines[place % len(engines)], stretch * scenarios[scenario]
            verdict = run(name, shell, engine, seconds=seconds, seed=options.seed + turn)
            verdicts.append(verdict)
            console.print(_line(verdict))
            for flaw in verdict.flaws[:5]:
                console.print(flaw, markup=False, highlight=False)
    console.print(table(verdicts))
    return int(any(verdict.flaws for verdict in verdicts))


def _line(verdict: Verdict) -> str:
    return (
        f"{verdict.scenario}: {verdict.operations:,} operations, {verdict.faults.total()} faults, "
        f"{verdict.kills} kills, {verdict.late} late commands, {len(verdict.flaws)} flaws, {verdict.unknown} unknown, "
        f"{verdict.settled} settled, "
        f"longest stall {verdict.longest_s:.1f} s"
    )


def table(verdicts: Sequence[Verdict]) -> Table:
    """All of it, and the sum."""
    made = Table(title="What came of it")
    made.add_column("scenario")
    for heading in (
        "operations", "faults", "kills", "late", "applied twice", "lost", "refused yet applied", "out of order",
        "not linearizable", "other mismatches", "undecided", "unknown", "settled by others", "not durable",
        "not carried out", "longest stall, s",
    ):  # fmt: skip
        made.add_column(heading, justify="right")
    rows = [(verdict.scenario, _figures(verdict)) for verdict in verdicts]
    for name, figures in rows:
        made.add_row(name, *(f"{figure:,}" for figure in figures))
    made.add_section()
    sums = [sum(column) for column in zip(*(figures for _, figures in rows), strict=True)]
    sums[-1] = max(figures[-1] for _, figures in rows)
    made.add_row("all", *(f"{figure:,}" for figure in sums), style="bold")
    return made


def _figures(verdict: Verdict) -> list[float]:
    twice, lost = verdict.found(Damage.OP_TWICE), verdict.found(Damage.LOST)
    refused, disordered = verdict.found(Breach.REFUSED, Breach.LATE), verdict.found(Breach.ORDER)
    return [
        verdict.operations,
        verdict.faults.total(),
        verdict.kills,
        verdict.late,
        twice,
        lost,
        refused,
        disordered,
        len(verdict.violations),
        len(verdict.findings) - twice - lost - refused - disordered,
        verdict.undecided,
        verdict.unknown,
        verdict.settled,
        verdict.not_durable,
        verdict.not_carried_out.total(),
        round(verdict.longest_s, 1),
    ]


if __name__ == "__main__":
    warnings.simplefilter("ignore", RuntimeWarning)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # the proxy goes on writing to a connection that is gone
    sys.exit(main())
