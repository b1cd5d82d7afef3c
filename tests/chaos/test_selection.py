"""A few minutes of what `make chaos` does for longer."""

from __future__ import annotations

from itertools import count
from secrets import randbelow

import pytest

from tests.chaos.stages import STAGES
from tests.chaos.suite import SHELLS, run
from tests.support.servers import ENGINES

SECONDS = 20.0
SCENARIOS = [(stage, shell) for stage in STAGES for shell in SHELLS]


@pytest.mark.parametrize(
    ("stage", "shell", "number"), [(*scenario, number) for scenario, number in zip(SCENARIOS, count(), strict=False)]
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nothing_is_lost_doubled_or_out_of_order(stage: str, shell: str, number: int) -> None:
    """Under faults drawn by a seed, which is in the failure: `python -m tests.chaos --only … --seed …`."""
    seed = randbelow(10**6)
    verdict = run(stage, shell, ENGINES[number % len(ENGINES)], seconds=SECONDS, seed=seed)
    assert verdict.flaws == [], f"seed {seed}, {verdict.scenario}"
    assert verdict.operations > 1000
    assert verdict.faults.total() > 3
    assert verdict.undecided == 0
