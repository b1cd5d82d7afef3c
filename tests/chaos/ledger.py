"""Calls that are known again: each brings a token, which stands in the event that it leaves.

A token tells more than an operation's id, which only the library knows: whether a change that was refused was applied
all the same, which change came before which, and whether a call that another process settled was applied once.
"""

from __future__ import annotations

import enum
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any
from uuid import UUID

import attrs

from redisflow import Flow, FlowError, FlowEvent, FlowExists, FlowNotFound, OutcomeUnknown, StorageError
from tests.chaos.findings import Acknowledged, Breach, Damage, Finding
from tests.chaos.specification import CREATIONS
from tests.chaos.tally import Tally
from tests.support.resends import IDENTITY

_MARK = "token-"


class End(enum.StrEnum):
    """What a call came to."""

    UNDER_WAY = "under way"
    DONE = "done"
    REFUSED = "refused"
    UNKNOWN = "unknown"


@attrs.frozen
class Ask:
    """One call to make.

    Attributes:
        verb, arguments: by the library's names, without the flow.
        ref: the flow, by its id or as a copy.
        token: stands in the event that the call leaves; empty for a call that leaves none.
    """

    verb: str
    ref: Flow | UUID
    arguments: Mapping[str, Any] = attrs.field(factory=dict)
    token: str = ""

    @property
    def flow_id(self) -> UUID:
        """The id of the flow."""
        return self.ref.id if isinstance(self.ref, Flow) else self.ref

    def of(self, flows: Any, **more: Any) -> Any:
        """Call the verb of a manager, or of a batch."""
        verb, arguments = getattr(flows, self.verb), {**self.arguments, **more}
        if self.verb in CREATIONS:
            return verb(**{**IDENTITY, "flow_id": self.flow_id, **arguments})
        return verb(**arguments) if "observation" in arguments else verb(self.ref, **arguments)


@attrs.define(eq=False)
class Entry:
    """One call that was made.

    Attributes:
        invoked_s, returned_s: of one monotonic clock.
        answer: what the verb returned, if it did.
        error: what it raised, if it did.
    """

    ask: Ask
    invoked_s: float
    returned_s: float = math.inf
    end: End = End.UNDER_WAY
    answer: Any = None
    error: FlowError | None = None

    @property
    def flow(self) -> Flow | None:
        """The flow that the call answered with, if it did."""
        parts = self.answer if isinstance(self.answer, tuple) else (self.answer,)
        return next((part for part in parts if isinstance(part, Flow)), None)

    @property
    def revision(self) -> int | None:
        """The revision that the answer tells."""
        if isinstance(self.answer, FlowEvent):
            return self.answer.revision
        return self.flow.revision if self.flow is not None else None

    def __str__(self) -> str:
        came_to = self.error or self.flow or self.answer
        return f"{self.ask.verb} {self.ask.token} [{self.invoked_s:.3f} – {self.returned_s:.3f}] {self.end}: {came_to}"


@attrs.frozen
class Life:
    """The trail of one flow from its creation on.

    Attributes:
        events: oldest first.
        is_over: whether the flow was deleted since.
        is_certain: whether these are all events there ever were.
    """

    events: Sequence[FlowEvent]
    is_over: bool = False
    is_certain: bool = True


