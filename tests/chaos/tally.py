"""What all calls of a workload came to."""

from __future__ import annotations

from collections import Counter

import attrs

from redisflow import OutcomeUnknown

DEADLINE_S = 20.0
_MOST_TOLD = 5
_ABOUT_S = 0.05


@attrs.define
class Tally:
    """What all calls came to.

    Attributes:
        deadline_s: the writers' deadline.
        unknown: outcomes that were unknown when the call returned.
        early: those of them that were told before the deadline; the first few of them are in `told`.
        settled: those that another process settled.
    """

    deadline_s: float = DEADLINE_S
    operations: int = 0
    unknown: int = 0
    early: int = 0
    settled: int = 0
    not_durable: int = 0
    not_carried_out: Counter[str] = attrs.field(factory=Counter)
    longest_s: float = 0.0
    told: list[str] = attrs.field(factory=list)

    def doubt(self, error: OutcomeUnknown, took_s: float) -> None:
        """Count a call whose outcome is unknown."""
        self.unknown += 1
        self.early += took_s < self.deadline_s - _ABOUT_S
        if len(self.told) < _MOST_TOLD:
            self.told.append(f"after {took_s:.2f} s: {error}")
