"""A health check of the store, page by page, and the mending of what can be mended without losing anything.

The store is in use meanwhile, and a page of plain reads sees one key after the other. So what looks wrong by them is
only suspected; lua/reconcile.lua, which sees a flow and what is kept beside it at one moment, decides. What it mends
is what it finds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar
from uuid import UUID

import attrs

from redisflow import scripts
from redisflow.calls import Command, Primaries, Read, Reply, command
from redisflow.diagnosis import Diagnosis, KeyUsage, Severity
from redisflow.errors import FlowError, InvalidData, StorageError
from redisflow.flow import Flow, FlowStatus
from redisflow.keys import Key, Partition
from redisflow.ops.findings import Findings, readable
from redisflow.ops.kept import Entry, Kept, Seen
from redisflow.ops.namespace import Namespace, span_us
from redisflow.ops.server_checks import examine_server
from redisflow.waits import from_us, to_rfc3339, to_us

T = TypeVar("T")

SCAN_COUNT = 500  # keys looked at by one SCAN; a page is about what it returns
FLOWS_PAGE = 100  # whole flows in memory at a time
INDEXES_PAGE, ENTRIES_COUNT = 50, 100  # index sets read at a time, and entries of each
MEASURED = 2_000  # keys of a kind whose memory is asked for
STUCK_US = 60_000_000
_RECORDS = {"events": b"stream", "steps": b"hash", "seen": b"zset"}
_TYPES = {
    "flow": b"hash", **_RECORDS,
    "owner": b"zset", "status": b"zset", "due": b"zset", "waiters": b"zset",
}  # fmt: skip


def doctor(namespace: Namespace, *, repair: bool, quiet_after: timedelta) -> Generator[Any, Any, Diagnosis]:
    """Examine server, namespace and every key; mend what can be mended, if asked to."""
    if namespace.owner:
        raise InvalidData(
            "the doctor examines every owner's flows: call it on the manager, not on a view of one owner's"
        )
    examination = _Examination(namespace, repair=repair, quiet_us=span_us("quiet_after", quiet_after))
    findings = examination.findings
    yield from examine_server(namespace, findings)
    yield from examination.probe()
    scan = KeyScan(namespace)
    while (page := (yield from scan.next_page())) is not None:
        if isinstance(page, StorageError):
            findings.unavailable("every flow and index", "SCAN", page, Severity.WARNING)
            break
        yield from examination.examine(page)
    return Diagnosis(
        prefix=namespace.prefix,
        findings=findings.all(),
        left=findings.left,
        mended=findings.mended,
        flows={status: examination.flows[status] for status in FlowStatus},
        memory=tuple(usage.total(kind) for kind, usage in examination.usage.items()),
    )


class KeyScan:
    """Every key under the namespace's tags, a page at a time, node by node; some may come twice."""

    def __init__(self, namespace: Namespace) -> None:
        self._pattern = namespace.keyspace.pattern
        self._cursor = 0
        self._left: list[int | None] | None = None  # a slot of each primary that is not scanned to its end

    def next_page(self) -> Generator[Read | Primaries, Any, Sequence[bytes] | StorageError | None]:
        """The next keys, perhaps none; `None` after the last; the error, where a server refuses."""
        if self._left is None:
            self._left = list((yield Primaries()))
        if not self._left:
            return None
        ask = command(self._left[-1], b"SCAN", self._cursor, b"MATCH", self._pattern, b"COUNT", SCAN_COUNT)
        (reply,) = yield Read([ask], tolerant=True)
        if isinstance(reply, StorageError):
            return reply
        self._cursor = int(reply[0])
        if not self._cursor:
            self._left.pop()
        keys: Sequence[bytes] = reply[1]
        return keys


