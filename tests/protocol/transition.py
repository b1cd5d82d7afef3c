"""lua/transition.lua, line by line, in Python."""

# ruff: noqa: C901, PLR0911, PLR0912, PLR0915 - the functions are as long as the scripts

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from redisflow.calls import Refusal
from redisflow.waits import from_us, to_rfc3339
from tests.protocol.includes import fenced, flat
from tests.protocol.scripts import STATUSES, TERMINAL, Known, Prelude
from tests.protocol.store import Entry, Hash

if TYPE_CHECKING:
    from tests.protocol.model import Server

_INT64 = range(-(2**63), 2**63)


def transition(server: Server, script: Known, keys: Sequence[bytes], argv: Sequence[bytes]) -> Any:
    """Run the script of a verb."""
    row = script.prelude
    assert row is not None
    flow_key, events_key = keys[0], keys[1]
    op, conditions, flow_id, held, next_revision, payload = argv[:6]
    seen_key = keys[row.seen_key] if len(keys) > row.seen_key else None
    kind = row.event_kind if row.kind < 0 else argv[row.kind]
    flow: Hash = server.db.get(flow_key) or {}
    attempt = noted = expected = b""
    if conditions:
        attempt, noted, expected, owner = conditions.split(b"|", 3)
        if owner and flow.get(b"owner_session_key") != owner:
            return [b"ABSENT"]
    etag, changed_at = flow.get(b"etag", b""), flow.get(b"updated_at", b"")
    current = held == b"%b %b" % (etag, changed_at)
    status, cancel_requested, revision = row.copy_status, b"0", None
    if not current or status is None or conditions or seen_key:
        status, revision = flow.get(b"status"), flow.get(b"revision")
        cancel_requested = flow.get(b"cancel_requested", b"0")

    if status is None and server.is_gone(flow):
        return server.absent(flow_key, seen_key, etag)
    is_found = False
    if not current or conditions:
        is_found = attempt[:1] == b"="
        if server.is_fenced_off(attempt, etag[33:]) and not is_found:
            return fenced(etag[33:])
        if revision is None or not revision.isdigit():
            return [b"CORRUPT", b"revision"]
        next_revision = b"%d" % (int(revision) + 1)
    if is_found or seen_key:
        entry = server.replay((events_key, seen_key), op, attempt, noted, etag)
        if isinstance(entry, Refusal):
            return entry
        if isinstance(entry, Entry):
            return [b"OTHER_OP", entry.kind] if kind != entry.kind else [b"FLOW", flat(flow), entry.id, entry.rev]
        if entry is False:
            return [b"FLOW", flat(flow), b"", revision]
    if expected and expected not in {revision, b"%b %b %b" % (revision or b"", etag[:32], changed_at)}:
        return server.refuse(seen_key, op, [b"STALE", revision or b""])
    refusal = _barred(row, flow, status, cancel_requested, current=current)
    if refusal is not None:
        return server.refuse(seen_key, op, refusal) if refusal[0] == b"ILLEGAL" else refusal
    assert status is not None
    increments, unset, fields_from = _deltas(row, argv)
    if (increments or unset) and b"s" in flow:
        return server.refuse(seen_key, op, [b"NOT_MAPPING"])
    sums: Hash = {}
    for field, delta in increments:
        found = flow.get(field, b"0")
        if not _is_int64(found) or int(found) + int(delta) not in _INT64:
            return server.refuse(seen_key, op, [b"NOT_INTEGER", field])
        sums[field] = b"%d" % (int(found) + int(delta))

    updated_at = b"%d" % server.now_us
    event, effect = server.add_event(script, (flow_key, events_key), (next_revision, kind, op, payload))
    _move(server, row, keys, flow_id, status)
    if status == b"waiting" and row.target is not None:
        _stop_waiting(server, row, keys, flow_id, flow)
    if row.merge >= 0:
        _merge(flow, argv[row.merge], current=current)
    for field in unset:
        flow.pop(field, None)
    flow |= sums
    flow[b"status"], flow[b"revision"], flow[b"etag"] = row.target or status, next_revision, op + etag[32:]
    flow[b"updated_at"] = updated_at
    flow |= dict(zip(argv[fields_from::2], argv[fields_from + 1 :: 2], strict=True))
    if row.stamp_field >= 0:
        field, head, tail = argv[row.stamp_field : row.stamp_field + 3]
        flow[field] = head + to_rfc3339(from_us(server.now_us)).encode() + tail
    _index_wait(server, row, keys, argv, status)
    if seen_key:
        server.remember(script, seen_key, op, event)
    effect.after = flow.copy()
    if not current:
        return [b"FLOW", flat(flow), event.id, next_revision]
    return [b"OK", updated_at, event.id] if row.with_event else updated_at


