"""What a caller passes, whatever it is: refused before anything is written, or what is written reads back."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import attrs

from redisflow import (
    ExternalEvent,
    Flow,
    FlowError,
    FlowManager,
    InvalidData,
    Manual,
    NewFlow,
    StepObservation,
    Timer,
    WaitEngine,
)
from redisflow.calls import Batch, Call, Command
from redisflow.codec import plain, read_event, read_flow, read_step
from redisflow.keys import Keyspace
from redisflow.ops.namespace import is_drawn
from redisflow.scripts import UNTRIMMED
from tests.fuzz.draw import Draw
from tests.fuzz.offline import EVENT, FLOW_ID, NOW, WHO, Offline, applied, flat, held, replies, sound_reply
from tests.fuzz.storable import INT64_MAX, INT64_MIN

# What a call may know of its flow: nothing, a fence, or the event of an earlier attempt; and of its last refusal.
ATTEMPTS = [
    (b"", b""),
    (b"7-1700000000000-3", b""),
    (b"=1700000000000-3", b""),
    (b"", b"-1700000000000"),
    (b"7-1700000000000-3", b"-1700000000000"),
]
LONGEST_MESSAGE = 10_000  # however long the input: it ends in a log
KEYSPACE = Keyspace.of("p", 4)


def _ref(draw: Draw, held: Flow) -> Any:
    match draw.byte() % 8:
        case 0 | 1 | 2:
            return held
        case 3:
            return FLOW_ID
        case 4:
            return str(FLOW_ID)
        case 5:
            return draw.name()
        case 6:
            return attrs.evolve(held, **{draw.pick(list(WHO) + EVOLVING): draw.name()})
    return attrs.evolve(held, **{"state": draw.mapping(3), draw.pick(EVOLVING): draw.value()})


EVOLVING = ["current_step", "status", "wait", "revision", "etag", "cancel_requested", "id", "created_at", "state"]


def _options(draw: Draw) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if draw.byte() % 4 == 3:
        options["expected_revision"] = draw.pick([0, 3, -1, True, 3.0, "3", 2**63, 10**5000, -(10**5000)])
    if draw.byte() % 4 == 3:
        options["op_id"] = draw.pick([FLOW_ID, b"o" * 16, "f" * 32, b"", 10**5000]) if draw.chance() else draw.name()
    return options


def wait_of(draw: Draw) -> Any:
    """A wait in any form, or nearly one."""
    match draw.byte() % 8:
        case 0:
            return Timer(at=draw.moment(), deadline=draw.moment() if draw.chance() else None)
        case 1:
            return ExternalEvent(draw.name(), draw.name())
        case 2:
            return Manual(deadline=draw.moment())
        case 3:
            return draw.value()
    wire = draw.mapping(4) | {"kind": draw.pick(["timer", "external_event", "manual", "own", "", 7])}
    for name in ("at", "deadline", "topic", "correlation_id"):
        if draw.chance():
            wire[name] = draw.name() if draw.chance() else draw.moment()
    return wire


def _observation(draw: Draw, held: Flow) -> Any:
    status = draw.name() if draw.byte() % 8 == 7 else "running"
    child = draw.name() if draw.chance() else None
    return StepObservation(_ref(draw, held), draw.name(), draw.name(), status, child, draw.value())


def _identity(draw: Draw) -> dict[str, Any]:
    identity = WHO | {"state": draw.value(), "current_step": "s"}
    for _ in range(draw.byte() % 3):
        identity[draw.pick(list(identity))] = draw.name()
    if draw.byte() % 4 == 3:
        identity["flow_id"] = _ref(draw, held())
    return identity


SETTINGS = [
    "prefix", "partitions", "deadline_s", "max_payload_bytes", "event_maxlen", "max_connections", "durability",
    "confirm_within_s",
]  # fmt: skip

Caller = Callable[[Draw, FlowManager, Flow], Any]

CALLS: dict[str, Caller] = {
    "create_managed": lambda d, f, _: f.create_managed(**_identity(d), exist_ok=d.chance(), **_op(d)),
    "create_mirrored": lambda d, f, _: f.create_mirrored(**_identity(d), **_op(d)),
    "create_many": lambda d, f, _: f.create_many([NewFlow(**_identity(d)) for _ in range(d.byte() % 3)]),
    "start_running": lambda d, f, h: f.start_running(_ref(d, h), **_options(d)),
    "set_waiting": lambda d, f, h: f.set_waiting(_ref(d, h), wait_of(d), **_options(d)),
    "resume": lambda d, f, h: f.resume(_ref(d, h), d.value(), **_options(d)),
    "finish": lambda d, f, h: f.finish(_ref(d, h), d.value(), **_options(d)),
    "fail": lambda d, f, h: f.fail(_ref(d, h), d.name(), **_options(d)),
    "request_cancel": lambda d, f, h: f.request_cancel(_ref(d, h), **_options(d)),
    "cancel": lambda d, f, h: f.cancel(_ref(d, h), **_options(d)),
    "update_state": lambda d, f, h: f.update_state(
        _ref(d, h),
        d.mapping(4) if d.chance() else d.value(),
        next_step=d.name() if d.chance() else None,
        increment=d.mapping(1) if d.chance() else None,
        unset=[d.name() for _ in range(d.byte() % 3)] if d.chance() else d.value(1) if d.byte() % 8 == 7 else (),
        **_options(d),
    ),
    "update_and_append": lambda d, f, h: f.update_and_append(_ref(d, h), d.name(), d.value(), **_options(d)),
    "mutate": lambda d, f, h: f.mutate(
        h if d.chance() else _ref(d, h),
        lambda flow: attrs.evolve(flow, **{d.pick(EVOLVING): d.value()}),
        kind=d.name(),
        payload=d.value(),
        **_options(d),
    ),
    "append_event": lambda d, f, h: f.append_event(_ref(d, h), d.name(), d.value(), **_options(d)),
    "observe": lambda d, f, h: f.record_step_observation(
        _observation(d, h), runtime=d.name() if d.byte() % 8 == 7 else "managed", **_options(d)
    ),
    "delete": lambda d, f, h: f.delete(_ref(d, h), **_options(d)),
    "get": lambda d, f, h: f.get(_ref(d, h)),
    "get_many": lambda d, f, h: f.get_many([_ref(d, h), _ref(d, h)]),
    "list_by_owner": lambda d, f, _: f.list_by_owner(d.name(), limit=_number(d)),
    "list_by_status": lambda d, f, _: f.list_by_status(
        d.name(), limit=_number(d), updated_before=d.moment() if d.chance() else d.value(1)
    ),
    "iter_by_owner": lambda d, f, _: list(f.iter_by_owner(d.name(), page=_number(d))),
    "iter_by_status": lambda d, f, _: list(f.iter_by_status("running", page=_number(d))),
    "list_events": lambda d, f, h: f.list_events(_ref(d, h), _number(d)),
    "iter_events": lambda d, f, h: list(f.iter_events(_ref(d, h), after=d.name())),
    "find_step": lambda d, f, h: f.find_step_by_run_id(_ref(d, h), d.name()),
    "watch": lambda d, f, h: list(f.watch(_ref(d, h), after=d.name(), timeout=0 if d.chance() else _refused_number(d))),
    "wait_for": lambda d, f, h: f.wait_for(
        _ref(d, h), "running" if d.chance() else d.name(), timeout=0 if d.chance() else _refused_number(d)
    ),
    "prune": lambda d, f, _: f.prune_terminal_flows(timedelta(d.byte() - 9) if d.chance() else d.value(1)),
    "for_owner": lambda d, f, h: f.for_owner(d.name()).cancel(_ref(d, h), **_options(d)),
    "tick": lambda d, f, _: WaitEngine(f).tick(d.moment() if d.chance() else d.value(1)),
    "run": lambda d, f, _: WaitEngine(f).run(_refused_number(d)),
    "try_resume": lambda d, f, h: WaitEngine(f).try_resume_external(
        _ref(d, h), d.name(), d.name(), d.value(), op_id=_options(d).get("op_id")
    ),
    "resume_waiters": lambda d, f, _: WaitEngine(f).resume_waiters(d.name(), d.name(), d.value()),
    "manager": lambda d, *_: FlowManager.from_url("redis://nowhere", **{d.pick(SETTINGS): d.name()}),
    "settings": lambda d, *_: FlowManager.from_url("redis://nowhere", **{d.pick(SETTINGS): _number(d)}),
}


def _op(draw: Draw) -> dict[str, Any]:
    return {name: value for name, value in _options(draw).items() if name == "op_id"}


def _number(draw: Draw) -> Any:
    return draw.value(1) if draw.byte() % 4 == 3 else draw.integer()


def _refused_number(draw: Draw) -> Any:
    """One that no call waits for."""
    number = draw.value(1)
    return -1 if number is None or (isinstance(number, int | float) and number >= 0) else number


def calls(source: bytes) -> None:
    """Whatever is passed is refused before anything is written, or what is written reads back."""
    draw = Draw(source)
    name = draw.pick(list(CALLS))
    flows = Offline.made(lambda step: replies(step, applied, sound_reply))
    caller = flows.for_owner("o") if draw.byte() % 8 == 7 else flows
    refusal: Exception | None = None
    try:
        _require_whole(CALLS[name](draw, caller, held()))
    except (FlowError, TimeoutError) as error:
        refusal = error
    assert len(str(refusal)) < LONGEST_MESSAGE
    written = [step for step in flows.sent if isinstance(step, Call | Batch)]
    # Only what a script has looked at may be refused behind it.
    assert not isinstance(refusal, InvalidData) or not written or "cannot be incremented" in str(refusal)
    for step in written:
        for call in [step] if isinstance(step, Call) else step.calls:
            _require_readable(call)
    for step in flows.sent:
        for command in getattr(step, "commands", ()):
            _require_runnable(command)


def _require_whole(result: Any) -> None:
    """What is returned can be looked at."""
    for one in result if isinstance(result, list | tuple) else [result]:
        if isinstance(one, Flow):
            for attribute in attrs.fields(Flow):
                getattr(one, attribute.name)
            plain("the state", one.state)


def _require_readable(call: Call) -> None:
    """What a script would store can be read, under keys that are where the call goes."""
    source = UNTRIMMED.append_event.source
    for attempt, refusal in ATTEMPTS:
        command = call.command(source, attempt, refusal)
        for part in command:
            assert type(part) is bytes
        conditions = command[4 + len(call.keys)]
        if conditions:  # as lua/include/conditions.lua splits them
            assert conditions.split(b"|", 3) == [attempt, refusal, call.expected, call.owner]
        else:
            assert (attempt, refusal, call.expected, call.owner) == (b"", b"", b"", b"")
    assert {KEYSPACE.parse(key).partition.slot for key in call.keys} == {call.slot}  # type: ignore[union-attr]  # None fails too
    assert is_drawn(call.op_id) or call.brought
    assert call.doubtful is (call.brought and is_drawn(call.op_id))
    if call.seen:
        key = KEYSPACE.parse(call.seen)
        assert key is not None
        assert (key.kind, key.name) == ("seen", str(call.flow_id).encode())
        assert not call.brought or call.seen in call.keys
    match call.script.name:
        case "create":
            ends = 4 + 2 * int(call.args[3])
            events, fields = call.args[4:ends], call.args[ends:]
            for kind, payload in zip(events[::2], events[1::2], strict=True):
                _require_event(kind, payload)
            stored = dict(zip(fields[::2], fields[1::2], strict=True))
            last = {b"status": call.args[2], b"revision": b"0", b"etag": call.op_id.encode()}
            flow = read_flow(call.flow_id, flat({**stored, **last, b"created_at": NOW, b"updated_at": NOW}))
            assert flow is not None
            (owner_key,) = [key for key in map(KEYSPACE.parse, call.keys) if key and key.kind == "owner"]
            assert owner_key.name == flow.owner_session_key.encode() == stored[b"owner_session_key"]
        case "transition":
            _require_event(b"x", call.args[3])
        case "append_event":
            _require_event(*call.args)
        case "observe_step":
            run_id, *_, kind, payload = call.args
            _require_event(kind, payload)
            assert read_step(FLOW_ID, applied(call)[1]).run_id == run_id.decode()


def _require_event(kind: bytes, payload: bytes) -> None:
    fields = flat(EVENT | {b"kind": kind, b"payload": payload})
    assert read_event(FLOW_ID, [b"1700000000000-1", fields]).kind.encode() == kind


# Where the server wants a number of 64 bits.
_COUNTS = {b"COUNT": 1, b"LIMIT": 2}


def _require_runnable(command: Command) -> None:
    """The server would take it."""
    for part in command.args:
        assert type(part) is bytes
    for word, distance in _COUNTS.items():
        if word in command.args:
            assert INT64_MIN <= int(command.args[command.args.index(word) + distance]) <= INT64_MAX, command.args
