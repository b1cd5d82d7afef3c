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

from tests.chaos.findings import Damage
from tests.chaos.stages import STAGES
from tests.chaos.suite import SHELLS, Verdict, run
from tests.support.servers import ENGINES

_LEAST_WIDTH = 160  # what the table takes
_SLICE_S = 60.0  # of a scenario, before it begins anew on fresh servers


def main() -> int:
    """Run the scenarios in turn until the time is up. Returns 1 if anything was found that must not be."""
    scenarios = [f"{stage}-{shell}" for stage in STAGES for shell in SHELLS]
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=main.__doc__)
    parser.add_argument("--minutes", type=float, default=40.0, help="how long, all scenarios together (40)")
    parser.add_argument("--seed", type=int, default=randbelow(10**6), help="of faults and calls; a random one")
    parser.add_argument("--only", action="append", choices=scenarios, help="a scenario; may be repeated")
    parser.add_argument("--engine", choices=[engine.name for engine in ENGINES], help="otherwise all of them in turn")
    options = parser.parse_args()
    console = Console(width=max(Console().width, _LEAST_WIDTH))
    engines = [engine for engine in ENGINES if options.engine in {None, engine.name}]
    chosen = options.only or scenarios
    slices = max(1, round(options.minutes * 60 / _SLICE_S / len(chosen)))
    seconds = options.minutes * 60 / slices / len(chosen)
    console.print(f"seed {options.seed}: {len(chosen)} scenarios, {slices} times {seconds:.0f} s of each")
    verdicts = []
    for turn in range(slices):
        for place, scenario in enumerate(chosen, turn):  # each scenario on another engine than the turn before
            stage, _, shell = scenario.partition("-")
            engine = engines[place % len(engines)]
            verdict = run(stage, shell, engine, seconds=seconds, seed=options.seed + turn)
            verdicts.append(verdict)
            console.print(_line(verdict))
            for flaw in verdict.flaws[:5]:
                console.print(flaw, markup=False, highlight=False)
    console.print(table(verdicts))
    return int(any(verdict.flaws for verdict in verdicts))


def _line(verdict: Verdict) -> str:
    return (
        f"{verdict.scenario}: {verdict.operations:,} operations, {verdict.faults.total()} faults, "
        f"{verdict.kills} kills, {len(verdict.flaws)} flaws, {verdict.unknown} unknown, "
        f"longest stall {verdict.longest_s:.1f} s"
    )


def table(verdicts: Sequence[Verdict]) -> Table:
    """All of it, and the sum."""
    made = Table(title="What came of it")
    made.add_column("scenario")
    for heading in (
        "operations", "faults", "kills", "applied twice", "lost", "not linearizable", "other mismatches",
        "undecided", "unknown", "not durable", "not carried out", "longest stall, s",
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
    return [
        verdict.operations,
        verdict.faults.total(),
        verdict.kills,
        twice,
        lost,
        len(verdict.violations),
        len(verdict.findings) - twice - lost,
        verdict.undecided,
        verdict.unknown,
        verdict.not_durable,
        verdict.not_carried_out.total(),
        round(verdict.longest_s, 1),
    ]


if __name__ == "__main__":
    warnings.simplefilter("ignore", RuntimeWarning)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # the proxy goes on writing to a connection that is gone
    sys.exit(main())