def _barred(row: Prelude, flow: Hash, status: bytes | None, cancel_requested: bytes, *, current: bool) -> Any:
    """Return the refusal of a flow that the verb may not change, or `None`."""
    pending = cancel_requested == b"1" and row.when_pending != "allow"
    if status in row.sources and not pending:
        return None
    if status not in STATUSES:
        return [b"CORRUPT", b"status"]
    ended = status in TERMINAL
    if (ended and row.when_terminal == "ignore") or (pending and not ended and row.when_pending == "ignore"):
        return [b"SAME"] if current else [b"FLOW", flat(flow)]
    if ended:
        return [b"TERMINAL", status]
    if pending:
        return [b"PENDING"]
    return [b"OTHER_KEYS"] if status in row.legal else [b"ILLEGAL", status]


def _deltas(row: Prelude, argv: Sequence[bytes]) -> tuple[list[tuple[bytes, bytes]], Sequence[bytes], int]:
    """Return the increments, the fields to delete, and where in ARGV the other fields begin."""
    start = row.fields_from
    if row.n_unset < 0:
        return [], (), start
    middle = start + int(argv[row.n_unset])
    end = middle + 2 * int(argv[row.n_increment])
    return list(zip(argv[middle:end:2], argv[middle + 1 : end : 2], strict=True)), argv[start:middle], end


def _is_int64(text: bytes) -> bool:
    digits = text.removeprefix(b"-")
    return digits.isdigit() and (digits[:1] != b"0" or text == b"0") and int(text) in _INT64


def _move(server: Server, row: Prelude, keys: Sequence[bytes], flow_id: bytes, status: bytes) -> None:
    """Move the flow between the sets of its statuses."""
    source_key = keys[row.sources[status]]
    target_key = keys[row.target_key] if row.target_key >= 0 else source_key
    server.db.setdefault(target_key, {})[flow_id] = server.now_us
    if target_key != source_key:
        server.leave(source_key, flow_id)


def _stop_waiting(server: Server, row: Prelude, keys: Sequence[bytes], flow_id: bytes, flow: Hash) -> None:
    """Take the flow out of the wait it leaves."""
    waited_for = flow.pop(b"waiter", None)
    flow.pop(b"wait", None)
    server.leave(keys[row.due_key], flow_id)
    if waited_for:
        server.leave(keys[row.waiters_key], waited_for + flow_id)


def _merge(flow: Hash, merge: bytes, *, current: bool) -> None:
    """Remove the parts of the state that do not stay."""
    if merge == b"replace":
        for field in [field for field in flow if field == b"s" or field[:2] == b"s:"]:
            del flow[field]
    elif merge == b"over" or (merge == b"patch" and not current):
        flow.pop(b"s", None)


def _index_wait(server: Server, row: Prelude, keys: Sequence[bytes], argv: Sequence[bytes], status: bytes) -> None:
    """Enter the flow in the indexes of what it waits for."""
    flow_id = argv[2]
    due_at = argv[row.due_at] if row.due_at >= 0 else b""
    waits = row.due_key >= 0 and (row.target or status) == b"waiting"
    if row.wake >= 0 and argv[row.wake] == b"1" and waits:
        due_at = b"%d" % server.now_us
    if due_at:
        server.db.setdefault(keys[row.due_key], {})[flow_id] = int(due_at)
    if row.waiter >= 0 and argv[row.waiter]:
        server.db.setdefault(keys[row.waiters_key], {})[argv[row.waiter] + flow_id] = 0
