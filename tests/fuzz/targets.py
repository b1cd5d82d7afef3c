"""What is fuzzed: each target takes any bytes, and raises for what must not be.

Two directions. `values` and `calls` pass what no caller should: it is refused before anything is sent, or sent, and
then what is stored reads back equal. `fields` and `answers` answer as a damaged server would: the library makes sense
of it or says that it cannot, in its own words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from redisflow import InvalidData
from redisflow.codec import decode, encode_plain, pack, plain, plain_fields, read_event, read_flow, read_step, unpack
from redisflow.ops.fields import state_fields
from tests.fuzz.answers import answers, damaged_event, damaged_hash, damaged_step
from tests.fuzz.calls import LONGEST_MESSAGE, calls
from tests.fuzz.draw import TEXTS, Draw
from tests.fuzz.offline import FLOW_ID, HASH, WHO, Offline, applied, flat, replies, sound_reply
from tests.fuzz.storable import Unstorable, stored_form
from tests.support.model import exact, incremented, merged


def values(source: bytes) -> None:
    """A value is refused just where the documentation says so; any other comes back equal."""
    value = Draw(source).value()
    try:
        expected = exact(stored_form(value))
    except Unstorable:
        expected = Unstorable
    assert _there_and_back(value, pack, unpack) == expected
    assert _there_and_back(value, lambda what, value: encode_plain(plain(what, value)), decode) == expected
    if isinstance(value, Mapping):
        assert _there_and_back(value, lambda what, value: plain_fields(what, value)[1], _read_state) == expected


def _there_and_back(value: Any, there: Callable[[str, Any], Any], back: Callable[[Any], Any]) -> Any:
    try:
        encoded = there("the value", value)
    except InvalidData as error:
        refusal = str(error)
    else:
        return exact(back(encoded))
    assert len(refusal) < LONGEST_MESSAGE
    return Unstorable


def _read_state(fields: dict[bytes, bytes]) -> Any:
    flow = read_flow(FLOW_ID, flat(HASH_WITHOUT_STATE | fields))
    assert flow is not None
    return flow.state


HASH_WITHOUT_STATE = {field: value for field, value in HASH.items() if not field.startswith(b"s:")}


def merges(source: bytes) -> None:
    """A change makes of the caller's copy what the rules make of the state."""
    draw = Draw(source)
    stored: dict[bytes, bytes] = {}
    flows = Offline.made(lambda step: replies(step, lambda call: applied(call, stored), sound_reply))
    try:
        before = stored_form(draw.mapping(3) if draw.chance() else draw.value(3))
        created = flows.create_managed(**WHO, state=before)
    except (Unstorable, InvalidData):
        return
    before = {} if before is None else before
    assert exact(created.state) == exact(before)
    _, fields = state_fields("the state", before)
    stored |= fields
    patch = draw.mapping(3) if draw.chance() else draw.value(3)
    increment = {draw.pick(TEXTS[:6]): draw.integer() for _ in range(draw.byte() % 3)}
    unset = [draw.pick(TEXTS[:8]) for _ in range(draw.byte() % 3)]
    try:
        after = flows.update_state(created, patch, increment=increment, unset=unset).state
    except InvalidData:
        return
    if (increment or unset) and not isinstance(before, dict):
        return  # the script refuses; this one does not
    expected = before if patch is None else merged(before, stored_form(patch))
    if increment or unset:
        expected = incremented({key: value for key, value in expected.items() if key not in unset}, increment)
    assert exact(after) == exact(expected)


def fields(source: bytes) -> None:
    """Any bytes where a value should be are a value, or refused by name."""
    for read in (decode, unpack):
        with suppress(ValueError):
            read(source)
    draw = Draw(source)
    stored = damaged_hash(draw)
    with suppress(InvalidData):
        flow = read_flow(FLOW_ID, flat(stored))
        assert (flow is None) is (b"gone" in stored)
        if flow is not None:
            _ = flow.condition
            assert flow.revision >= 0
    with suppress(InvalidData):
        read_event(FLOW_ID, damaged_event(draw))
    with suppress(InvalidData):
        read_step(FLOW_ID, damaged_step(draw))


TARGETS: dict[str, Callable[[bytes], None]] = {
    "values": values,
    "calls": calls,
    "merges": merges,
    "fields": fields,
    "answers": answers,
}
