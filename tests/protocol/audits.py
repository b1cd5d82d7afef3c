"""lua/append_event.lua and lua/observe_step.lua, line by line, in Python."""

# ruff: noqa: PLR0911 - the functions are as long as the scripts

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from redisflow.calls import Refusal
from tests.protocol.includes import NOTHING, fenced
from tests.protocol.scripts import Known
from tests.protocol.store import Entry, Hash

if TYPE_CHECKING:
    from tests.protocol.model import Server


def append_event(server: Server, script: Known, keys: Sequence[bytes], argv: Sequence[bytes]) -> Any:
    """Run lua/append_event.lua."""
    flow_key, events_key = keys[:2]
    seen_key = keys[2] if len(keys) > 2 else None
    op, conditions, kind, payload = argv
    revision, refusal, entry = _audit_guard(server, (flow_key, events_key, seen_key), op, kind, conditions)
    if refusal is not None:
        return refusal
    if isinstance(entry, Entry):
        return [b"OK", entry.id, entry.rev]
    if entry is False:
        return [b"UNKNOWN"]
    added, _ = server.add_event(script, (flow_key, events_key), (revision, kind, op, payload))
    if seen_key:
        server.remember(script, seen_key, op, added)
    return [b"OK", added.id, revision]


def observe_step(server: Server, script: Known, keys: Sequence[bytes], argv: Sequence[bytes]) -> Any:
    """Run lua/observe_step.lua."""
    flow_key, events_key, steps_key = keys[:3]
    seen_key = keys[3] if len(keys) > 3 else None
    op, conditions, run_id, head, child, tail, kind, payload = argv
    revision, refusal, entry = _audit_guard(server, (flow_key, events_key, seen_key), op, kind, conditions)
    if refusal is not None:
        return refusal
    old: bytes | None = server.db.get(steps_key, NOTHING).get(run_id)
    if entry is not None:
        return [b"OK", old] if old else [b"ABSENT"]
    observed_at = created_at = b"\xb0%d" % server.now_us
    if old:
        head, created_at = old[:19], old[19:36]
        if child == b"\xc0":
            child = old[53 : 53 + _packed_length(old, 53)]
    step = head + created_at + observed_at + child + tail
    added, _ = server.add_event(script, (flow_key, events_key), (revision, kind, op, payload))
    server.db.setdefault(steps_key, {})[run_id] = step
    if seen_key:
        server.remember(script, seen_key, op, added)
    return [b"OK", step]


def _audit_guard(
    server: Server, keys: tuple[bytes, bytes, bytes | None], op: bytes, kind: bytes, conditions: bytes
) -> tuple[bytes, Any, Entry | bool | None]:
    """Return the flow's revision; or a refusal; or the event that this very operation left before."""
    flow_key, events_key, seen_key = keys
    flow: Hash = server.db.get(flow_key, NOTHING)
    attempt = refusal = expected = b""
    if conditions:
        attempt, refusal, expected, owner = conditions.split(b"|", 3)
        if owner and flow.get(b"owner_session_key") != owner:
            return b"", [b"ABSENT"], None
    revision, etag = flow.get(b"revision"), flow.get(b"etag", b"")
    if revision is None:
        is_gone = server.is_gone(flow)
        return b"", server.absent(flow_key, seen_key, etag) if is_gone else [b"CORRUPT", b"revision"], None
    is_found = attempt[:1] == b"="
    if server.is_fenced_off(attempt, etag[33:]) and not is_found:
        return b"", fenced(etag[33:]), None
    if is_found or seen_key:
        entry = server.replay((events_key, seen_key), op, attempt, refusal, etag)
        if isinstance(entry, Refusal):
            return b"", entry, None
        if isinstance(entry, Entry) and entry.kind != kind:
            return b"", [b"OTHER_OP", entry.kind], None
        if entry is not None:
            return b"", None, entry
    if expected and expected not in {revision, b"%b %b %b" % (revision, etag[:32], flow.get(b"updated_at", b""))}:
        return b"", server.refuse(seen_key, op, [b"STALE", revision]), None
    return revision, None, None


def _packed_length(packed: bytes, at: int) -> int:
    """Return the length of a packed nil or text."""
    first = packed[at]
    if first == 0xC0:
        return 1
    if first == 0xD9:
        return 2 + packed[at + 1]
    if first == 0xDA:
        return 3 + packed[at + 1] * 256 + packed[at + 2]
    return 1 + first - 0xA0
