"""What the simulated server stores, and what it remembers beside that for the checks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Self

Hash = dict[bytes, bytes]


class Entry(NamedTuple):
    """An entry of a stream.

    Attributes:
        at: the id as two numbers, `id` as text.
        node: the piece of the stream it is stored in.
    """

    at: tuple[int, int]
    id: bytes
    rev: bytes
    kind: bytes
    op: bytes
    payload: bytes
    node: int

    @property
    def wire(self) -> list[Any]:
        """The entry as XRANGE has it."""
        fields = [b"rev", self.rev, b"kind", self.kind, b"op", self.op, b"payload", self.payload]
        return [self.id, fields]


class Stream:
    """A stream. As on a server, it is stored in nodes, and an inexact trim removes nothing but whole nodes."""

    __slots__ = ("added", "entries", "in_node", "last", "node", "node_size")

    def __init__(self, node_size: int) -> None:
        self.node_size = node_size
        self.entries: list[Entry] = []
        self.added = 0  # entries ever
        self.last = (0, 0)
        self.node = self.in_node = 0  # the newest node, and how many entries were put into it

    def add(self, now_ms: int, rev: bytes, kind: bytes, op: bytes, payload: bytes) -> Entry:
        """Append an entry under the next id."""
        last = self.last
        at = (now_ms, 0) if now_ms > last[0] else (last[0], last[1] + 1)
        if self.in_node == self.node_size or not self.entries:
            self.node += 1
            self.in_node = 0
        entry = Entry(at, b"%d-%d" % at, rev, kind, op, payload, self.node)
        self.entries.append(entry)
        self.added += 1
        self.in_node += 1
        self.last = at
        return entry

    def trim(self, most: int, *, exact: bool) -> int:
        """Remove the oldest entries, to `most` or to about so many. Returns how many were removed."""
        entries = self.entries
        excess = len(entries) - most
        if excess <= 0:
            return 0
        removed = excess
        if not exact:
            removed = 0
            while removed < len(entries):
                node, end = entries[removed].node, removed
                while end < len(entries) and entries[end].node == node:
                    end += 1
                if len(entries) - end < most:
                    break
                removed = end
        del entries[:removed]
        return removed

    def copy(self) -> Self:
        """Copy all of it."""
        twin = type(self)(self.node_size)
        twin.entries = self.entries.copy()
        twin.added, twin.last, twin.node, twin.in_node = self.added, self.last, self.node, self.in_node
        return twin

    def back_from(self, upper: bytes) -> Iterator[Entry]:
        """Iterate from the newest entry before an exclusive bound, `+` or `(<id>`, to the oldest."""
        entries = self.entries
        if upper == b"+":
            return reversed(entries)
        bound = id_of(upper[1:])
        return (entry for entry in reversed(entries) if entry.at < bound)

    def first_from(self, found: bytes) -> Entry | None:
        """Return the first entry of an id, or of a millisecond, or after it."""
        first = id_of(found) if b"-" in found else (int(found), 0)
        return next((entry for entry in self.entries if entry.at >= first), None)

    def within(self, found: bytes) -> Iterator[Entry]:
        """Iterate over the entries of an id, or of a whole millisecond."""
        first = last = (0, 0)
        if b"-" in found:
            first = last = id_of(found)
        else:
            first, last = (int(found), 0), (int(found), 2**64 - 1)
        return (entry for entry in self.entries if first <= entry.at <= last)


def id_of(event_id: bytes) -> tuple[int, int]:
    """Return an event id as two numbers."""
    milliseconds, _, sequence = event_id.partition(b"-")
    return int(milliseconds), int(sequence)


class Effect:
    """A change that the server made, with what it was made by.

    Attributes:
        number: its place among all effects on the server.
        sender: what sent the packet; `None` where the test made the change by hand.
        at_s: virtual seconds.
        kind: of its event; of the last, if it left two. `deleted` for a deletion.
        after: the flow's hash after a change; empty for an entry of the trail alone.
    """

    __slots__ = ("after", "at_s", "kind", "number", "op", "payload", "rev", "sender")

    def __init__(self, number: int, sender: Any, at_s: float, said: tuple[bytes, bytes, bytes, bytes]) -> None:
        self.number = number
        self.sender = sender
        self.at_s = at_s
        self.rev, self.kind, self.op, self.payload = said
        self.after: Hash = {}

    def __str__(self) -> str:
        return f"{self.kind.decode()} by op {self.op.decode()[-4:]} at {self.at_s:.3f} (revision {self.rev.decode()})"


class Life:
    """One of the flows that an id named, one after the other.

    Attributes:
        created_at: as it is stored.
        born_s, died_s: virtual seconds.
        events: every entry of its trail, those that were trimmed included.
        trimmed: whether entries were removed from its trail.
    """

    __slots__ = ("born_s", "created_at", "creator", "deletion", "died_s", "events", "owner", "reborn", "trimmed")

    def __init__(self, born_s: float, created_at: bytes, creator: bytes, owner: bytes, *, reborn: bool) -> None:
        self.born_s = born_s
        self.created_at = created_at
        self.died_s = float("inf")
        self.creator = creator
        self.owner = owner
        self.reborn = reborn
        self.events: list[Effect] = []
        self.deletion: Effect | None = None
        self.trimmed = False

    def copy(self) -> Self:
        """Copy it; the effects are shared."""
        twin = type(self)(self.born_s, self.created_at, self.creator, self.owner, reborn=self.reborn)
        twin.died_s, twin.deletion, twin.trimmed = self.died_s, self.deletion, self.trimmed
        twin.events = self.events.copy()
        return twin
