"""What a health check of the store came to."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from uuid import UUID

import attrs

from redisflow.flow import FlowStatus


class Severity(enum.StrEnum):
    """How bad a finding is."""

    OK = "ok"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"

    @property
    def rank(self) -> int:
        """A number that is higher for what is worse."""
        return list(Severity).index(self)


@attrs.frozen
class Finding:
    """One thing that was found.

    Attributes:
        kind: one word for it, from the list in docs/cli.md.
        what: what was found.
        flow_id: the flow it is about, if it is about one.
        key: the key it is about, if it is about one; bytes that are no UTF-8 are escaped.
        advice: what to do; empty where there is nothing to do.
        mended: whether it was, and is found no more.
    """

    severity: Severity
    kind: str
    what: str
    flow_id: UUID | None = attrs.field(default=None, kw_only=True)
    key: str | None = attrs.field(default=None, kw_only=True)
    advice: str = attrs.field(default="", kw_only=True)
    mended: bool = attrs.field(default=False, kw_only=True)


@attrs.frozen(kw_only=True)
class KeyUsage:
    """The memory that the keys of one kind take.

    Attributes:
        kind: flow, events, steps, owner, status, due or waiters.
        keys: how many there are.
        bytes: what they take together; `None` where the server does not tell.
        estimated: whether only some of them were measured.
    """

    kind: str
    keys: int
    bytes: int | None
    estimated: bool


@attrs.frozen(kw_only=True)
class Diagnosis:
    """A health check's result.

    Attributes:
        findings: the worst first; at most 1,000 of a kind that are left, and 1,000 that were mended.
        left: how many there are of each kind, those beyond that included.
        mended: how many of each kind were mended.
        flows: how many flows are in each status, by the flows themselves; damaged ones are in none.
        memory: by kind of key.
    """

    prefix: str
    findings: tuple[Finding, ...]
    left: Mapping[str, int]
    mended: Mapping[str, int]
    flows: Mapping[FlowStatus, int]
    memory: tuple[KeyUsage, ...]

    @property
    def severity(self) -> Severity:
        """That of the worst finding which is left."""
        return max((f.severity for f in self.findings if not f.mended), key=lambda s: s.rank, default=Severity.OK)
