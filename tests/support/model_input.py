"""What the random operations are made of."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from hypothesis import strategies as st

from redisflow import ExternalEvent, Manual, Timer

IDS = [UUID(int=n) for n in (0, 1, 16, 2**127 + 5)]
OWNERS = ["agent:kate", "agent:\0{joe}\n"]
KEYS = ["n", "m", "tmp", "", "é{}\0"]
LONG_AGO = datetime(2001, 1, 1, tzinfo=UTC)
FAR_OFF = datetime(2100, 1, 1, tzinfo=UTC)
AGO, OFF = "2001-01-01T00:00:00.000000Z", "2100-01-01T00:00:00.000000Z"
# What a caller gives, and what must be stored.
WAITS: list[tuple[Any, dict[str, Any]]] = [
    (Timer(at=LONG_AGO), {"kind": "timer", "at": AGO}),
    (Timer(at=FAR_OFF), {"kind": "timer", "at": OFF}),
    (Timer(at=FAR_OFF, deadline=LONG_AGO), {"kind": "timer", "at": OFF, "deadline": AGO}),
    (ExternalEvent("t", "c"), {"kind": "external_event", "topic": "t", "correlation_id": "c"}),
    (
        {"kind": "external_event", "topic": "t", "correlation_id": "c", "deadline": AGO},
        {"kind": "external_event", "topic": "t", "correlation_id": "c", "deadline": AGO},
    ),
    (Manual(), {"kind": "manual"}),
    (Manual(deadline=FAR_OFF), {"kind": "manual", "deadline": OFF}),
    ({"kind": "my own", "at": 7}, {"kind": "my own", "at": 7}),
]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63), 2**53 + 1]),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=4),
    st.binary(max_size=4),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)
mappings = st.dictionaries(st.sampled_from(KEYS), values, max_size=3)
patches = st.one_of(st.none(), mappings, mappings, mappings, values)
deltas = st.one_of(st.integers(-5, 5), st.sampled_from([2**63 - 1, -(2**63), 2**62]))
increments = st.dictionaries(st.sampled_from(KEYS[:3]), deltas, max_size=2)
slots = st.integers(0, len(IDS) - 1)
forms = st.sampled_from(["uuid", "text", "copy", "copy", "evolved", "written into"])
expectations = st.sampled_from([None, None, None, "current", "current", "copy", "wrong"])
ops = st.sampled_from([None, None, None, "brought", "brought", "drawn"])
