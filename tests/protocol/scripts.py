"""The scripts that the simulated server can know, by the SHA and by the text that the library sends."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from redisflow.flow import FlowStatus
from redisflow.scripts import DELETE, READ_OWN, SETTLE, Appending, Script, TransitionScript

_FIRST_KEY, _FIRST_ARG = 2, 6  # behind flow and events, behind what every verb takes


@attrs.frozen(eq=False)
class Prelude:
    """The names that a prelude of lua/transition.lua binds, as places in KEYS and ARGV; -1 for none.

    Attributes:
        sources: the statuses that have a key, by the place of that key.
    """

    copy_status: bytes | None
    target: bytes | None
    when_pending: str
    when_terminal: str
    legal: frozenset[bytes]
    event_kind: bytes
    with_event: bool
    fields_from: int
    sources: dict[bytes, int]
    target_key: int
    due_key: int
    waiters_key: int
    seen_key: int
    kind: int
    merge: int
    due_at: int
    waiter: int
    wake: int
    stamp_field: int
    n_unset: int
    n_increment: int

    @classmethod
    def of(cls, script: TransitionScript, copy_status: bytes | None) -> Prelude:
        """Read a row of the transition table."""
        verb = script.verb
        place = _FIRST_KEY + len(script.sources)
        target_key = place if verb.target is not None else -1
        place += verb.target is not None
        args = {name: _FIRST_ARG + n for n, name in enumerate(verb.takes)}
        optional = ("kind", "merge", "due_at", "waiter", "wake", "stamp_field", "n_unset", "n_increment")
        return cls(
            copy_status=copy_status,
            target=None if verb.target is None else verb.target.encode(),
            when_pending=verb.when_cancel_pending,
            when_terminal=verb.when_terminal,
            legal=frozenset(status.encode() for status in verb.sources),
            event_kind=verb.kind.encode(),
            with_event=not verb.kind,
            fields_from=_FIRST_ARG + len(verb.takes),
            sources={status.encode(): _FIRST_KEY + n for n, status in enumerate(script.sources)},
            target_key=target_key,
            due_key=place if script.touches_waits else -1,
            waiters_key=place + 1 if script.touches_waits else -1,
            seen_key=place + 2 * script.touches_waits,
            **{name: args.get(name, -1) for name in optional},
        )


@attrs.frozen(eq=False)
class Known:
    """A script: the name of its file, the bound of trails, and for a transition the prelude."""

    name: str
    event_maxlen: int | None = None
    prelude: Prelude | None = None


class Library:
    """The scripts of clients that keep so many events of a flow."""

    def __init__(self, bounds: Sequence[int | None]) -> None:
        self.by_sha: dict[bytes, Known] = {}
        self.sha_of: dict[bytes, bytes] = {}
        for name, script in (("settle", SETTLE), ("delete", DELETE), ("read_own", READ_OWN)):
            self._add(script, Known(name))
        for bound in bounds:
            appending = Appending.keeping(bound)
            for name in ("create", "append_event", "observe_step"):
                self._add(getattr(appending, name), Known(name, bound))
            for (_, copy_status), transition in appending.transitions.items():
                known = Known("transition", bound, Prelude.of(transition, copy_status))
                self._add(transition.script, known)

    def _add(self, script: Script, known: Known) -> None:
        for source in (script.source, script.plain):
            self.by_sha[source.sha] = known
            self.sha_of[source.text] = source.sha


STATUSES = frozenset(status.encode() for status in FlowStatus)
TERMINAL = frozenset(status.encode() for status in FlowStatus if status.is_terminal)
