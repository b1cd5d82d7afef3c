"""What became of attempts that were never answered.

A lost packet may have been executed, may be executed later, or never. So before an operation is sent again, its flow is
settled, by lua/settle.lua. The flow gets another fence: from that moment no attempt that knew the old one can be
applied, however late it arrives. Then the trail is searched for what was applied before, from its newest entry back, a
page at a time, for all operations that are in doubt at the time. After that there is no doubt: either the operation is
found, and its caller is answered as by the first attempt, or it is sent again with the new fence.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from redisflow.calls import Call, Command
from redisflow.codec import OP_DIGITS
from redisflow.errors import FlowError
from redisflow.scripts import SETTLE

if TYPE_CHECKING:
    from uuid import UUID

FIRST_PAGE, PAGE = 100, 1000  # entries of a trail looked at by one script
_MOST_WANTED = 500  # operation ids looked for by one script
_ANY = b"*"
_DELETED = "it was deleted, perhaps after the first attempt"
_INCOMPLETE = "its trail does not reach back to the first attempt"
_MORE, _WHOLE = b"more", b"whole"  # else entries are missing

# Sends commands, each until it is answered. Returns their replies, a FlowError in the place of one that never was.
Ask = Callable[[Sequence[Command]], Generator[Any, Any, Sequence[Any]]]


@attrs.frozen(eq=False)
class Doubt:
    """An operation that may have been applied.

    Attributes:
        carried: the fence that its lost attempt knew; `None` if somebody else sent it.
    """

    call: Call
    carried: bytes | None

    @property
    def in_trail(self) -> bool:
        """Whether the trail must be searched. For an id that the caller drew, it need not: the flow has an index."""
        return self.call.in_trail and (self.call.doubtful or not self.call.seen)

    @property
    def known(self) -> tuple[()] | tuple[bytes, int]:
        """The operation that made the caller's copy, and when, in milliseconds since 1970.

        What this call did comes after it. What an earlier call did, under the same id, may have come before.
        """
        etag, updated_at = self.call.copy.get(b"etag", b"")[:OP_DIGITS], self.call.copy.get(b"updated_at", b"")
        return (etag, int(updated_at) // 1000) if self.carried is not None and etag and updated_at.isdigit() else ()

    @property
    def floor(self) -> tuple[int, int] | None:
        """The id of an event that is older than anything the operation did; `None` if no such event is known."""
        return _floor_of(self.carried) if self.carried else None


@attrs.frozen
class Verdict:
    """What became of the operation.

    Attributes:
        fence: the flow's, now.
        event_id: the event it left; empty if it was not applied, and can no longer be but with this fence.
        unknown: why that cannot be known; empty if it can.
        is_deleted: the flow that the attempt was meant for was deleted, and it was not applied to another.
    """

    fence: bytes
    event_id: bytes = b""
    unknown: str = ""
    is_deleted: bool = False


Verdicts = dict[Doubt, Verdict | FlowError]


def settle(ask: Ask, doubts: Iterable[Doubt]) -> Generator[Any, Any, Verdicts]:
    """Settle flows. Returns a verdict for each doubt, or the error for one whose flow could not be asked about."""
    cases: dict[tuple[UUID, bytes], list[Doubt]] = {}
    for doubt in doubts:
        cases.setdefault((doubt.call.flow_id, doubt.call.owner), []).append(doubt)
    searches = [
        _Search(some[start : start + _MOST_WANTED])
        for some in cases.values()
        for start in range(0, len(some), _MOST_WANTED)
    ]
    verdicts: Verdicts = {}
    while pending := [search for search in searches if not search.over]:
        replies = yield from ask([search.command() for search in pending])
        for search, reply in zip(pending, replies, strict=True):
            search.take(reply)
            verdicts |= search.verdicts if search.over else {}
    return verdicts


class _Search:
    """The settling of one flow."""

    def __init__(self, doubts: Sequence[Doubt]) -> None:
        self._doubts = doubts
        self._call = doubts[0].call
        self._upper, self._count, self._extent = b"+", FIRST_PAGE, _MORE
        self._found: dict[bytes, bytes] = {}
        self.over = False
        self.verdicts: Verdicts = {}

    def command(self) -> Command:
        """Build the command for the next page."""
        call = self._call
        carried = {doubt.carried for doubt in self._doubts}
        bars = b"|%b|" % b"||".join(sorted(fence for fence in carried if fence is not None))
        has_others = any(doubt.carried is None or doubt.call.brought for doubt in self._doubts)
        if has_others and self._upper == b"+":  # once: each time the flow would get another fence
            bars = _ANY
        apart, wanted = set[bytes](), set[bytes]()
        for doubt in self._doubts:
            if doubt.in_trail:
                wanted |= {doubt.call.op_id.encode(), *doubt.known[:1]}
            else:
                apart.add(doubt.call.op_id.encode())
        seen = next((doubt.call.seen for doubt in self._doubts if doubt.call.seen), None)
        keys = call.keys[:2] if seen is None else (*call.keys[:2], seen)
        ids = (b"%d" % len(apart - wanted), *sorted(apart - wanted), *sorted(wanted))
        args = (call.owner, bars, self._upper, b"%d" % self._count, *ids)
        run = (b"EVALSHA", SETTLE.source.sha, b"%d" % len(keys), *keys, *args)
        return Command(call.slot, run, SETTLE, about=call.subject.encode())

    def take(self, reply: Any) -> None:
        """Take in the reply to a page, or the error."""
        if isinstance(reply, FlowError):
            self.over = True
            self.verdicts = dict.fromkeys(self._doubts, reply)
            return
        fence, life, forgotten, self._extent, oldest, *pairs = reply
        if oldest:
            self._upper = b"(" + oldest
        for op, event_id in zip(pairs[::2], pairs[1::2], strict=True):
            self._found.setdefault(op, event_id)  # the newest, if it left two
        self._count = PAGE
        judged = {doubt: self._verdict(doubt, fence, life, forgotten) for doubt in self._doubts}
        self.verdicts = {doubt: verdict for doubt, verdict in judged.items() if verdict is not None}
        self.over = len(self.verdicts) == len(judged)

    def _verdict(self, doubt: Doubt, fence: bytes, life: int, forgotten: int) -> Verdict | None:
        """Judge by the pages so far; `None` if more of them are needed."""
        event_id = self._found.get(doubt.call.op_id.encode(), b"")
        if event_id:
            return Verdict(fence, event_id)
        call, known = doubt.call, 0 if doubt.carried is None else number_of(doubt.carried)
        if call.if_deleted is not None and abs(life) > known:
            # The attempt knew a fence from before this life of the flow: it may have been applied to an earlier one.
            if not call.doubtful or life < 0:
                return Verdict(fence, is_deleted=True)
            return None if self._extent == _MORE else Verdict(fence, unknown=_DELETED)
        if not doubt.in_trail or self._is_below(doubt):
            return Verdict(fence)
        if self._extent == _MORE:
            return None
        is_forgotten = call.if_deleted is None and forgotten > known
        return Verdict(fence) if self._extent == _WHOLE and not is_forgotten else Verdict(fence, unknown=_INCOMPLETE)

    def _is_below(self, doubt: Doubt) -> bool:
        """Tell whether the pages so far reach back to before the first attempt."""
        if doubt.known:
            op, changed_ms = doubt.known
            # An operation may have been applied twice, to what a failover lost and to what it kept: by its time it is
            # the event of the caller's copy. A server may read its clock once for each of the two.
            event_id = self._found.get(op)
            if event_id is not None and abs(int(event_id.partition(b"-")[0]) - changed_ms) <= 1:
                return True
        return doubt.floor is not None and self._upper != b"+" and _id_of(self._upper[1:]) <= doubt.floor


def fence_of(copy: Mapping[bytes, bytes]) -> bytes:
    """Return the fence in the hash fields of a flow: it follows the operation's id in the etag."""
    return copy.get(b"etag", b"")[OP_DIGITS + 1 :]


def number_of(fence: bytes) -> int:
    """Return the number of a fence, by which a later one is told from an earlier."""
    return int(fence.partition(b"-")[0]) if fence else 0


def _floor_of(fence: bytes) -> tuple[int, int]:
    return _id_of(fence.partition(b"-")[2])


def _id_of(event_id: bytes) -> tuple[int, int]:
    milliseconds, _, sequence = event_id.partition(b"-")
    return int(milliseconds), int(sequence)
