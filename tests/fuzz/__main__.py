"""`python -m tests.fuzz`: any bytes into every target, guided by coverage, and what came of it in one line."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from secrets import randbelow

import attrs

ROOT = Path(__file__).resolve().parents[2]
FOUND = ROOT / ".fuzz"
NEEDS = "atheris is not installed: it has wheels for CPython 3.11 to 3.14 on Linux, x86-64"
_PROGRESS = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)/")


@attrs.frozen
class Ran:
    """What came of fuzzing one target.

    Attributes:
        seconds, slowest_s: of processor time, all inputs and the slowest one.
        branches: how many the inputs reached, of the library's code.
        corpus: how many inputs reached something that none before them did.
        trouble: the end of the fuzzer's log, where an input failed, hung or took too much memory.
    """

    target: str
    inputs: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    branches: int = 0
    corpus: int = 0
    trouble: str = ""

    def __str__(self) -> str:
        return (
            f"{self.target}: {self.inputs:,} inputs in {self.seconds:.0f} s, {self.branches:,} branches reached, "
            f"{self.corpus:,} inputs in the corpus, the slowest took {1000 * self.slowest_s:.0f} ms"
        )


def fuzz(target: str, runs: int, seed: int) -> Ran:
    """Run one target in a process of its own, which may crash or hang."""
    FOUND.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.fuzz.guided", target, str(runs), str(seed), str(FOUND)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
    figures = [line for line in done.stdout.splitlines() if line.startswith("{")]
    ran = Ran(target, **json.loads(figures[-1])) if figures else Ran(target)
    reached = _PROGRESS.findall(done.stderr)
    if reached:
        ran = attrs.evolve(ran, branches=int(reached[-1][0]), corpus=int(reached[-1][2]))
    if done.returncode or ran.inputs < runs:
        log = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith(("#", "INFO:"))]
        ran = attrs.evolve(ran, trouble="\n".join([*log[-60:], f"exit status {done.returncode}"]))
    return ran


def main() -> int:
    """Share the inputs out among the targets. Returns 1 if any of them failed."""
    from tests.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=main.__doc__)
    parser.add_argument("--runs", type=int, default=1_000_000, help="inputs, all targets together (1,000,000)")
    parser.add_argument("--seed", type=int, default=1 + randbelow(10**6), help="of the fuzzer; a random one")
    parser.add_argument("--only", action="append", choices=TARGETS, help="a target; may be repeated")
    parser.add_argument("--replay", type=Path, help="run just this input, a file that an earlier run has left")
    options = parser.parse_args()
    chosen = options.only or list(TARGETS)
    if options.replay:
        for target in chosen:
            TARGETS[target](options.replay.read_bytes())
        return 0
    if find_spec("atheris") is None:
        parser.error(NEEDS)
    runs = -(-options.runs // len(chosen))
    print(f"seed {options.seed}: {len(chosen)} targets, {runs:,} inputs each", flush=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        every = []
        for ran in pool.map(lambda target: fuzz(target, runs, options.seed), chosen):
            every.append(ran)
            print(ran, flush=True)
            if ran.trouble:
                print(
                    ran.trouble, f"again: python -m tests.fuzz --only {ran.target} --replay FILE", sep="\n", flush=True
                )
    print(summary(every))
    return int(any(ran.trouble for ran in every))


def summary(every: list[Ran]) -> str:
    """All of it in one line."""
    slowest = max(every, key=lambda ran: ran.slowest_s)
    failed = [ran.target for ran in every if ran.trouble]
    return (
        f"{sum(ran.inputs for ran in every):,} inputs in {sum(ran.seconds for ran in every):.0f} s of processor time, "
        f"{'failed: ' + ', '.join(failed) if failed else 'no crash, no hang, nothing unreadable'}; "
        f"{sum(ran.corpus for ran in every):,} inputs in the corpus; "
        f"the slowest took {1000 * slowest.slowest_s:.0f} ms ({slowest.target})"
    )


if __name__ == "__main__":
    sys.exit(main())
