"""Whether the fences of flows, and what is left of deleted ones, make sense."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from uuid import UUID

from redisflow import FlowEvent
from tests.chaos.findings import Damage, Finding

_ETAG = re.compile(rb"([0-9a-f]{32}|[ ]{32})(?: ([1-9]\d*)-(\d+)-(\d+))?")
_PAST = re.compile(rb"(?:(?:[0-9a-f]{32}|[?]) )*")
_TOMBSTONE = {b"gone", b"etag", b"life", b"past"}


def judged_fence(flow_id: UUID, fields: Mapping[bytes, bytes], events: Sequence[FlowEvent]) -> Iterator[Finding]:
    """Judge the fence, which follows the operation's id in the etag, and where a search may stop because of it."""
    match = _ETAG.fullmatch(fields[b"etag"])
    number = 0
    if match is None:
        yield Finding(Damage.FLOW, flow_id, f"its etag is {fields[b'etag']!r}")
    elif match[2] is not None:
        number, floor = int(match[2]), (int(match[3]), int(match[4]))
        if events and floor > _event_id(events[-1]):
            yield Finding(Damage.FLOW, flow_id, f"its fence is {match[0]!r}, and its last event {events[-1].id}")
    yield from _judged_past(flow_id, fields, number)


def _event_id(event: FlowEvent) -> tuple[int, int]:
    milliseconds, _, sequence = event.id.partition("-")
    return int(milliseconds), int(sequence)


def judged_tombstone(flow_id: UUID, fields: Mapping[bytes, bytes]) -> Iterator[Finding]:
    """Judge what is left of a deleted flow for a while."""
    match = _ETAG.fullmatch(fields.get(b"etag", b""))
    if fields.keys() - _TOMBSTONE or match is None or match[2] is None:
        yield Finding(Damage.FLOW, flow_id, f"a tombstone with {dict(fields)}")
    else:
        yield from _judged_past(flow_id, fields, int(match[2]))


def _judged_past(flow_id: UUID, fields: Mapping[bytes, bytes], number: int) -> Iterator[Finding]:
    """Judge what is kept of flows that were deleted under this id; `number` is the fence's."""
    life, past = fields.get(b"life", b"0"), fields.get(b"past", b"")
    if not life.isdigit() or int(life) > number:
        yield Finding(Damage.FLOW, flow_id, f"its life began with fence {life!r}, and its fence is {number}")
    if _PAST.fullmatch(past) is None or (b"life" in fields) != (past != b""):
        yield Finding(Damage.FLOW, flow_id, f"its life is {life!r} and its past {past!r}")
