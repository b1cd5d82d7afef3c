"""How an operation's calls reach the server exactly once.

The client library's own resending is off; this is the only place that sends twice. A resend carries the id of
its operation and says how long ago the first attempt was, so the script finds what that attempt did. The rules
live in one generator, which the sync and the asyncio wire drive alike: it yields packets, blocks and pauses.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

import attrs

from redisflow.calls import Batch, Block, Call, Lost, Packet, Pause, Read, Refusal, Reply
from redisflow.errors import FlowError, InvalidData, OutcomeUnknown, StorageError

# The server answered and did not execute: it may in a moment.
_PASSING = frozenset(
    {"TRYAGAIN", "CLUSTERDOWN", "LOADING", "READONLY", "MASTERDOWN", "BUSY", "MISCONF", "NOREPLICAS", "MAXCLIENTS"}
)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 1.0
_BATCH_LIMIT = 500

Step = Packet | Block | Pause
T = TypeVar("T")


@attrs.frozen
class Policy:
    """How long and for whom to deliver.

    Attributes:
        deadline_s: seconds from the first attempt until a call gives up.
        plain_scripts: send scripts without `#!lua`, for fakeredis.
        clock: monotonic seconds.
    """

    deadline_s: float
    plain_scripts: bool = False
    clock: Callable[[], float] = time.monotonic


class _Attempts:
    """The attempts of one call: what to send next, and what came of it."""

    __slots__ = ("_call", "_first_s", "_source", "_text", "outcome", "settled")

    def __init__(self, call: Call, policy: Policy) -> None:
        self._call = call
        self._source = call.script.plain if policy.plain_scripts else call.script.source
        self._text = False
        self._first_s: float | None = None
        self.settled = False
        self.outcome: Reply | FlowError = None

    def command(self, now_s: float) -> Sequence[bytes]:
        """The command to send at `now_s`."""
        call = self._call
        args = call.args
        if self._first_s is not None and call.op_id:
            args = call.args_after(int((now_s - self._first_s) * 1000) + 1)
        # After NOSCRIPT, the text: one round trip, and the server keeps it.
        how = (b"EVAL", self._source.text) if self._text else (b"EVALSHA", self._source.sha)
        return (*how, b"%d" % len(call.keys), *call.keys, *args)

    def take(self, reply: Reply) -> bool:
        """Note the reply. Returns whether to try again at once."""
        if not isinstance(reply, Refusal):
            self.settled, self.outcome = True, reply
            return False
        if reply.code == "NOSCRIPT" and not self._text:
            self._text = True
            return True
        if reply.code not in _PASSING:
            self.give_up(_refused(self._call.subject, reply))
        return False

    def lose(self, lost: Lost, sent_s: float) -> None:
        """Note that no reply came to what was sent at `sent_s`."""
        if lost.sent and self._first_s is None:
            self._first_s = sent_s
        if lost.lasting:
            self.give_up(_storage_error(self._call.subject, lost))

    def give_up(self, error: FlowError) -> None:
        """Settle with an error: unknown, if an attempt may have run."""
        self.settled, self.outcome = True, error
        if self._first_s is not None and self._call.op_id:
            self.outcome = OutcomeUnknown(self._call.op_id, f"{self._call.subject}: no reply came, and then: {error}")
            self.outcome.__cause__ = error.__cause__ or error


def _refused(subject: str, refusal: Refusal) -> FlowError:
    if refusal.code == "WRONGTYPE":
        return InvalidData(f"{subject}: a key of it holds the wrong kind of value; nothing was changed")
    if refusal.code == "NOPERM":
        return StorageError(f"{subject}: this user lacks a permission the library needs: {refusal.message}")
    if refusal.code == "OOM":
        return StorageError(f"{subject}: the server is out of memory and changed nothing: {refusal.message}")
    return StorageError(f"{subject}: the server refused: {refusal.message}")


def _storage_error(subject: str, failure: Lost | Refusal) -> FlowError:
    if isinstance(failure, Refusal):
        return _refused(subject, failure)
    error = StorageError(f"{subject}: {failure}")
    error.__cause__ = failure.__cause__
    return error


class _Backoff:
    """When to try again, and when no more."""

    __slots__ = ("_bound_s", "_policy", "_until_s")

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._until_s = policy.clock() + policy.deadline_s
        self._bound_s = _FIRST_PAUSE_S

    def next_pause(self) -> float | None:
        """Seconds to wait before the next attempt, with jitter; `None` when the deadline leaves no room."""
        left_s = self._until_s - self._policy.clock()
        if left_s <= 0:
            return None
        pause_s = random.uniform(self._bound_s / 2, self._bound_s)  # noqa: S311 - spreads load, guards nothing
        self._bound_s = min(2 * self._bound_s, _LONGEST_PAUSE_S)
        return min(pause_s, left_s)


def _deliver_calls(calls: Sequence[Call], policy: Policy) -> Generator[Step, Any, list[Reply | FlowError]]:
    """Deliver calls of one node together. Returns one outcome each."""
    attempts = [_Attempts(call, policy) for call in calls]
    pending = attempts
    backoff = _Backoff(policy)
    while True:
        again_at_once = False
        last: Lost | Refusal | None = None
        sent_s = policy.clock()
        try:
            replies = yield Packet(calls[0].slot, [attempt.command(sent_s) for attempt in pending])
        except Lost as lost:
            last = lost
            for attempt in pending:
                attempt.lose(lost, sent_s)
        else:
            for attempt, reply in zip(pending, replies, strict=True):
                again_at_once |= attempt.take(reply)
                if isinstance(reply, Refusal):
                    last = reply
        pending = [attempt for attempt in pending if not attempt.settled]
        if not pending or last is None:
            return [attempt.outcome for attempt in attempts]
        if again_at_once:
            continue
        pause_s = backoff.next_pause()
        if pause_s is None:
            for attempt in pending:
                attempt.give_up(_storage_error(calls[0].subject, last))
            return [attempt.outcome for attempt in attempts]
        yield Pause(pause_s)


def _deliver_batch(batch: Batch, policy: Policy) -> Generator[Step, Any, list[Reply | FlowError]]:
    outcomes: list[Reply | FlowError] = []
    for start in range(0, len(batch.calls), _BATCH_LIMIT):
        outcomes += yield from _deliver_calls(batch.calls[start : start + _BATCH_LIMIT], policy)
    return outcomes


def _deliver_read(read: Read, policy: Policy) -> Generator[Step, Any, list[Reply]]:
    replies: list[Reply] = []
    for start in range(0, len(read.commands), _BATCH_LIMIT):
        commands = read.commands[start : start + _BATCH_LIMIT]
        replies += yield from _read_some(Packet(commands[0].slot, [c.args for c in commands]), policy)
    if not read.tolerant:
        for command, reply in zip(read.commands, replies, strict=True):
            if isinstance(reply, Refusal):
                raise _refused(_naming(command.args), reply)
    return replies


def _naming(args: Sequence[bytes]) -> str:
    return b" ".join(args[:2]).decode(errors="replace")


def _read_some(packet: Packet, policy: Policy) -> Generator[Step, Any, list[Reply]]:
    backoff = _Backoff(policy)
    while True:
        last: Lost | Refusal
        try:
            replies: list[Reply] = yield packet
        except Lost as lost:
            last = lost
            if lost.lasting:
                raise _storage_error(_naming(packet.commands[0]), lost) from lost.__cause__
        else:
            passing = [r for r in replies if isinstance(r, Refusal) and r.code in _PASSING]
            if not passing:
                return replies
            last = passing[0]
        pause_s = backoff.next_pause()
        if pause_s is None:
            error = _storage_error(_naming(packet.commands[0]), last)
            raise error from error.__cause__
        yield Pause(pause_s)


def _deliver_block(block: Block, policy: Policy) -> Generator[Step, Any, Reply]:
    backoff = _Backoff(policy)
    while True:
        last: Lost | Refusal
        try:
            reply = yield block
        except Lost as lost:
            last = lost
            if lost.lasting:
                raise _storage_error(_naming((b"XREAD", block.stream)), lost) from lost.__cause__
        else:
            if not isinstance(reply, Refusal):
                return reply
            last = reply
            if reply.code not in _PASSING:
                raise _refused(_naming((b"XREAD", block.stream)), reply)
        pause_s = backoff.next_pause()
        if pause_s is None:
            error = _storage_error(_naming((b"XREAD", block.stream)), last)
            raise error from error.__cause__
        yield Pause(pause_s)


def _deliver_one(call: Call, policy: Policy) -> Generator[Step, Any, Reply]:
    (outcome,) = yield from _deliver_calls((call,), policy)
    if isinstance(outcome, FlowError):
        raise outcome from outcome.__cause__
    return outcome


def _deliver_pause(pause: Pause, _: Policy) -> Generator[Step, Any, None]:
    yield pause


_DELIVER: dict[type, Callable[..., Generator[Step, Any, Any]]] = {
    Call: _deliver_one,
    Batch: _deliver_batch,
    Read: _deliver_read,
    Block: _deliver_block,
    Pause: _deliver_pause,
}


def deliver(op: Generator[Any, Any, T], policy: Policy) -> Generator[Step, Any, T]:
    """Drive an operation to its end, delivering what it yields."""
    try:
        wanted = next(op)
        while True:
            try:
                reply = yield from _DELIVER[type(wanted)](wanted, policy)
            except FlowError as error:
                wanted = op.throw(error)
            else:
                wanted = op.send(reply)
    except StopIteration as stop:
        result: T = stop.value
        return result
