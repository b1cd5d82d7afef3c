"""What a health check may find: the kinds, how bad each is and what to do about it; and what it has found so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from uuid import UUID

import attrs

from redisflow.diagnosis import Finding, Severity
from redisflow.errors import FlowError, StorageError

KEPT = 1_000  # of each kind, so that a report of a ruined store still fits into memory


@attrs.frozen
class Kind:
    """What is true of every finding of a kind.

    Attributes:
        advice: what to do about it.
        done: what mending it is, where it can be mended.
    """

    severity: Severity
    advice: str
    done: str = ""


_ENGINE = "run a wait engine, `redisflow engine`; where one runs, read what it logs"
KINDS = {
    "missing-entry": Kind(Severity.ERROR, "`redisflow doctor --repair` adds it", "added"),
    "stale-entry": Kind(Severity.ERROR, "`redisflow doctor --repair` removes it", "removed"),
    "wrong-score": Kind(Severity.ERROR, "`redisflow doctor --repair` corrects it", "corrected"),
    "damaged-flow": Kind(Severity.ERROR, "look at its hash with `redis-cli HGETALL`; `delete` removes the flow"),
    "missing-trail": Kind(Severity.ERROR, "find out who deleted it: the flow goes on, its history is gone"),
    "wrong-type": Kind(Severity.ERROR, "rename the key and find out who wrote it: calls that touch it fail"),
    "orphan-key": Kind(Severity.WARNING, "`redisflow doctor --repair` removes it", "removed"),
    "foreign-key": Kind(Severity.WARNING, "find out who wrote it: the library neither reads nor removes it"),
    "overdue": Kind(Severity.WARNING, _ENGINE),
    "uncancelled": Kind(Severity.WARNING, _ENGINE),
    "quiet": Kind(Severity.INFO, "see whether its worker lives; whoever takes it over gives `expected_revision`"),
}


class Findings:
    """What has been found: all of it counted, so much of each kind kept."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, bool], dict[Finding, None]] = {}
        self._left: Counter[str] = Counter()
        self._mended: Counter[str] = Counter()

    def add(self, finding: Finding) -> None:
        """Take a finding in; one that is kept already counts once, because a scan may meet a key twice."""
        kept = self._kept.setdefault((finding.kind, finding.mended), {})
        if finding in kept:
            return
        if finding.severity is not Severity.OK:
            (self._mended if finding.mended else self._left)[finding.kind] += 1
        if len(kept) < KEPT:
            kept[finding] = None

    def of_kind(
        self, kind: str, what: str, *, flow_id: UUID | None = None, key: bytes | None = None, mended: bool = False
    ) -> None:
        """Take in a finding of one of the kinds above."""
        known = KINDS[kind]
        self.add(
            Finding(
                known.severity,
                kind,
                f"{what}: {known.done}" if mended else what,
                flow_id=flow_id,
                key=None if key is None else readable(key),
                advice="" if mended else known.advice,
                mended=mended,
            )
        )

    def unavailable(self, check: str, command: str, error: FlowError, severity: Severity = Severity.INFO) -> None:
        """Take in that a check could not be made, because the server refuses a command."""
        barred = isinstance(error, StorageError) and error.code == "NOPERM"
        why = f"this user may not run {command}" if barred else f"the server has no {command}"
        advice = f"give the user the permission for {command}" if barred else ""
        self.add(Finding(severity, "unavailable", f"{check} not examined: {why}", advice=advice))

    def all(self) -> tuple[Finding, ...]:
        """Those that are kept, the worst first."""
        found = [finding for kept in self._kept.values() for finding in kept]
        return tuple(sorted(found, key=lambda finding: -finding.severity.rank))

    @property
    def left(self) -> Mapping[str, int]:
        """How many there are of each kind."""
        return dict(self._left)

    @property
    def mended(self) -> Mapping[str, int]:
        """How many of each kind were mended."""
        return dict(self._mended)


def readable(text: bytes) -> str:
    """Bytes as text, those that are no UTF-8 escaped."""
    return text.decode(errors="backslashreplace")
