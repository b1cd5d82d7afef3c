"""How an operation's calls reach the server exactly once.

The client library's own resending is off; this is the only place that sends twice. A resend carries the id of
its operation and says how long ago the first attempt was, so the script finds what that attempt did. The rules
live in one generator, which the sync and the asyncio wire drive alike: it yields packets, blocks and pauses.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import attrs

from redisflow.calls import Batch, Block, Call, Lost, Op, Packet, Pause, Read, Refusal, Reply, T
from redisflow.errors import FlowError, InvalidData, OutcomeUnknown, StorageError
from redisflow.scripts import Source

# The server answered and did not execute: it may in a moment.
_PASSING = frozenset(
    {"TRYAGAIN", "CLUSTERDOWN", "LOADING", "READONLY", "MASTERDOWN", "BUSY", "MISCONF", "NOREPLICAS", "MAXCLIENTS"}
)
_MEANINGS = {
    "NOPERM": "this user lacks a permission the library needs",
    "OOM": "the server is out of memory and changed nothing",
}
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 1.0
_LEAST_WAIT_S = 1.0  # for what an attempt comes to, however near the deadline it began
_BATCH_LIMIT = 500

Step = Packet | Block | Pause


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
    """The attempts of one call that was not answered at once: what to send next, and what came of it."""

    __slots__ = ("_call", "_first_s", "_source", "_text", "outcome", "settled")

    def __init__(self, call: Call, policy: Policy) -> None:
        self._call = call
        self._source = _source_of(call, policy)
        self._text = False
        self._first_s: float | None = None
        self.settled = False
        self.outcome: Reply | FlowError = None

    def command(self, now_s: float) -> Sequence[bytes]:
        """The command to send at `now_s`."""
        span_ms = None if self._first_s is None else int((now_s - self._first_s) * 1000) + 1
        # After NOSCRIPT, the text: one round trip, and the server keeps it.
        return self._call.command(self._source, span_ms, text=self._text)

    def note(self, answer: Reply | Refusal | Lost, sent_s: float) -> bool:
        """Take in what came of a packet sent at `sent_s`. Returns whether to send again at once."""
        if isinstance(answer, Lost):
            if answer.sent and self._first_s is None:
                self._first_s = sent_s
            if answer.lasting:
                self.give_up(answer)
        elif not isinstance(answer, Refusal):
            self.settled, self.outcome = True, answer
        elif answer.code == "NOSCRIPT" and not self._text:
            self._text = True
            return True
        elif answer.code not in _PASSING:
            self.give_up(answer)
        return False

    def give_up(self, failure: Refusal | Lost) -> None:
        """Settle with an error: unknown, if an attempt may have run."""
        error = _error(self._call.subject, failure)
        if self._first_s is not None:
            unknown = OutcomeUnknown(self._call.op_id, f"{self._call.subject}: no reply came, and then: {error}")
            unknown.__cause__ = error.__cause__ or error
            error = unknown
        self.settled, self.outcome = True, error


def _source_of(call: Call, policy: Policy) -> Source:
    return call.script.plain if policy.plain_scripts else call.script.source


def _error(subject: str, failure: Refusal | Lost) -> FlowError:
    """The error that a refusal or a loss is to the caller."""
    if isinstance(failure, Lost):
        error = StorageError(f"{subject}: {failure}" if failure.sent else str(failure))
        error.__cause__ = failure.__cause__
        return error
    if failure.code == "WRONGTYPE":
        return InvalidData(f"{subject}: a key of it holds the wrong kind of value; nothing was changed")
    meaning = _MEANINGS.get(failure.code, "the server refused")
    return StorageError(f"{subject}: {meaning}: {failure.message}", failure.code)


class _Backoff:
    """When to try again, and when no more."""

    __slots__ = ("_bound_s", "_policy", "until_s")

    def __init__(self, policy: Policy, since_s: float) -> None:
        self._policy = policy
        self.until_s = since_s + policy.deadline_s
        self._bound_s = _FIRST_PAUSE_S

    def next_pause(self) -> Pause | None:
        """The wait before the next attempt, with jitter; `None` when the deadline leaves no room."""
        left_s = self.until_s - self._policy.clock()
        if left_s <= 0:
            return None
        pause_s = random.uniform(self._bound_s / 2, self._bound_s)  # noqa: S311 - spreads load, guards nothing
        self._bound_s = min(2 * self._bound_s, _LONGEST_PAUSE_S)
        return Pause(min(pause_s, left_s))


def _send(packet: Packet) -> Generator[Step, Any, Sequence[Reply | Refusal | Lost]]:
    try:
        replies: Sequence[Reply] = yield packet
    except Lost as lost:
        return [lost] * len(packet.commands)
    return replies


def _insist(
    calls: Sequence[Call], answers: Sequence[Refusal | Lost], sent_s: float, policy: Policy
) -> Generator[Step, Any, list[Reply | FlowError]]:
    """Send calls again that had those answers, until each is settled. Returns one outcome each."""
    attempts = [_Attempts(call, policy) for call in calls]
    pending: Sequence[_Attempts] = attempts
    backoff = _Backoff(policy, sent_s)
    lost_connections: set[int] = set()
    while True:
        lost_connections |= {a.client_id for a in answers if isinstance(a, Lost) and a.client_id is not None}
        notes = [(attempt, answer) for attempt, answer in zip(pending, answers, strict=True)]
        at_once = any([attempt.note(answer, sent_s) for attempt, answer in notes])  # noqa: C419 - notes them all
        unsettled = [(attempt, answer) for attempt, answer in notes if not attempt.settled]
        if not unsettled:
            return [attempt.outcome for attempt in attempts]
        if not at_once:
            pause = backoff.next_pause()
            if pause is None:
                for attempt, answer in unsettled:
                    attempt.give_up(answer)
                return [attempt.outcome for attempt in attempts]
            yield pause
        pending = [attempt for attempt, _ in unsettled]
        sent_s = policy.clock()
        # What is still on its way over a lost connection must not run behind its own resend.
        kills = [(b"CLIENT", b"KILL", b"ID", b"%d" % client_id) for client_id in sorted(lost_connections)]
        commands = [*kills, *(attempt.command(sent_s) for attempt in pending)]
        packet = Packet(calls[0].slot, commands, max(backoff.until_s, sent_s + _LEAST_WAIT_S))
        answers = (yield from _send(packet))[len(kills) :]


TROUBLES = (Refusal, Lost)  # what an answer is that is no reply


def _rescue(call: Call, trouble: Refusal | Lost, sent_s: float, policy: Policy) -> Generator[Step, Any, Reply]:
    """Settle a call whose first attempt was not answered."""
    (outcome,) = yield from _insist((call,), (trouble,), sent_s, policy)
    if isinstance(outcome, FlowError):
        raise outcome from outcome.__cause__
    return outcome


def _commands(calls: Sequence[Call], policy: Policy) -> list[Sequence[bytes]]:
    """The first attempts of a packet. Each script is sent once in full: what is not known would run out of order."""
    commands: list[Sequence[bytes]] = []
    known = set()
    for call in calls:
        source = _source_of(call, policy)
        commands.append(call.command(source, text=source.sha not in known))
        known.add(source.sha)
    return commands


def _deliver_batch(batch: Batch, policy: Policy) -> Generator[Step, Any, list[Reply | FlowError]]:
    outcomes: list[Reply | FlowError] = []
    for start in range(0, len(batch.calls), _BATCH_LIMIT):
        calls = batch.calls[start : start + _BATCH_LIMIT]
        sent_s = policy.clock()
        answers = yield from _send(Packet(calls[0].slot, _commands(calls, policy), sent_s + policy.deadline_s))
        troubled = [n for n, answer in enumerate(answers) if type(answer) in TROUBLES]
        merged = dict(enumerate(answers))
        if troubled:
            settled = yield from _insist([calls[n] for n in troubled], [answers[n] for n in troubled], sent_s, policy)
            merged |= zip(troubled, settled, strict=True)
        outcomes += merged.values()
    return outcomes


def _deliver_read(read: Read, policy: Policy) -> Generator[Step, Any, list[Reply]]:
    replies: list[Reply] = []
    for start in range(0, len(read.commands), _BATCH_LIMIT):
        commands = read.commands[start : start + _BATCH_LIMIT]
        until_s = policy.clock() + policy.deadline_s
        packet = Packet(commands[0].slot, [command.args for command in commands], until_s)
        replies += yield from _ask(packet, _naming(commands[0].args), policy, insist=read.insist)
    for n, reply in enumerate(replies):
        if isinstance(reply, Refusal):
            error = _error(_naming(read.commands[n].args), reply)
            if not read.tolerant:
                raise error
            replies[n] = error
    return replies


def _deliver_block(block: Block, policy: Policy) -> Generator[Step, Any, Reply]:
    subject = _naming((b"XREAD", block.stream))
    (reply,) = yield from _ask(block, subject, policy)
    if isinstance(reply, Refusal):
        raise _error(subject, reply)
    return reply


def _naming(args: Sequence[bytes]) -> str:
    return b" ".join(args[:2]).decode(errors="replace")


def _ask(
    step: Packet | Block, subject: str, policy: Policy, *, insist: bool = True
) -> Generator[Step, Any, Sequence[Reply]]:
    """Ask until there is an answer that is no passing refusal: a read may be asked any number of times."""
    backoff = _Backoff(policy, policy.clock())
    while True:
        failure: Lost | Refusal
        try:
            replies: Sequence[Reply] = yield step
        except Lost as lost:
            failure = lost
        else:
            passing = [reply for reply in replies if isinstance(reply, Refusal) and reply.code in _PASSING]
            if not passing or not insist:
                return replies
            failure = passing[0]
        pause = None if isinstance(failure, Lost) and failure.lasting else backoff.next_pause()
        if pause is None:
            error = _error(subject, failure)
            raise error from error.__cause__
        yield pause
        if isinstance(step, Packet):
            step = step._replace(until_s=max(step.until_s, policy.clock() + _LEAST_WAIT_S))


def _deliver_pause(pause: Pause, _: Policy) -> Generator[Step, Any, None]:
    yield pause


_DELIVER: dict[type, Callable[..., Generator[Step, Any, Any]]] = {
    Batch: _deliver_batch,
    Read: _deliver_read,
    Block: _deliver_block,
    Pause: _deliver_pause,
}


def first_attempt(call: Call, sent_s: float, policy: Policy) -> Packet:
    """The packet of a call that is sent for the first time."""
    return Packet(call.slot, (call.command(_source_of(call, policy)),), sent_s + policy.deadline_s)


def deliver(op: Op[T], policy: Policy) -> Generator[Step, Any, T]:
    """Drive an operation to its end, delivering what it yields."""
    try:
        wanted = next(op)
    except StopIteration as stop:
        result: T = stop.value
        return result
    return (yield from go_on(op, wanted, policy))


def go_on(
    op: Op[T], wanted: Any, policy: Policy, trouble: Refusal | Lost | None = None, sent_s: float = 0.0
) -> Generator[Step, Any, T]:
    """Drive an operation on from what it wants; from a call whose first attempt, at `sent_s`, came to trouble."""
    try:
        while True:
            try:
                if trouble is not None:
                    met, trouble = trouble, None
                    reply = yield from _rescue(wanted, met, sent_s, policy)
                elif type(wanted) is Call:  # by far the most: the first attempt has no generator of its own
                    sent_s = policy.clock()
                    try:
                        (reply,) = yield first_attempt(wanted, sent_s, policy)
                    except Lost as lost:
                        reply = lost
                    if type(reply) in TROUBLES:
                        trouble = reply
                        continue
                else:
                    reply = yield from _DELIVER[type(wanted)](wanted, policy)
            except FlowError as error:
                wanted = op.throw(error)
            else:
                wanted = op.send(reply)
    except StopIteration as stop:
        result: T = stop.value
        return result
