"""What a damaged server answers: a call makes sense of it, or says in the library's own words that it cannot."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import msgpack

from redisflow import Flow, FlowError, InvalidData, Manual, StepObservation, WaitEngine
from redisflow.calls import Call, Command
from tests.fuzz.calls import wait_of
from tests.fuzz.draw import Draw
from tests.fuzz.offline import (
    EVENT,
    FLOW_ID,
    HASH,
    STEP,
    WAITING,
    WHO,
    Offline,
    applied,
    flat,
    held,
    replies,
    sound_reply,
    unbound,
)
from tests.fuzz.storable import Unstorable, stored_form

OF_OTHER_LIVES = [b"gone", b"created_by", b"life", b"past"]  # what tells that the flow was deleted before
# What scripts answer where events are missing, or the flow of the first attempt.
TRIMMED: dict[str, list[Any]] = {
    "append_event": [[b"UNKNOWN"]],
    "observe_step": [[b"ABSENT"]],
    "create": [[b"EXISTS", 0], [b"EXISTS", 1], [b"DELETED"], [b"UNKNOWN"]],
    "transition": [[b"FLOW", flat(WAITING), b"", b"3"], [b"FLOW", flat(HASH), b"", b"3"]],
    "delete": [[b"ABSENT"]],
}


def damaged_hash(draw: Draw) -> dict[bytes, bytes]:
    """A flow's hash, with up to three fields changed or gone."""
    made = dict(WAITING if draw.chance() else HASH)
    if draw.byte() % 4 == 3:
        made[b"etag"] += b" 7-1700000000000-3"  # its fence
    for _ in range(draw.byte() % 4):
        field = draw.pick(
            [*WAITING, b"s", b"s:\xff", b"s:", b"cancel_requested", b"waiter", *OF_OTHER_LIVES, b"unknown"]
        )
        if draw.byte() % 8 == 7:
            made.pop(field, None)
        elif field == b"wait" and draw.chance():
            made[field] = _wire(draw)
        else:
            made[field] = draw.damaged(made.get(field, b"1"))
    return made


def _wire(draw: Draw) -> bytes:
    """A wait that somebody else stored."""
    try:
        wire = stored_form(wait_of(draw), 200)
        return bytes(msgpack.packb(wire, datetime=True))
    except (Unstorable, InvalidData, ValueError):
        return b"\x80"


def damaged_event(draw: Draw) -> list[Any]:
    """An entry of a stream."""
    made = dict(EVENT)
    for _ in range(draw.byte() % 3):
        field = draw.pick([*EVENT, b"more"])
        if draw.byte() % 8 == 7:
            made.pop(field, None)
        else:
            made[field] = draw.damaged(made.get(field, b""))
    event_id = draw.pick(
        [b"1700000000000-1", b"0-1", b"18446744073709551615-18446744073709551615", b"253402300800000-0"]
    )
    return [event_id, flat(made)]


def damaged_step(draw: Draw) -> bytes:
    """A field of the hash of steps."""
    parts = list(STEP)
    for _ in range(draw.byte() % 3):
        parts[draw.byte() % len(parts)] = draw.pick([10**18, "9" * 5000, 10.0**300, ["x"], "\u0663"])
    if draw.chance():
        try:
            parts[draw.byte() % len(parts)] = stored_form(draw.value(), 200)
        except Unstorable:
            parts.pop()
    packed: bytes = msgpack.packb(parts, datetime=True)
    return draw.damaged(packed)


def answers(source: bytes) -> None:
    """Whatever a damaged server answers, a call returns or raises an error of the library."""
    draw = Draw(source)
    name = draw.pick(list(READS))
    flows = Offline.made(
        lambda step: replies(step, lambda call: _damaged_answer(draw, call), lambda c: _damaged_reply(draw, c))
    )
    with suppress(FlowError, TimeoutError):
        found = READS[name](draw, flows)
        if isinstance(found, Flow):
            READS[draw.pick(ON_FOUND)](draw, flows, found)


def _damaged_answer(draw: Draw, call: Call) -> Any:
    """The reply of a script: it is sound itself, what it quotes may not be."""
    name, answer = call.script.name, draw.byte() % 8
    if answer == 6 and name in TRIMMED:
        return draw.pick(TRIMMED[name])
    if answer == 7:
        return [draw.pick([b"CORRUPT", b"NOT_INTEGER", b"OTHER_OP"]), draw.damaged(b"revision")]
    if name == "transition" and answer:
        # A script that has applied its change has set these.
        changed = {field: HASH[field] for field in (b"status", b"revision", b"etag", b"updated_at")}
        return [b"FLOW", flat(damaged_hash(draw) | changed), b"1700000000000-1", b"4"]
    if name in {"transition", "create"}:  # made before
        return [b"FLOW", flat(damaged_hash(draw)), b"", b"3"][: 4 if name == "transition" else 2]
    return [b"OK", damaged_step(draw)] if name == "observe_step" else applied(call)


