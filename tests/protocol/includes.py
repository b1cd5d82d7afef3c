"""What the scripts of the simulated server share, as lua/include has it, and what is stored."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Any, ClassVar

from redisflow.calls import Refusal
from redisflow.ops.namespace import is_drawn
from tests.protocol.scripts import Known, Library
from tests.protocol.store import Effect, Entry, Hash, Life, Stream

UNSETTLED = Refusal("UNSETTLED", "UNSETTLED the event is gone")
NOTHING: Hash = {}
TOMBSTONE_S = 3600
_REMEMBERED_MS = 3_600_000


def flat(fields: Hash) -> list[bytes]:
    """Return fields and values as HGETALL does."""
    return [part for pair in fields.items() for part in pair]


def fenced(fence: bytes) -> Refusal:
    """Return the error for an attempt that knows another fence."""
    return Refusal("FENCED", f"FENCED {fence.decode()}")


class Includes:
    """What a server stores, and what its scripts share.

    Attributes:
        now_us: the server's clock.
        db: what is stored: hashes, sorted sets and streams.
        expiring: the keys that expire.
        known: the scripts in its cache, by SHA.
        lives: all flows that there ever were, by the key of their hash.
        sender: what sent the command that is executed.
        event_ms: the times that the next events are given, in milliseconds, where they differ from the script's.
    """

    # How many entries are looked at by one script of a search, and how many bytes.
    piece: ClassVar[int] = 100
    most_bytes: ClassVar[int] = 262_144
    # The rules of the protocol.
    is_fenced: ClassVar[bool] = True
    settling_fences: ClassVar[bool] = True
    search_is_complete: ClassVar[bool] = True
    whole_is_counted: ClassVar[bool] = True
    remembers_brought: ClassVar[bool] = True
    remembers_drawn: ClassVar[bool] = True
    has_tombstones: ClassVar[bool] = True
    rebirth_fences: ClassVar[bool] = True
    refusals_hold: ClassVar[bool] = True
    tells_of_deletions: ClassVar[bool] = True

    def __init__(self, library: Library, node_size: int = 100) -> None:
        self.library = library
        self.node_size = node_size
        self.now_us = 0
        self.now_s = 0.0
        self.db: dict[bytes, Any] = {}
        self.expiring: set[bytes] = set()
        self.known: AbstractSet[bytes] = library.by_sha.keys()
        self.lives: dict[bytes, list[Life]] = {}
        self.sender: Any = None
        self.event_ms: list[int] = []
        self.effects = 0

    # --- for the checks

    def note(self, life: Life, rev: bytes, kind: bytes, op: bytes, payload: bytes) -> Effect:
        """Note an event, for the checks."""
        self.effects += 1
        effect = Effect(self.effects, self.sender, self.now_s, (rev, kind, op, payload))
        life.events.append(effect)
        return effect

    # --- includes

    def next_event_ms(self) -> int:
        """Return the time of the next event."""
        return self.event_ms.pop(0) if self.event_ms else self.now_us // 1000

    def note_deletion(self, flow_key: bytes, op: bytes, rev: bytes) -> None:
        """Note that a flow was deleted, for the checks."""
        life = self.lives[flow_key][-1]
        life.died_s = self.now_s
        self.effects += 1
        life.deletion = Effect(self.effects, self.sender, self.now_s, (rev, b"deleted", op, b""))

    def add_event(
        self, script: Known, keys: tuple[bytes, bytes], said: tuple[bytes, bytes, bytes, bytes]
    ) -> tuple[Entry, Effect]:
        """Append an event: its revision, kind, operation and payload."""
        flow_key, events_key = keys
        stream = self.db.get(events_key)
        if stream is None:
            stream = self.db[events_key] = Stream(self.node_size)
        entry = stream.add(self.next_event_ms(), *said)
        life = self.lives[flow_key][-1]
        if script.event_maxlen is not None and stream.trim(script.event_maxlen, exact=False):
            life.trimmed = True
        return entry, self.note(life, *said)

    @staticmethod
    def is_gone(fields: Hash) -> bool:
        """Tell whether there is no flow: nothing at all, or a tombstone."""
        return not fields or b"gone" in fields

    def is_whole(self, events_key: bytes) -> bool:
        """Tell whether a trail has every event that was ever added to it."""
        stream: Stream | None = self.db.get(events_key)
        if stream is None:
            return False
        if not self.whole_is_counted:
            first = stream.entries[0] if stream.entries else None
            return first is not None and first.kind == b"created" and first.rev == b"0"
        return stream.added == len(stream.entries)

    def creator(self, events_key: bytes) -> bytes | None:
        """Return the operation that created a flow, by its trail; `None` if that is not whole."""
        stream: Stream | None = self.db.get(events_key)
        if stream is None or not stream.entries or not self.is_whole(events_key):
            return None
        return stream.entries[0].op

    @staticmethod
    def next_fence(fence: bytes, last_event_id: bytes) -> bytes:
        """Return the fence that follows one."""
        number = int(fence.partition(b"-")[0]) if fence else 0
        return b"%d-%b" % (number + 1, last_event_id)

    def bury(self, flow_key: bytes, etag: bytes, **more: bytes) -> None:
        """Make a key a tombstone."""
        if self.has_tombstones:
            tomb = self.db.setdefault(flow_key, {})
            tomb[b"gone"], tomb[b"etag"] = b"1", etag
            for name, value in more.items():
                tomb[name.encode()] = value
            self.expiring.add(flow_key)

    def fence_off(self, flow_key: bytes, etag: bytes, last_event_id: bytes) -> bytes:
        """Give a flow, or its tombstone, the next fence. Returns it."""
        fence = self.next_fence(etag[33:], last_event_id)
        etag = etag[:32].ljust(33) + fence
        flow = self.db.get(flow_key, NOTHING)
        if self.is_gone(flow):
            self.bury(flow_key, etag)
        else:
            flow[b"etag"] = etag
        return fence

    def absent(self, flow_key: bytes, seen_key: bytes | None, etag: bytes) -> list[bytes]:
        """Answer a caller whose flow does not exist."""
        if seen_key and self.refusals_hold:
            self.fence_off(flow_key, etag, b"0-0")
        return [b"ABSENT"]

    def refuse(self, seen_key: bytes | None, op: bytes, reply: list[bytes]) -> list[bytes]:
        """Refuse an operation, and note it if the caller brought its id."""
        if seen_key and self.refusals_hold and self._is_remembered(op):
            seen: dict[bytes, int] = self.db.setdefault(seen_key, {})
            seen[op] = min(-(self.now_us // 1000), seen.get(op, 0) - 1)
        return reply

    def remember(self, script: Known, seen_key: bytes, op: bytes, entry: Entry) -> None:
        """Enter an id that a caller brought."""
        if not self._is_remembered(op):
            return
        seen: dict[bytes, int] = self.db.setdefault(seen_key, {})
        seen[op] = entry.at[0]
        if script.event_maxlen is not None and len(seen) > script.event_maxlen:
            until_ms = entry.at[0] - _REMEMBERED_MS
            old = sorted((at_ms, member) for member, at_ms in seen.items() if abs(at_ms) <= until_ms)
            for _, member in old[:2]:
                del seen[member]

    def _is_remembered(self, op: bytes) -> bool:
        return self.remembers_brought and (self.remembers_drawn or not is_drawn(op.decode()))

    def replay(
        self, keys: tuple[bytes, bytes | None], op: bytes, attempt: bytes, refusal: bytes, etag: bytes
    ) -> Entry | Refusal | bool | None:
        """Return the event the operation left; `False` if it has been trimmed; `None` if it was not applied."""
        events_key, seen_key = keys
        score = self.db.get(seen_key, NOTHING).get(op, 0) if seen_key and self._is_remembered(op) else 0
        is_sure = score > 0 or etag[:32] == op
        if attempt[:1] == b"=":
            found = attempt[1:]
        elif score <= 0:
            is_refused = score < 0 and b"%d" % score != refusal
            return Refusal("REFUSED", f"REFUSED {score}") if is_refused else None
        else:
            found = b"%d" % score
        stream = self.db.get(events_key)
        if stream is not None:
            for entry in stream.within(found):
                if entry.op == op:
                    left: Entry = entry
                    return left
        return False if is_sure else UNSETTLED

    def is_fenced_off(self, attempt: bytes, fence: bytes) -> bool:
        """Tell whether an attempt knows another fence than the flow's."""
        return self.is_fenced and attempt != fence

    def leave(self, key: bytes, member: bytes) -> None:
        """Take a member out of a sorted set."""
        found: dict[bytes, int] | None = self.db.get(key)
        if found is not None and found.pop(member, None) is not None and not found:
            del self.db[key]
