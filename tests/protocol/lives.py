"""lua/create.lua and lua/delete.lua, line by line, in Python."""

# ruff: noqa: C901, PLR0911, PLR0912, PLR0915 - the functions are as long as the scripts

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from redisflow.calls import Refusal
from tests.protocol.includes import NOTHING, TOMBSTONE_S, UNSETTLED, fenced, flat
from tests.protocol.scripts import Known
from tests.protocol.store import Hash, Life, Stream

if TYPE_CHECKING:
    from tests.protocol.model import Server

_MOST_PAST = 64 * 33


def create(server: Server, script: Known, keys: Sequence[bytes], argv: Sequence[bytes]) -> Any:
    """Run lua/create.lua."""
    flow_key, events_key, owner_key, status_key = keys[:4]
    op, conditions, flow_id, owner, status, n_events = argv[:6]
    count = int(n_events)
    fields_from = 6 + 2 * count
    fence = life_number = None
    found_fence = b""
    found: Hash = server.db.get(flow_key, NOTHING)
    if found:
        attempt, hidden = b"", False
        if conditions:
            attempt, _, _, bound = conditions.split(b"|", 3)
            hidden = bound != b"" and found.get(b"owner_session_key") != bound
        gone, found_fence, past = b"gone" in found, found.get(b"etag", b"")[33:], found.get(b"past", b"")
        if hidden and not gone:
            return [b"EXISTS", 1]
        is_found = attempt[:1] == b"="
        if server.is_fenced_off(attempt, found_fence) and not is_found:
            return fenced(found_fence)
        created_by = found.get(b"created_by")
        if not gone:
            created_by = created_by or server.creator(events_key)
            if created_by is None and is_found and found[b"etag"][:32] == op:
                created_by = op
            if created_by == op or (owner and owner == found.get(b"owner_session_key")):
                return [b"FLOW", flat(found)]
        if op in past:
            return [b"DELETED"] if gone else [b"EXISTS", 1]
        if is_found:
            stream = server.db.get(events_key)
            entry = None if stream is None else stream.first_from(attempt[1:])
            return [b"OTHER_OP", entry.kind] if entry is not None and entry.op == op else UNSETTLED
        if not gone:
            return [b"EXISTS", 0 if created_by is None else 1]
        if len(keys) > 5 and b"?" in past:
            return [b"UNKNOWN"]
        fence = server.next_fence(found_fence, b"0-0")
        life_number = fence.partition(b"-")[0] if past else None
    created_at = b"%d" % server.now_us
    revision = b"%d" % (count - 1)
    named = dict(zip(argv[fields_from::2], argv[fields_from + 1 :: 2], strict=True))
    life = Life(server.now_s, created_at, op, named[b"owner_session_key"], reborn=life_number is not None)
    server.lives.setdefault(flow_key, []).append(life)
    stream = server.db.get(events_key)
    if stream is None:
        stream = server.db[events_key] = Stream(server.node_size)
    effect = None
    for n in range(count):
        kind, payload = argv[6 + 2 * n], argv[7 + 2 * n]
        stream.add(server.next_event_ms(), b"%d" % n, kind, op, payload)
        effect = server.note(life, b"%d" % n, kind, op, payload)
    flow = server.db.setdefault(flow_key, {})
    if fence:
        flow.pop(b"gone")
        server.expiring.discard(flow_key)
        if not server.rebirth_fences:
            fence, life_number = found_fence, None
        if life_number:
            flow[b"life"] = life_number
    flow[b"status"], flow[b"etag"], flow[b"revision"] = status, b"%b %b" % (op, fence) if fence else op, revision
    flow[b"updated_at"] = flow[b"created_at"] = created_at
    if script.event_maxlen is not None:
        flow[b"created_by"] = op
    flow |= named
    server.db.setdefault(owner_key, {})[flow_id] = server.now_us
    server.db.setdefault(status_key, {})[flow_id] = server.now_us
    if effect is not None:
        effect.after = flow.copy()
    return [b"FLOW", flat(flow)] if fence is not None else created_at


def delete(server: Server, _: Known, keys: Sequence[bytes], argv: Sequence[bytes]) -> Any:
    """Run lua/delete.lua."""
    flow_key, events_key, steps_key, seen_key, owner_key, due_key, waiters_key = keys[:7]
    op, conditions, flow_id, created_at, terminal, before = argv
    flow: Hash = server.db.get(flow_key, NOTHING)
    past = flow.get(b"past", b"")
    if op in past:
        return [b"OK"]
    attempt = refusal = expected = b""
    hidden = False
    if conditions:
        attempt, refusal, expected, owner = conditions.split(b"|", 3)
        hidden = owner != b"" and flow.get(b"owner_session_key") != owner
    if attempt[:1] == b"=":
        return [b"OK"]
    if hidden or b"gone" in flow or b"created_at" not in flow:
        return [b"ABSENT"]
    etag = flow.get(b"etag", b"")
    fence = etag[33:]
    if server.is_fenced_off(attempt, fence):
        return fenced(fence)
    if flow[b"created_at"] != created_at:
        return [b"MOVED"]
    brought_key = keys[13] if len(keys) > 13 else None
    note: int = server.db.get(brought_key, {}).get(op, 0) if brought_key else 0
    if note > 0:
        return [b"OTHER_OP", b"a change"]
    if note < 0 and b"%d" % note != refusal:
        return Refusal("REFUSED", f"REFUSED {note}")
    revision, updated_at = flow.get(b"revision", b""), flow.get(b"updated_at", b"")
    if expected and expected not in {revision, b"%b %b %b" % (revision, etag[:32], updated_at)}:
        return server.refuse(brought_key, op, [b"STALE", revision or b"0"])
    if terminal:
        ended = b"|%b|" % flow.get(b"status", b"") in terminal
        if not ended or int(updated_at) >= int(before):
            return [b"KEPT"]
    created_by = flow.get(b"created_by") or server.creator(events_key)
    waiter = flow.get(b"waiter")
    for key in (flow_key, events_key, steps_key, seen_key):
        server.db.pop(key, None)
    server.leave(owner_key, flow_id)
    server.leave(due_key, flow_id)
    if waiter:
        server.leave(waiters_key, waiter + flow_id)
    for key in keys[7:13]:
        server.leave(key, flow_id)
    server.note_deletion(flow_key, op, revision)
    if not terminal or int(updated_at) / 1_000_000 > server.now_us // 1_000_000 - TOMBSTONE_S:
        following = server.next_fence(fence, b"0-0")
        life = following.partition(b"-")[0]
        past += b"%b %b " % (created_by or b"?" + life, op)
        if len(past) > _MOST_PAST:
            past = b"?%b %b" % (life, past[-_MOST_PAST:])
        if server.rebirth_fences:
            server.bury(flow_key, b"%b %b" % (op, following), past=past, life=life)
        else:
            server.bury(flow_key, b"%b %b" % (op, fence), past=past)
    return [b"OK"]
