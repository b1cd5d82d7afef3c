"""lua/settle.lua, line by line, in Python."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tests.protocol.includes import NOTHING, TOMBSTONE_S
from tests.protocol.scripts import Known
from tests.protocol.store import Hash, Stream

if TYPE_CHECKING:
    from tests.protocol.model import Server

_FORGOTTEN = re.compile(rb"\?(\d+)")


def settle(server: Server, _: Known, keys: Sequence[bytes], argv: Sequence[bytes]) -> Any:  # noqa: C901 - as the script
    """Run lua/settle.lua."""
    flow_key, events_key = keys[:2]
    seen: dict[bytes, int] = server.db.get(keys[2], {}) if len(keys) > 2 else {}
    owner, carried, upper, count, n_apart = argv[:5]
    ops = argv[5:]
    flow: Hash = server.db.get(flow_key, NOTHING)
    status, etag, past = flow.get(b"status"), flow.get(b"etag", b""), flow.get(b"past", b"")
    if owner and status and flow.get(b"owner_session_key") != owner:
        return [b"", 0, 0, b"whole", b""]
    stream: Stream = server.db.get(events_key) or Stream(1)
    fence, created_by = etag[33:], flow.get(b"created_by")
    if server.settling_fences and (carried == b"*" or b"|%b|" % fence in carried):
        fence = server.fence_off(flow_key, etag, stream.entries[-1].id if stream.entries else b"0-0")
    life = int(flow.get(b"life", b"0"))
    if status and int(flow.get(b"created_at", b"0")) / 1_000_000 < server.now_us // 1_000_000 - TOMBSTONE_S:
        life = 0
    if not status:
        life = -life if server.tells_of_deletions else 0
    forgotten = max([0, *map(int, _FORGOTTEN.findall(past))])
    reply: list[Any] = [fence, life, forgotten, b"whole", b""]
    for op in ops:
        added_ms = seen.get(op)
        if added_ms is not None and added_ms >= 0:
            reply += [op, b"%d" % added_ms]
        elif op == created_by or op in past:
            reply += [op, b"0-0"]
    searches = len(ops) > int(n_apart)
    is_last = not searches or _search(server, stream, (upper, int(count)), set(ops), reply)
    if not is_last:
        reply[3] = b"more" if server.search_is_complete else b"whole"
    elif searches and status and not server.is_whole(events_key):
        reply[3] = b"trimmed"
        if etag[:32] in ops:
            reply += [etag[:32], b"0-0"]
    return reply


def _search(server: Server, stream: Stream, page: tuple[bytes, int], wanted: set[bytes], reply: list[Any]) -> bool:
    """Look at entries from the newest back, in pieces. Returns whether the trail's start was reached."""
    upper, count = page
    looked_at = size = 0
    left = stream.back_from(upper)
    while looked_at < count and size < server.most_bytes:
        in_piece = 0
        for entry in left:
            in_piece += 1
            if entry.op in wanted:
                reply += [entry.op, entry.id]
            size += len(entry.payload)
            reply[4] = entry.id
            if in_piece == server.piece:
                break
        looked_at += in_piece
        if in_piece < server.piece:
            return True
    return False