class Ledger:
    """Notes calls."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally
        self.entries: list[Entry] = []
        self.batches: list[Sequence[Entry]] = []
        self._tokens = count()

    def token(self) -> str:
        """Return a new token."""
        return f"{_MARK}{next(self._tokens)}"

    def open(self, ask: Ask) -> Entry:
        """Note a call that is about to be made."""
        entry = Entry(ask, time.monotonic())
        self.entries.append(entry)
        return entry

    @contextmanager
    def noting(self, entry: Entry) -> Iterator[Entry]:
        """Note what a call comes to."""
        tally = self.tally
        try:
            yield entry
        except OutcomeUnknown as error:
            entry.end, entry.error = End.UNKNOWN, error
            tally.doubt(error, time.monotonic() - entry.invoked_s)
        except FlowError as error:
            entry.end, entry.error = End.REFUSED, error
            if isinstance(error, StorageError):
                tally.not_carried_out[error.code or type(error.__cause__).__name__] += 1
        else:
            entry.end = End.DONE
        entry.returned_s = time.monotonic()
        tally.operations += 1
        tally.longest_s = max(tally.longest_s, entry.returned_s - entry.invoked_s)

    def flow_ids(self) -> set[UUID]:
        """Return the ids of all flows that were called."""
        return {entry.ask.flow_id for entry in self.entries}

    def acknowledged(self, flow_ids: Iterable[UUID]) -> Iterator[Acknowledged]:
        """Tell of the changes that must stand in the trails of these flows."""
        wanted = set(flow_ids)
        for entry in self.entries:
            flow_id, answer, flow = entry.ask.flow_id, entry.answer, entry.flow
            if flow_id in wanted and isinstance(answer, FlowEvent):
                yield Acknowledged(flow_id, answer.op_id, answer.revision, answer.kind)
            elif flow_id in wanted and flow is not None and entry.ask.token:
                yield Acknowledged(flow_id, flow.etag, flow.revision)

    def judged(self, lives: Mapping[UUID, Sequence[Life]]) -> Iterator[Finding]:
        """Hold what the calls were answered against the trails."""
        places: dict[str, list[tuple[Life, int]]] = defaultdict(list)
        for some in lives.values():
            for life in some:
                for place, event in enumerate(life.events):
                    for token in tokens_of(event.payload):
                        places[token].append((life, place))
        by_token = {entry.ask.token: entry for entry in self.entries if entry.ask.token}
        for token, entry in by_token.items():
            yield from _judged_entry(entry, places[token], lives.get(entry.ask.flow_id, ()))
        for flow_id, some in lives.items():
            for life in some:
                yield from _judged_order(flow_id, life, by_token)
        for batch in self.batches:
            yield from _judged_batch(batch, places)


def tokens_of(payload: Any) -> Iterator[str]:
    """Find the tokens in a payload."""
    if isinstance(payload, str):
        if payload.startswith(_MARK):
            yield payload
    elif isinstance(payload, Mapping):
        for value in payload.values():
            yield from tokens_of(value)


def _judged_entry(entry: Entry, places: Sequence[tuple[Life, int]], lives: Sequence[Life]) -> Iterator[Finding]:
    flow_id = entry.ask.flow_id
    if len(places) > 1:
        left = ", ".join(str(life.events[place].id) for life, place in places)
        yield Finding(Damage.OP_TWICE, flow_id, f"{entry} left {left}")
    if entry.end is End.DONE and not places and all(life.is_certain for life in lives):
        yield Finding(Damage.LOST, flow_id, str(entry))
    for life, place in places:
        event = life.events[place]
        # What was done to a flow that is deleted by then is gone with it: there is no such flow, or another one.
        is_gone = isinstance(entry.error, FlowNotFound | FlowExists) and life.is_over
        if entry.end is End.REFUSED and not is_gone:
            yield Finding(Breach.REFUSED, flow_id, f"{entry}: it is {event.id}")
        if entry.revision is not None and entry.revision < event.revision and len(lives) == 1:
            yield Finding(Breach.ANSWER, flow_id, f"{entry}: its own change made revision {event.revision}")


def _judged_order(flow_id: UUID, life: Life, by_token: Mapping[str, Entry]) -> Iterator[Finding]:
    """Find calls that returned before others were made and came after them."""
    latest: Entry | None = None
    for event in life.events:
        for token in tokens_of(event.payload):
            if (entry := by_token.get(token)) is None:
                yield Finding(Breach.ANSWER, flow_id, f"nobody asked for {event}")
                continue
            if latest is not None and entry.end is End.DONE and entry.returned_s < latest.invoked_s:
                yield Finding(Breach.ORDER, flow_id, f"{entry} came after {latest}")
            if latest is None or entry.invoked_s > latest.invoked_s:
                latest = entry


def _judged_batch(batch: Sequence[Entry], places: Mapping[str, Sequence[tuple[Life, int]]]) -> Iterator[Finding]:
    """Find verbs of one flow that were carried out in another order than that of their batch."""
    last: dict[UUID, tuple[int, Entry]] = {}
    for entry in batch:
        found = places.get(entry.ask.token, ())
        if entry.end is not End.DONE or len(found) != 1:
            continue
        place, flow_id = found[0][1], entry.ask.flow_id
        if flow_id in last and last[flow_id][0] > place:
            yield Finding(Breach.ORDER, flow_id, f"in one batch, {entry} came before {last[flow_id][1]}")
        last[flow_id] = (place, entry)