@attrs.define
class _Usage:
    """What the keys of a kind take: all of them counted, some of them measured."""

    keys: int = 0
    measured: int = 0
    bytes: int = 0

    def total(self, kind: str) -> KeyUsage:
        """The sum, scaled where only some were measured."""
        if self.measured == self.keys:
            return KeyUsage(kind=kind, keys=self.keys, bytes=self.bytes, estimated=False)
        size = self.bytes * self.keys // self.measured if self.measured else None
        return KeyUsage(kind=kind, keys=self.keys, bytes=size, estimated=size is not None)


def _some(items: Sequence[T], count: int) -> Iterator[Sequence[T]]:
    return (items[start : start + count] for start in range(0, len(items), count))


class _Examination:
    """One examination: what it was told, and what it has come to so far."""

    def __init__(self, namespace: Namespace, *, repair: bool, quiet_us: int) -> None:
        self.findings = Findings()
        self.flows: Counter[FlowStatus] = Counter()
        self.usage = {kind: _Usage() for kind in _TYPES}
        self._keyspace = namespace.keyspace
        self._repair = repair
        self._quiet_us = quiet_us
        self._may_reconcile = True

    def probe(self) -> Generator[Read, Any, None]:
        """Find out whether the script may look: inside it, a missing permission is an error like any other."""
        first = self._keyspace.partitions[0]
        (score,) = yield Read([command(first, b"ZSCORE", first.due, b"permissions")], tolerant=True)
        if isinstance(score, StorageError):
            self._may_reconcile = False
            self.findings.unavailable("index entries, trails and steps", "ZSCORE", score, Severity.WARNING)

    def examine(self, page: Iterable[bytes]) -> Generator[Any, Any, None]:
        """Look at a page of keys."""
        keys: list[Key] = []
        for text in sorted(set(page)):
            key = self._keyspace.parse(text)
            if key is None:
                self.findings.of_kind("foreign-key", "a name the layout does not have", key=text)
            else:
                keys.append(key)
        keys = yield from self._measured(keys)
        yield from self._examine_flows([key for key in keys if key.kind == "flow"])
        yield from self._examine_records([key for key in keys if key.kind in _RECORDS])
        yield from self._examine_indexes([key for key in keys if key.kind in {"owner", "status", "due", "waiters"}])
        yield from self._examine_scratch([key for key in keys if key.kind == "scratch"])

    def _measured(self, keys: Sequence[Key]) -> Generator[Read, Any, list[Key]]:
        """Count the keys, and measure some. Returns those of the type that their kind has."""
        types = yield Read([command(key.partition, b"TYPE", key.text) for key in keys], tolerant=True)
        sound, to_measure = [], []
        for key, found in zip(keys, types, strict=True):
            wanted = _TYPES.get(key.kind)
            if isinstance(found, FlowError):
                self.findings.unavailable("keys of the wrong type", "TYPE", found, Severity.WARNING)
            elif found == b"none":  # gone since the scan
                continue
            elif wanted not in {None, found}:
                self.findings.of_kind(
                    "wrong-type", f"a {readable(found)}, not a {readable(wanted or b'')}", key=key.text
                )
                continue
            sound.append(key)
            if wanted is not None:
                usage = self.usage[key.kind]
                usage.keys += 1
                if usage.keys <= MEASURED:
                    to_measure.append(key)
        sizes = yield Read([command(key.partition, b"MEMORY", b"USAGE", key.text) for key in to_measure], tolerant=True)
        for key, size in zip(to_measure, sizes, strict=True):
            if isinstance(size, FlowError):
                self.findings.unavailable("memory", "MEMORY USAGE", size)
            elif size is not None:
                self.usage[key.kind].measured += 1
                self.usage[key.kind].bytes += size
        return sound

    # --- flows ---

    def _examine_flows(self, keys: Sequence[Key]) -> Generator[Any, Any, None]:
        for some in _some(keys, FLOWS_PAGE):
            now_us, seen = yield from self._look([(key.partition, key.name) for key in some])
            for key, one in zip(some, seen, strict=True):
                if isinstance(one, InvalidData):
                    self._note_damage(key, one)
                elif one.flow is not None:
                    self.flows[one.flow.status] += 1
                    self._note_stuck(one.flow, one.due_at, now_us)
            yield from self._reconcile([(one, one.beside) for one in seen if isinstance(one, Seen) and one.flow])

    def _look(
        self, places: Sequence[tuple[Partition, bytes]]
    ) -> Generator[Read, Any, tuple[int, list[Seen | InvalidData]]]:
        """Read flows whole. Returns also the time before that."""
        hashes = [command(partition, b"HGETALL", partition.flow(member)) for partition, member in places]
        (seconds, micros), *replies = yield Read([command(None, b"TIME"), *hashes], tolerant=True)
        seen: list[Seen | InvalidData] = []
        for (partition, member), reply in zip(places, replies, strict=True):
            try:
                if isinstance(reply, FlowError):
                    raise reply
                seen.append(Seen.of(partition, member, reply))
            except InvalidData as error:
                seen.append(error)
        return int(seconds) * 1_000_000 + int(micros), seen

    def _note_damage(self, key: Key, error: InvalidData) -> None:
        member = key.name.decode()
        what = str(error).removeprefix(f"flow {member}").lstrip(", :")
        self.findings.of_kind("damaged-flow", what, flow_id=UUID(member), key=key.text)

    def _note_stuck(self, flow: Flow, due_at: bytes, now_us: int) -> None:
        unchanged_us = now_us - to_us(flow.updated_at)
        since = to_rfc3339(flow.updated_at)
        if flow.status is FlowStatus.RUNNING and unchanged_us >= self._quiet_us:
            self.findings.of_kind("quiet", f"running, and unchanged since {since}", flow_id=flow.id)
        elif flow.status is not FlowStatus.WAITING:
            return
        elif flow.cancel_requested:
            if unchanged_us > STUCK_US:
                self.findings.of_kind("uncancelled", f"waiting, its cancel requested at {since}", flow_id=flow.id)
        elif due_at and now_us - int(due_at) > STUCK_US:
            self.findings.of_kind(
                "overdue", f"waiting, and due since {to_rfc3339(from_us(int(due_at)))}", flow_id=flow.id
            )

    # --- what is kept beside flows ---

    def _examine_records(self, keys: Sequence[Key]) -> Generator[Any, Any, None]:
        """Look for trails and steps of flows that do not exist. A flow and its trail are created by one script."""
        flows = [(key.partition, key.partition.flow(key.name)) for key in keys]
        there = yield Read([command(partition, b"HEXISTS", flow, b"status") for partition, flow in flows])
        yield from self._reconcile(
            [
                (Seen(key.partition, key.name), [Kept(key.text, key.kind)])
                for key, exists in zip(keys, there, strict=True)
                if not exists
            ]
        )

    def _examine_indexes(self, keys: Sequence[Key]) -> Generator[Any, Any, None]:
        for some in _some(keys, INDEXES_PAGE):
            cursors = dict.fromkeys(some, 0)
            while cursors:
                replies = yield Read([_zscan(index, cursor) for index, cursor in cursors.items()], tolerant=True)
                indexes, cursors = list(cursors), {}
                entries: list[Entry] = []
                for index, reply in zip(indexes, replies, strict=True):
                    if isinstance(reply, InvalidData):  # of another type since
                        continue
                    if isinstance(reply, FlowError):
                        self.findings.unavailable("index entries of no flow", "ZSCAN", reply, Severity.WARNING)
                        continue
                    cursor, flat = reply
                    entries += [Entry.of(index, text) for text in flat[::2]]
                    if int(cursor):
                        cursors[index] = int(cursor)
                yield from self._examine_entries(entries)

    def _examine_entries(self, entries: Sequence[Entry]) -> Generator[Any, Any, None]:
        """Look for entries that are of no flow, or of one that says otherwise."""
        known: list[Entry] = []
        senseless: list[Entry] = []
        for entry in entries:
            (known if self._keyspace.holds(entry.key.partition, entry.member) else senseless).append(entry)
        yield from self._remove_senseless(senseless)
        fields = yield Read([_fields(entry) for entry in known], tolerant=True)
        suspects = [
            entry
            for entry, found in zip(known, fields, strict=True)
            if not isinstance(found, FlowError) and not entry.fits(*found)
        ]
        for some in _some(suspects, FLOWS_PAGE):
            _, seen = yield from self._look([(entry.key.partition, entry.member) for entry in some])
            # Of a damaged flow nothing tells what should be.
            yield from self._reconcile(
                [(one, [entry.kept]) for entry, one in zip(some, seen, strict=True) if isinstance(one, Seen)]
            )

    def _remove_senseless(self, entries: Sequence[Entry]) -> Generator[Read, Any, None]:
        """Remove entries that can be of no flow: nobody adds such a one meanwhile, or misses it."""
        if self._repair:
            yield Read([command(e.key.partition, b"ZREM", e.key.text, e.text) for e in entries])
        for entry in entries:
            what = f"the entry {readable(entry.text)!r} is of no flow of this partition"
            self.findings.of_kind("stale-entry", what, key=entry.key.text, mended=self._repair)

    def _examine_scratch(self, keys: Sequence[Key]) -> Generator[Read, Any, None]:
        """Remove what a creation uses in passing: it is there at no moment at which somebody else can look."""
        if self._repair:
            yield Read([command(key.partition, b"UNLINK", key.text) for key in keys])
        for key in keys:
            self.findings.of_kind("orphan-key", "left over from a creation", key=key.text, mended=self._repair)

    def _reconcile(self, cases: Sequence[tuple[Seen, Sequence[Kept]]]) -> Generator[Read, Any, None]:
        """Have the script decide, and mend if asked to."""
        if not self._may_reconcile:
            return
        outcomes: Sequence[Reply | FlowError] = yield Read(
            [self._command(seen, beside) for seen, beside in cases], tolerant=True
        )
        for (seen, beside), outcome in zip(cases, outcomes, strict=True):
            if isinstance(outcome, InvalidData):  # a key of the wrong type, which is a finding of its own
                continue
            if isinstance(outcome, FlowError):
                raise outcome
            for number, found, right in outcome:
                self._note_drift(seen, beside[number - 1], found, right)

    def _command(self, seen: Seen, beside: Sequence[Kept]) -> Command:
        script = scripts.MEND if self._repair else scripts.LOOK
        keys = (seen.partition.flow(seen.member), *(kept.key for kept in beside))
        parts = (part for kept in beside for part in (kept.kind.encode(), kept.name))
        run = (b"EVALSHA", script.source.sha, b"%d" % len(keys), *keys, seen.member, seen.wait, seen.due_at, *parts)
        return Command(seen.partition.slot, run, script, about=b"flow %b" % seen.member)

    def _note_drift(self, seen: Seen, kept: Kept, found: bytes, right: bytes) -> None:
        exists = seen.flow is not None
        mended = self._repair
        match kept.kind, found, right:
            case "events", b"", _:
                kind, what, mended = "missing-trail", "it has no events", False
            case "events" | "steps" | "seen", _, _:
                kind, what = "orphan-key", f"{kept.kind} of a flow that does not exist"
            case _, b"", _:
                kind, what = "missing-entry", f"not in {kept.label}"
            case _, _, b"":
                kind = "stale-entry"
                what = f"in {kept.label}, " + ("where it does not belong" if exists else "and does not exist")
            case _:
                kind, what = "wrong-score", f"in {kept.label} by {found.decode()}, not by {right.decode()}"
        flow_id = UUID(seen.member.decode())
        self.findings.of_kind(kind, what, flow_id=flow_id, key=kept.key, mended=mended)


def _zscan(index: Key, cursor: int) -> Command:
    return command(index.partition, b"ZSCAN", index.text, cursor, b"COUNT", ENTRIES_COUNT)


def _fields(entry: Entry) -> Command:
    """What of its flow an entry must fit."""
    partition = entry.key.partition
    return command(partition, b"HMGET", partition.flow(entry.member), b"owner_session_key", b"status", b"waiter")
