"""How an operation's calls reach the server exactly once.

The client library's own resending is off; this is the only place that sends twice. A resend carries the id of
its operation and says how long ago the first attempt was, so the script finds what that attempt did. The rules
live in one generator, which the sync and the asyncio wire drive alike: it yields packets, blocks and pauses.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs

from redisflow.calls import (
    Again,
    Batch,
    Block,
    Call,
    Client,
    Command,
    Confirm,
    Lost,
    Op,
    Packet,
    Pause,
    Primaries,
    Read,
    Refusal,
    Reply,
    T,
    Unconfirmed,
)
from redisflow.errors import FlowError, InvalidData, OutcomeUnknown, StorageError
from redisflow.scripts import Script, Source

if TYPE_CHECKING:
    from uuid import UUID

# The server answered and did not execute: it may in a moment.
PASSING = frozenset(
    {
        "TRYAGAIN",
        "CLUSTERDOWN",
        "LOADING",
        "READONLY",
        "MASTERDOWN",
        "BUSY",
        "MISCONF",
        "NOREPLICAS",
        "MAXCLIENTS",
        "UNBLOCKED",
    }
)
# Not executed either: another node has the slot, or just this key of it.
REDIRECTS = frozenset({"MOVED", "ASK"})
_MOST_HOPS = 5  # without a pause
_MEANINGS = {
    "MOVED": "this server is one node of a cluster, connect with redis+cluster://",
    "NOPERM": "this user lacks a permission the library needs",
    "OOM": "the server is out of memory and changed nothing",
}
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 1.0
_LEAST_WAIT_S = 1.0  # for what an attempt comes to, however near the deadline it began
_BATCH_LIMIT = 500

Step = Packet | Block | Primaries | Pause


@attrs.frozen
class Policy:
    """How long and for whom to deliver.

    Attributes:
        deadline_s: seconds from the first attempt until a call gives up.
        plain_scripts: send scripts without `#!lua`, for fakeredis.
        cluster: whether there are several nodes, which send commands on to each other.
        confirm: the replicas each change waits for; `None` for none.
        clock: monotonic seconds.
    """

    deadline_s: float
    plain_scripts: bool = False
    cluster: bool = False
    confirm: Confirm | None = None
    clock: Callable[[], float] = time.monotonic


class _Attempts:
    """The attempts of one command that was not answered at once: what to send next, and what came of it."""

    __slots__ = ("_insist", "outcome", "redirect", "settled", "slot", "subject")

    def __init__(self, slot: int | None, subject: str, *, insist: bool = True) -> None:
        self.slot = slot
        self.subject = subject
        self._insist = insist
        self.redirect: Refusal | None = None
        self.settled = False
        self.outcome: Reply | FlowError = None

    def note(self, answer: Reply | Refusal | Lost, sent_s: float, policy: Policy) -> bool:  # noqa: ARG002 - a call's needs it
        """Take in what came of a packet sent at `sent_s`. Returns whether to send again at once."""
        self.redirect = None
        if isinstance(answer, Lost):
            if answer.lasting:
                self.give_up(answer)
        elif not isinstance(answer, Refusal):
            self.settled, self.outcome = True, answer
        elif answer.code in REDIRECTS and policy.cluster:
            self.redirect = answer
            return True
        elif answer.code not in PASSING or not self._insist:
            self.give_up(answer)
        return False

    def give_up(self, failure: Refusal | Lost) -> None:
        """Settle with an error."""
        self.settled, self.outcome = True, _error(self.subject, failure)


class _Asked(_Attempts):
    """Those of a command that may be asked any number of times."""

    __slots__ = ("_script", "args")

    def __init__(self, command: Command, *, insist: bool = True) -> None:
        super().__init__(command.slot, command.subject, insist=insist)
        self.args, self._script = command.args, command.script

    def note(self, answer: Reply | Refusal | Lost, sent_s: float, policy: Policy) -> bool:
        """Take in what came of a packet sent at `sent_s`. Returns whether to send again at once."""
        if type(answer) is Refusal and answer.code == "NOSCRIPT" and self._script is not None:
            self.args = (b"EVAL", _source_of(self._script, policy).text, *self.args[2:])
            self._script = None
            return True
        return super().note(answer, sent_s, policy)


class _Called(_Attempts):
    """Those of a call, which must be applied once."""

    __slots__ = ("_first_s", "_source", "_text", "call")

    def __init__(self, call: Call, policy: Policy) -> None:
        super().__init__(call.slot, call.subject)
        self.call = call
        self._source = _source_of(call.script, policy)
        self._text = False
        self._first_s: float | None = None

    def command(self, now_s: float, told: set[object]) -> Sequence[bytes]:
        """The command to send at `now_s`, behind those that told their node a script."""
        span_ms = None if self._first_s is None else int((now_s - self._first_s) * 1000) + 1
        # After NOSCRIPT, the text: one round trip, and the server keeps it.
        script = (self.slot, self.redirect, self._source.sha)
        text = self._text and script not in told
        if text:
            told.add(script)
        return self.call.command(self._source, span_ms, text=text)

    def note(self, answer: Reply | Refusal | Lost, sent_s: float, policy: Policy) -> bool:
        """Take in what came of a packet sent at `sent_s`. Returns whether to send again at once."""
        if type(answer) is Refusal and answer.code == "NOSCRIPT" and not self._text:
            self._text = True
            return True
        if isinstance(answer, Lost) and answer.sent and self._first_s is None:
            self._first_s = sent_s
        return super().note(answer, sent_s, policy)

    def give_up(self, failure: Refusal | Lost) -> None:
        """Settle with an error: unknown, if an attempt may have run."""
        super().give_up(failure)
        error = self.outcome
        if self._first_s is not None:
            unknown = OutcomeUnknown(self.call.op_id, f"{self.subject}: no reply came, and then: {error}")
            unknown.__cause__ = error.__cause__ or error
            self.outcome = unknown


def _source_of(script: Script, policy: Policy) -> Source:
    return script.plain if policy.plain_scripts else script.source


def _error(subject: str, failure: Refusal | Lost) -> FlowError:
    """The error that a refusal or a loss is to the caller."""
    if isinstance(failure, Lost):
        error = StorageError(f"{subject}: {failure}" if failure.sent else str(failure), failure.code)
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


def _sent(step: Step) -> Generator[Step, Any, Sequence[Reply | Refusal | Lost]]:
    try:
        replies: Sequence[Reply] = yield step
    except Lost as lost:
        return [lost] * (len(step.commands) if isinstance(step, Packet) else 1)
    return replies


# Makes the step that sends what is pending, at a time, to be answered by another, after what came before.
_NextStep = Callable[[Sequence[Any], float, float, Again], Step]


def _insist(
    attempts: Sequence[_Attempts],
    answers: Sequence[Reply | Refusal | Lost],
    sent_s: float,
    policy: Policy,
    next_step: _NextStep,
) -> Generator[Step, Any, list[Reply | FlowError]]:
    """Send again, after those answers, until each command is settled. Returns one outcome each."""
    pending = attempts
    backoff = _Backoff(policy, sent_s)
    lost: frozenset[Client] = frozenset()
    hops = 0
    while True:
        lost = lost | {answer.client for answer in answers if isinstance(answer, Lost) and answer.client is not None}
        notes = list(zip(pending, answers, strict=True))
        at_once = any([each.note(answer, sent_s, policy) for each, answer in notes])  # noqa: C419 - notes them all
        unsettled = [(each, answer) for each, answer in notes if not each.settled]
        if not unsettled:
            return [each.outcome for each in attempts]
        hops = hops + 1 if at_once else 0
        if not at_once or hops > _MOST_HOPS:
            pause = backoff.next_pause()
            if pause is None:
                for each, answer in unsettled:
                    each.give_up(answer)
                return [each.outcome for each in attempts]
            yield pause
        pending = [each for each, _ in unsettled]
        sent_s = policy.clock()
        again = Again(lost, [each.redirect for each in pending])
        answers = yield from _sent(next_step(pending, sent_s, max(backoff.until_s, sent_s + _LEAST_WAIT_S), again))


def _asking(pending: Sequence[_Asked], _: float, until_s: float, again: Again) -> Packet:
    return Packet([each.slot for each in pending], [each.args for each in pending], until_s, again)


def _calling(confirm: Confirm | None, pending: Sequence[_Called], now_s: float, until_s: float, again: Again) -> Packet:
    told: set[object] = set()
    commands = [each.command(now_s, told) for each in pending]
    slots = [each.slot for each in pending]
    return Packet(slots, commands, until_s, again, _confirm(confirm, [each.call for each in pending]))


def _confirm(confirm: Confirm | None, calls: Sequence[Call]) -> Confirm | None:
    return confirm and attrs.evolve(confirm, flow_keys=[call.keys[0] for call in calls])


TROUBLES = (Refusal, Lost)  # what an answer is that is no reply


def _rescue(call: Call, trouble: Refusal | Lost, sent_s: float, policy: Policy) -> Generator[Step, Any, Reply]:
    """Settle a call whose first attempt was not answered."""
    next_step = partial(_calling, policy.confirm)
    (outcome,) = yield from _insist((_Called(call, policy),), (trouble,), sent_s, policy, next_step)
    if isinstance(outcome, FlowError):
        raise outcome from outcome.__cause__
    return outcome


def _rounds(calls: Sequence[Call], policy: Policy) -> Iterator[Sequence[int]]:
    """The calls, by number, that may go together.

    One server runs the calls of a packet in order. In a cluster one of them may be sent on to another node and run
    behind those that were queued after it, so there each flow is in a packet once.
    """
    rounds: list[list[int]] = [[]]
    calls_of: Counter[UUID] = Counter()
    for number, call in enumerate(calls):
        nth = calls_of[call.flow_id] if policy.cluster else 0
        calls_of[call.flow_id] += 1
        if nth == len(rounds):
            rounds.append([])
        rounds[nth].append(number)
    for numbers in rounds:
        for start in range(0, len(numbers), _BATCH_LIMIT):
            yield numbers[start : start + _BATCH_LIMIT]


def _first_packet(calls: Sequence[Call], sent_s: float, confirm: Confirm | None, policy: Policy) -> Packet:
    """The first attempts of calls. A lone server is sent each script in full once.

    What it does not know would run out of order.
    """
    commands: list[Sequence[bytes]] = []
    known = set()
    for call in calls:
        source = _source_of(call.script, policy)
        commands.append(call.command(source, text=not policy.cluster and source.sha not in known))
        known.add(source.sha)
    slots = [call.slot for call in calls]
    return Packet(slots, commands, sent_s + policy.deadline_s, confirm=_confirm(confirm, calls))


def _deliver_batch(batch: Batch, policy: Policy) -> Generator[Step, Any, list[Reply | FlowError]]:
    outcomes: list[Reply | FlowError] = [None] * len(batch.calls)
    confirm = policy.confirm if batch.confirm else None
    for numbers in _rounds(batch.calls, policy):
        calls = [batch.calls[number] for number in numbers]
        sent_s = policy.clock()
        answers = yield from _sent(_first_packet(calls, sent_s, confirm, policy))
        attempts_of = partial(_Called, policy=policy)
        settled = yield from _settled(
            calls, answers, sent_s, policy, attempts_of=attempts_of, next_step=partial(_calling, confirm)
        )
        for number, outcome in zip(numbers, settled, strict=True):
            outcomes[number] = outcome
    return outcomes


def _deliver_read(read: Read, policy: Policy) -> Generator[Step, Any, list[Reply]]:
    replies: list[Reply] = []
    for start in range(0, len(read.commands), _BATCH_LIMIT):
        commands = read.commands[start : start + _BATCH_LIMIT]
        sent_s = policy.clock()
        slots, args = [command.slot for command in commands], [command.args for command in commands]
        answers = yield from _sent(Packet(slots, args, sent_s + policy.deadline_s))
        attempts_of = partial(_Asked, insist=read.insist)
        replies += yield from _settled(commands, answers, sent_s, policy, attempts_of=attempts_of, next_step=_asking)
    if not read.tolerant:
        for reply in replies:
            if isinstance(reply, FlowError):
                raise reply from reply.__cause__
    return replies


def _settled(
    wanted: Sequence[T],
    answers: Sequence[Reply],
    sent_s: float,
    policy: Policy,
    *,
    attempts_of: Callable[[T], _Attempts],
    next_step: _NextStep,
) -> Generator[Step, Any, list[Reply | FlowError]]:
    """The answers of first attempts, and what came of those that met with trouble."""
    outcomes = list(answers)
    troubled = [number for number, answer in enumerate(answers) if type(answer) in TROUBLES]
    if troubled:
        attempts = [attempts_of(wanted[number]) for number in troubled]
        settled = yield from _insist(attempts, [answers[number] for number in troubled], sent_s, policy, next_step)
        for number, outcome in zip(troubled, settled, strict=True):
            outcomes[number] = outcome
    return outcomes


def _deliver_block(block: Block, policy: Policy) -> Generator[Step, Any, Reply]:
    return (yield from _ask(block, Command(block.slot, (b"XREAD", block.stream)), policy))


def _deliver_primaries(primaries: Primaries, policy: Policy) -> Generator[Step, Any, Reply]:
    return (yield from _ask(primaries, Command(None, (b"CLUSTER", b"SLOTS")), policy))


def _ask(step: Block | Primaries, command: Command, policy: Policy) -> Generator[Step, Any, Reply]:
    """Take the step until there is an answer, which is that of a command."""
    sent_s = policy.clock()
    answers = yield from _sent(step)
    (outcome,) = yield from _insist(
        [_Asked(command)],
        answers,
        sent_s,
        policy,
        lambda _pending, _now, _until, again: attrs.evolve(step, again=again),
    )
    if isinstance(outcome, FlowError):
        raise outcome from outcome.__cause__
    return outcome


def _deliver_pause(pause: Pause, _: Policy) -> Generator[Step, Any, None]:
    yield pause


_DELIVER: dict[type, Callable[..., Generator[Step, Any, Any]]] = {
    Batch: _deliver_batch,
    Read: _deliver_read,
    Block: _deliver_block,
    Primaries: _deliver_primaries,
    Pause: _deliver_pause,
}


def first_attempt(call: Call, sent_s: float, policy: Policy) -> Packet:
    """The packet of a call that is sent for the first time."""
    command, until_s = call.command(_source_of(call.script, policy)), sent_s + policy.deadline_s
    if policy.confirm is None:
        return Packet((call.slot,), (command,), until_s)
    return Packet((call.slot,), (command,), until_s, confirm=_confirm(policy.confirm, [call]))


def _result(stop: StopIteration, short: Unconfirmed | None) -> Any:
    """What the operation came to, unless fewer replicas have it than should."""
    if short is not None:
        raise short.error(stop.value) from None
    return stop.value


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
    """Drive an operation on from what it wants; from a call whose first attempt, at `sent_s`, came to trouble.

    Raises:
        NotDurable: it went through, and fewer replicas confirmed it than the policy wants.
    """
    short: Unconfirmed | None = None
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
                if type(reply) is Unconfirmed:
                    short, reply = reply, reply.reply
            except FlowError as error:
                wanted = op.throw(error)
            else:
                wanted = op.send(reply)
    except StopIteration as stop:
        outcome: T = _result(stop, short)
        return outcome
