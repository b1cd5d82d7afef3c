"""Flows that are deleted and created anew under the same id while calls to them are sent again."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any
from uuid import UUID

import attrs

from redisflow import Flow, FlowEvent, FlowExists, FlowManager, FlowNotFound
from tests.chaos.crowd import Crowd, Judged, Writer, any_change, asked, flow_ids
from tests.chaos.findings import Breach, Damage, Finding
from tests.chaos.ledger import Ask, End, Entry, Life, tokens_of

_MEMBERS = 5  # of a group of writers that share a flow id
_CALLS = 60  # on one flow id


@attrs.frozen(eq=False)
class _Known:
    """A flow and its trail, at least as far as the flow's revision."""

    flow: Flow
    events: Sequence[FlowEvent]


class Rebirths(Crowd):
    """Groups of writers: each member of a group changes, deletes and creates the flow of one id."""

    def __init__(self, shell: str, seed: int) -> None:
        super().__init__(seed)
        self._groups = 3 if shell == "sync" else 8
        self._ended: dict[UUID, list[_Known]] = defaultdict(list)

    def writers(self) -> Sequence[Writer]:
        """Make the members of all groups."""
        writers = []
        for _ in range(self._groups):
            ids = [flow_id for flow_id, _ in zip(flow_ids(self.chance), range(1000), strict=False)]
            writers += [self._member(ids, Random(self.chance.random())) for _ in range(_MEMBERS)]
        return writers

    def _member(self, ids: Sequence[UUID], chance: Random) -> Writer:
        for flow_id in ids:
            held: Flow | None = None
            for _ in range(_CALLS):
                if self.stopped.is_set():
                    return
                what = chance.random()
                if held is None or what < 0.06:
                    verb = chance.choice(["create_managed", "create_mirrored"])
                    came: Entry = yield asked(self.ledger, verb, flow_id)
                    if came.end is not End.DONE:
                        came = yield Ask("get", flow_id)
                elif what < 0.12:
                    yield from self._delete(flow_id, chance)
                    came = yield Ask("get", flow_id)
                else:
                    came = yield any_change(self.ledger, chance, flow_id, held)
                    if isinstance(came.error, FlowNotFound):
                        held = None
                held = came.flow or held

    def _delete(self, flow_id: UUID, chance: Random) -> Writer:
        """Delete the flow, whatever it is by then; or the version whose trail was read."""
        if chance.random() < 0.4:
            yield Ask("delete", flow_id)
            return
        read: Entry = yield Ask("list_events", flow_id, {"limit": None})
        seen: Entry = yield Ask("get", flow_id)
        events: list[FlowEvent] = [*reversed(read.answer or [])]
        flow = seen.flow
        if flow is None or not events or events[-1].op_id != flow.etag:
            return
        came: Entry = yield Ask("delete", flow, {"expected_revision": flow.revision})
        if came.answer is True:
            # Not all of it: records leave the revision as it is. And after a lost attempt it may have been another
            # writer that deleted the flow, and another version.
            self._ended[flow_id].append(_Known(flow, events))

    def lives(self, flows: FlowManager) -> Mapping[UUID, Sequence[Life]]:
        """Put together the trails of the flows that were deleted, and those there are."""
        lives: dict[UUID, list[Life]] = {}
        for flow_id in self.ledger.flow_ids():
            known = {life.events[0].id: life for life in self._ended[flow_id]}  # two may think they deleted it
            lives[flow_id] = [Life(life.events, is_over=True, is_certain=False) for life in known.values()]
            lives[flow_id].append(Life([], is_over=True, is_certain=False))  # those that were deleted unseen
            flow = flows.get(flow_id)
            if flow is not None:
                events = list(flows.iter_events(flow_id))
                self._ended[flow_id].append(_Known(flow, events))
                lives[flow_id].append(Life(events))
        return lives

    def judged(self, flows: FlowManager) -> Judged:
        """Hold the ledger against the trails, and count creations and deletions."""
        judged = super().judged(flows)
        by_flow: dict[UUID, list[Entry]] = defaultdict(list)
        for entry in self.ledger.entries:
            by_flow[entry.ask.flow_id].append(entry)
        counted = [
            finding
            for flow_id, entries in by_flow.items()
            for finding in _counted(flow_id, entries, exists=flows.get(flow_id) is not None)
        ]
        lost = [finding for flow_id, entries in by_flow.items() for finding in self._lost(flow_id, entries)]
        return Judged(flows=judged.flows, findings=[*judged.findings, *counted, *lost])

    def _lost(self, flow_id: UUID, entries: Sequence[Entry]) -> Iterator[Finding]:
        """Find acknowledged changes that are not in the trail of their flow, which the time of its creation names."""
        for known in self._ended[flow_id]:
            tokens = {token for event in known.events for token in tokens_of(event.payload)}
            for entry in entries:
                flow, token = entry.flow, entry.ask.token
                if not token or flow is None or flow.created_at != known.flow.created_at:
                    continue
                if flow.revision <= known.flow.revision and token not in tokens:
                    yield Finding(Damage.LOST, flow_id, str(entry))


def _counted(flow_id: UUID, entries: Sequence[Entry], *, exists: bool) -> Iterator[Finding]:
    """Compare how many flows were created, and how many of them are gone, with what was deleted.

    A deletion that was lost, and found the flow replaced by another when it was sent again, is told that it deleted a
    flow, as another deletion was: so there may be more deletions than flows that are gone.
    """
    counts: Counter[Any] = Counter()
    for entry in entries:
        if entry.ask.verb.startswith("create_"):
            # The creator of a flow that is deleted by the time its call is sent again hears that there is none, or
            # that there is another.
            maybe = entry.end is End.UNKNOWN or isinstance(entry.error, FlowNotFound | FlowExists)
            counts["created"] += entry.end is End.DONE
            counts["perhaps created"] += maybe
        elif entry.ask.verb == "delete":
            counts["deleted"] += entry.answer is True
            counts["perhaps deleted"] += entry.end is End.UNKNOWN
    gone = counts["created"] - exists
    if gone > counts["deleted"] + counts["perhaps deleted"]:
        yield Finding(Breach.ANSWER, flow_id, f"more flows are gone than were deleted: {dict(counts)}, {exists=}")
    if exists and not counts["created"] + counts["perhaps created"]:
        yield Finding(Breach.ANSWER, flow_id, f"there is a flow, and nobody created it: {dict(counts)}")
