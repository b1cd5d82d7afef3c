"""Rules of older protocols, put back one at a time. The simulation must find what was wrong with each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import attrs

from redisflow import delivery, settling
from redisflow.calls import Refusal
from redisflow.ops import changes, creation, records, upkeep
from tests.protocol.exploring import Found, SmallPages
from tests.protocol.model import Server
from tests.protocol.themes import (
    ANY,
    DELETIONS,
    FORGETFUL,
    HOT,
    NEWER_COPIES,
    REBIRTHS,
    SECOND_TRIES,
    SETTLERS,
    SHORT_TRAILS,
    Theme,
)


class NoFences(SmallPages):
    """Scripts do not look at the fence: a resend only looks back."""

    is_fenced = False


class SettlingOnlyLooks(SmallPages):
    """Settling searches, and leaves the fence as it is."""

    settling_fences = False


class ShortSearches(SmallPages):
    """What is not among the newest entries is taken as not applied."""

    search_is_complete = False


class WholeByItsFirstEntry(SmallPages):
    """A trail counts as whole if its oldest entry is called created and is of revision 0."""

    whole_is_counted = False


class BroughtIdsForgotten(SmallPages):
    """The ids that callers bring are in no index."""

    remembers_brought = False


class DrawnIdsForgotten(SmallPages):
    """The ids that the library draws are in no index when a caller brings one back."""

    remembers_drawn = False


class NoTombstones(SmallPages):
    """A deletion leaves nothing."""

    has_tombstones = False


class RebirthKeepsTheFence(SmallPages):
    """A flow that takes the place of a deleted one has its fence."""

    rebirth_fences = False


class RefusalsDoNotHold(SmallPages):
    """What was refused under an id that a caller brought may be applied later by an earlier call's attempt."""

    refusals_hold = False


class DeletionsAreNotTold(SmallPages):
    """Settling does not tell that a flow was deleted since the attempt."""

    tells_of_deletions = False


@contextmanager
def _batches_at_once() -> Iterator[None]:
    """Send all calls of a batch in one packet, several of one flow too."""
    with patch.object(delivery, "_rounds", lambda calls: [range(len(calls))]):
        yield


@contextmanager
def _drawn_ids_taken_as_new() -> Iterator[None]:
    """Do not settle before an id that the library drew is sent again."""
    with (
        patch.object(changes, "is_drawn", lambda _: False),
        patch.object(creation, "is_drawn", lambda _: False),
        patch.object(records, "is_drawn", lambda _: False),
        patch.object(upkeep, "is_drawn", lambda _: False),
    ):
        yield


@contextmanager
def _searches_end_at_any_copy() -> Iterator[None]:
    """End a search at the event of the caller's copy, whoever sent the operation."""

    def known(self: settling.Doubt) -> tuple[()] | tuple[bytes, int]:
        etag, updated_at = self.call.copy.get(b"etag", b"")[:32], self.call.copy.get(b"updated_at", b"")
        return (etag, int(updated_at) // 1000) if etag and updated_at else ()

    with patch.object(settling.Doubt, "known", property(known)):
        yield


@contextmanager
def _second_noscript_gives_up() -> Iterator[None]:
    """Give up where a server does not know a script that it was told before."""
    note = delivery._Called.note

    def note_once(self: delivery._Called, answer: Any, policy: delivery.Policy) -> bool:
        if type(answer) is Refusal and answer.code == "NOSCRIPT" and self._text:
            self.give_up(answer)
            return False
        return note(self, answer, policy)

    with patch.object(delivery._Called, "note", note_once):
        yield


@attrs.frozen
class OldRule:
    """A rule, and where its fault shows.

    Attributes:
        theme: of the schedules that are tried.
        within: how many of them are tried at most.
        shown_by: a part of what is said to be wrong.
        server: one that has the rule.
        library: what puts it back in the library.
    """

    name: str
    theme: Theme
    within: int
    shown_by: str
    server: type[Server] = SmallPages
    library: Callable[[], AbstractContextManager[None]] = nullcontext

    def is_shown_by(self, found: Found) -> bool:
        """Tell whether what was found is this rule's fault."""
        return any(self.shown_by in wrong for wrong in found.wrong)


_TWICE = "took effect 2 times"
OLD_RULES = (
    OldRule("no fences", ANY, 2_000, _TWICE, NoFences),
    OldRule("settling leaves the fence", ANY, 2_000, _TWICE, SettlingOnlyLooks),
    OldRule("a search stops after some entries", HOT, 2_000, _TWICE, ShortSearches),
    OldRule("a trail is whole by its first entry", SHORT_TRAILS, 10_000, _TWICE, WholeByItsFirstEntry),
    OldRule("ids that callers bring are forgotten", ANY, 2_000, _TWICE, BroughtIdsForgotten),
    OldRule("a batch is sent at once", ANY, 4_000, "before one that was queued before", library=_batches_at_once),
    OldRule("no tombstones", REBIRTHS, 4_000, _TWICE, NoTombstones),
    OldRule("a rebirth keeps the fence", REBIRTHS, 10_000, _TWICE, RebirthKeepsTheFence),
    OldRule("drawn ids are taken as new", SETTLERS, 2_000, _TWICE, library=_drawn_ids_taken_as_new),
    OldRule("a second NOSCRIPT gives up", FORGETFUL, 4_000, "NOSCRIPT", library=_second_noscript_gives_up),
    OldRule("ids that are settled are forgotten", SETTLERS, 4_000, _TWICE, DrawnIdsForgotten),
    OldRule("refusals do not hold", SECOND_TRIES, 5_000, "applied it later", RefusalsDoNotHold),
    OldRule("deletions are not told", DELETIONS, 4_000, _TWICE, DeletionsAreNotTold),
    OldRule("searches end at any copy", NEWER_COPIES, 2_000, _TWICE, library=_searches_end_at_any_copy),
)
