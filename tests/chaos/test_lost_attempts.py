"""A few seconds of each of the scenarios about attempts that arrive late; `make chaos` has minutes of them."""

from __future__ import annotations

from itertools import count
from secrets import randbelow

import pytest

from tests.chaos.suite import SCENARIOS, run
from tests.support.servers import ENGINES

SECONDS = 6.0
NAMES = ("late", "reborn", "batches", "handover", "hot")
CASES = [(name, shell) for name in NAMES for shell in SCENARIOS[name].shells]


@pytest.mark.parametrize(
    ("name", "shell", "number"), [(*case, number) for case, number in zip(CASES, count(), strict=False)]
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_late_and_lost_attempts_change_nothing(name: str, shell: str, number: int) -> None:
    """Under faults drawn by a seed, which is in the failure: `python -m tests.chaos --only … --seed …`."""
    seed = randbelow(10**6)
    verdict = run(name, shell, ENGINES[number % len(ENGINES)], seconds=SECONDS, seed=seed)
    assert verdict.flaws == [], f"seed {seed}, {verdict.scenario}"
    assert verdict.operations > 500
    assert verdict.faults.total() > 0  # on a hot flow they come seconds apart
    assert verdict.undecided == 0
    assert verdict.unknown == 0
