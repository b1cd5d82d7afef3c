"""A manager without a server: its calls are answered by a function, and noted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import UUID

import msgpack

from redisflow import Flow, FlowManager
from redisflow.calls import Batch, Block, Call, Command, Op, Primaries, Read, T
from redisflow.codec import read_flow
from redisflow.flow import UPDATE_DELTAS
from redisflow.scripts import UNTRIMMED

FLOW_ID = UUID(int=7)
WHO: dict[str, Any] = {"controller_id": "c", "goal": "g", "owner_session_key": "o", "requester_origin": "r"}
NOW = b"1700000000000001"
HASH: dict[bytes, bytes] = {
    b"controller_id": b"c",
    b"goal": b"g",
    b"owner_session_key": b"o",
    b"requester_origin": b"r",
    b"current_step": b"s",
    b"status": b"running",
    b"revision": b"3",
    b"etag": b"e" * 32,
    b"created_at": b"1700000000000000",
    b"updated_at": b"1700000000000000",
    b"s:n": b"1",
    b"s:m": msgpack.packb(["x", {"y": b"z"}]),
}
WAITING = HASH | {
    b"status": b"waiting",
    b"wait": msgpack.packb({"kind": "timer", "at": "2020-01-01T00:00:00Z", "deadline": "2019-01-01T00:00:00Z"}),
}
EVENT: dict[bytes, bytes] = {b"rev": b"3", b"kind": b"note", b"op": b"e" * 32, b"payload": msgpack.packb({"k": [1]})}
DIGITS = {b"-", *(b"%d" % digit for digit in range(10))}
STEP: list[Any] = [b"i" * 16, "1700000000000000", "1700000000000000", None, "run", "task", "managed", "running", None]


def flat(fields: dict[bytes, bytes]) -> list[bytes]:
    """A hash as HGETALL replies."""
    return [part for pair in fields.items() for part in pair]


class Offline(FlowManager):
    """A manager whose server is a function."""

    answer: Callable[[Any], Any]
    sent: list[Any]

    @classmethod
    def made(cls, answer: Callable[[Any], Any]) -> Offline:
        """Make one of a namespace of four partitions."""
        manager = cls.from_url("redis://nowhere", prefix="p", partitions=4)
        manager.namespace.connected(4)
        manager.answer, manager.sent = answer, []
        return manager

    def perform(self, op: Op[T]) -> T:
        try:
            step = next(op)
            while True:
                self.sent.append(step)
                step = op.send(self.answer(step))
        except StopIteration as stop:
            value: T = stop.value
            return value


def replies(step: Any, to_call: Callable[[Call], Any], to_command: Callable[[Command], Any]) -> Any:
    """The replies to a step of an operation."""
    match step:
        case Call():
            return to_call(step)
        case Batch(calls=calls):
            return [to_call(call) for call in calls]
        case Read(commands=commands):
            return [to_command(command) for command in commands]
        case Primaries():
            return [None]
        case Block():
            return []
    return None


def unbound(command: Command) -> Command:
    """The read that a bound caller has lua/read_own.lua run."""
    if command.args[0] != b"EVALSHA":
        return command
    _, _, _, _, key, _, name, *args = command.args
    return Command(command.slot, (name, key, *args))


_WITH_DELTAS = {script.script for (verb, _), script in UNTRIMMED.transitions.items() if verb is UPDATE_DELTAS}


def applied(call: Call, stored: Mapping[bytes, bytes] = HASH) -> Any:  # noqa: PLR0911 - one per script
    """What a script answers that has applied a call to a flow, which the caller holds, or cannot add to a field."""
    if call.script in _WITH_DELTAS:
        n_unset, n_increment = map(int, call.args[5:7])
        deltas = call.args[7 + n_unset : 7 + n_unset + 2 * n_increment]
        for field, delta in zip(deltas[::2], deltas[1::2], strict=True):
            number = stored.get(field, b"0")
            if number[:1] not in DIGITS or not -(2**63) <= int(number) + int(delta) < 2**63:
                return [b"NOT_INTEGER", field]
    match call.script.name:
        case "transition":
            if not call.args[1]:  # no copy is held: the whole flow
                return [b"FLOW", flat(HASH), b"1700000000000-1", b"4"]
            return [b"OK", NOW, b"1700000000000-1"]
        case "append_event":
            return [b"OK", b"1700000000000-1", b"3"]
        case "observe_step":
            return [b"OK", step_stored(call.args)]
        case "delete":
            return [b"OK"]
    return NOW


def step_stored(args: Sequence[bytes]) -> bytes:
    """What lua/observe_step.lua makes of its arguments where the step is new."""
    _, head, child, tail, *_ = args
    return head + 2 * (b"\xb0" + NOW) + child + tail


def sound_reply(command: Command) -> Any:
    """What the server answers to a read of the flow HASH."""
    command = unbound(command)
    match command.args[0]:
        case b"TIME":
            return [b"1700000000", b"5"]
        case b"HGETALL":
            return flat(HASH)
        case b"HMGET":
            return [HASH.get(field) for field in command.args[2:]]
        case b"XRANGE" | b"XREVRANGE" if command.args[2] in {b"-", b"+"}:
            return [[b"1700000000000-1", flat(EVENT)]]
        case b"ZCARD" | b"ZINTERCARD":
            return 0
    return []


def held() -> Flow:
    """The flow HASH, as it was read."""
    flow = read_flow(FLOW_ID, flat(HASH))
    assert flow is not None
    return flow