def _damaged_reply(draw: Draw, command: Command) -> Any:  # noqa: PLR0911 - one per command
    command = unbound(command)
    match command.args[0]:
        case b"HGETALL":
            return [] if draw.byte() % 8 == 7 else flat(damaged_hash(draw))
        case b"HMGET":
            if b":steps:" in command.args[1]:
                return [None if draw.chance() else damaged_step(draw)]
            made = damaged_hash(draw)
            return [made.get(field) for field in command.args[2:]]
        case b"HVALS":
            return [damaged_step(draw) for _ in range(draw.byte() % 3)]
        case b"XRANGE" | b"XREVRANGE":
            return [damaged_event(draw) for _ in range(draw.byte() % 3)]
        case b"ZRANGE" | b"ZINTER":
            members = [draw.damaged(str(FLOW_ID).encode()) for _ in range(draw.byte() % 3)]
            if b"WITHSCORES" not in command.args:
                return members
            return [part for member in members for part in (member, draw.pick(SCORES))]
        case b"ZCARD" | b"ZINTERCARD":
            return draw.byte()
    return sound_reply(command)


SCORES = [b"1700000000000000", b"0", b"-1", b"1.5", b"inf", b"-inf", b"1.7976931348623157e+308", b"-5e-324"]
READS: dict[str, Callable[..., Any]] = {
    "get": lambda _, f: f.get(FLOW_ID),
    "get_many": lambda _, f: f.get_many([FLOW_ID, UUID(int=8)]),
    "list_by_owner": lambda _, f: f.list_by_owner("o"),
    "list_by_status": lambda _, f: f.list_by_status("running", updated_before=datetime(2030, 1, 1, tzinfo=UTC)),
    "iter_by_status": lambda d, f: list(f.iter_by_status("waiting", page=1 + d.byte())),
    "own_by_status": lambda _, f: list(f.for_owner("o").iter_by_owner("o")),
    "list_events": lambda _, f: f.list_events(FLOW_ID),
    "iter_events": lambda _, f: list(f.iter_events(FLOW_ID, after="1-1")),
    "list_steps": lambda _, f: f.list_steps(FLOW_ID),
    "find_step": lambda _, f: f.find_step_by_run_id(FLOW_ID, "run"),
    "watch": lambda d, f: list(f.watch(FLOW_ID, after="0" if d.chance() else None, timeout=0)),
    "wait_for": lambda _, f: f.wait_for(FLOW_ID, timeout=0),
    "prune": lambda _, f: f.prune_terminal_flows(timedelta(0)),
    "tick": lambda d, f: WaitEngine(f).tick(datetime(2100, 1, 1, tzinfo=UTC) if d.chance() else None),
    "try_resume": lambda _, f: WaitEngine(f).try_resume_external(FLOW_ID, "t", "c"),
    "resume_waiters": lambda _, f: WaitEngine(f).resume_waiters("t", "c", {"k": 1}),
    "create": lambda _, f: f.create_managed(**WHO, exist_ok=True),
    "start_running": lambda _, f, flow=FLOW_ID: f.start_running(flow),
    "update_state": lambda _, f, flow=FLOW_ID: f.update_state(flow, {"a": 1}, increment={"b": 1}),
    "compared": lambda _, f, flow=FLOW_ID: f.finish(flow, expected_revision=3),
    "set_waiting": lambda _, f, flow=FLOW_ID: f.set_waiting(flow, Manual()),
    "fail": lambda _, f, flow=FLOW_ID: f.fail(flow, "x"),
    "rewrite": lambda _, f, flow=None: f.update_and_append(flow or held(), "k"),
    "mutate": lambda _, f, flow=FLOW_ID: f.mutate(flow, lambda it: it, kind="k"),
    "append_event": lambda _, f, flow=FLOW_ID: f.append_event(flow, "k"),
    "observe": lambda _, f, flow=FLOW_ID: f.record_step_observation(StepObservation(flow, "r", "t", "running")),
    "delete": lambda _, f, flow=FLOW_ID: f.delete(flow),
}
ON_FOUND = [name for name, call in READS.items() if call.__defaults__]
