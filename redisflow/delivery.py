"""How an operation's calls reach the server exactly once.

The client library's own resending is off; this is the only place that sends twice. An attempt that was lost is settled
before the call is sent again, see `redisflow.settling`. The rules live in one generator, which the sync and the asyncio
wire drive alike: it yields packets, blocks, pauses and what is done together with others.
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
    Together,
    Unconfirmed,
)
from redisflow.errors import FlowError, InvalidData, OutcomeUnknown, StorageError
from redisflow.scripts import Script, Source
from redisflow.settling import Doubt, Verdict, Verdicts, fence_of, number_of, settle

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

_MOST_FENCES = 10_000

Step = Packet | Block | Primaries | Pause | Together


class Fences:
    """The fences of flows that were told lately: a caller that has no copy of a flow has no other way to know."""

    def __init__(self) -> None:
        self._known: dict[UUID, bytes] = {}

    def __bool__(self) -> bool:
        return bool(self._known)

    def of(self, call: Call) -> bytes:
        """Return the fence for a first attempt: that of the caller's copy, unless a later one was told."""
        held, told = fence_of(call.copy), self._known.get(call.flow_id, b"")
        return max(held, told, key=number_of)

    def learn(self, flow_id: UUID, fence: bytes) -> None:
        """Take in a fence."""
        if len(self._known) >= _MOST_FENCES:
            self._known.clear()  # each costs one more round trip to be told again
        self._known[flow_id] = fence


@attrs.frozen
class Policy:
    """How long and for whom to deliver.

    Attributes:
        deadline_s: seconds from the first attempt until a call gives up.
        plain_scripts: send scripts without `#!lua`, for fakeredis.
        cluster: whether there are several nodes, which send commands on to each other.
        confirm: the replicas each change waits for; `None` for none.
        fences: those that are known.
        clock: monotonic seconds.
    """

    deadline_s: float
    plain_scripts: bool = False
    cluster: bool = False
    confirm: Confirm | None = None
    fences: Fences = attrs.field(factory=Fences)
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

    def note(self, answer: Reply | Refusal | Lost, policy: Policy) -> bool:
        """Take in the answer to an attempt. Returns whether to send again at once."""
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

    def note(self, answer: Reply | Refusal | Lost, policy: Policy) -> bool:
        """Take in the answer to an attempt. Returns whether to send again at once."""
        if type(answer) is Refusal and answer.code == "NOSCRIPT" and self._script is not None:
            self.args = (b"EVAL", _source_of(self._script, policy).text, *self.args[2:])
            self._script = None
            return True
        return super().note(answer, policy)


class _Called(_Attempts):
    """Those of a call, which must be applied once."""

    __slots__ = ("_attempt", "_carried", "_fences", "_is_lost", "_own_source", "_refusal", "_text", "call")

    def __init__(self, call: Call, policy: Policy) -> None:
        super().__init__(call.slot, call.subject)
        self.call = call
        self._own_source = _source_of(call.script, policy)
        self._text = False
        self._fences = policy.fences
        self._attempt, self._refusal = call.fence, b""
        # Whether an attempt may have been applied, or may still be; and the fence it knew, `None` for another caller's.
        self._is_lost = call.doubtful
        self._carried: bytes | None = None

    @property
    def doubt(self) -> Doubt | None:
        """What must be settled before the call is sent again."""
        return Doubt(self.call, self._carried) if self._is_lost else None

    def judge(self, verdict: Verdict) -> None:
        """Take in what became of the attempts so far."""
        if verdict.unknown:
            self.settled, self.outcome = True, OutcomeUnknown(self.call.op_id, f"{self.subject}: {verdict.unknown}")
        elif verdict.is_deleted:
            self.settled, self.outcome = True, self.call.if_deleted
        else:
            self._is_lost = False
            self._know(verdict.fence)
            if verdict.event_id:
                self._attempt = b"=" + verdict.event_id

    def command(self, told: set[object]) -> Sequence[bytes]:
        """Build the command to send, after those that told their node a script."""
        # A server that is out of memory refuses a script with `#!lua` before it runs, and this one only reads.
        source = self.call.script.plain if self._is_found else self._own_source
        # After NOSCRIPT, the text: one round trip, and the server keeps it.
        script = (self.slot, self.redirect, source.sha)
        text = self._text and script not in told
        if text:
            told.add(script)
        return self.call.command(source, self._attempt, self._refusal, text=text)

    def note(self, answer: Reply | Refusal | Lost, policy: Policy) -> bool:
        """Take in the answer to an attempt. Returns whether to send again at once."""
        if answer is _NOT_YET:
            return True
        if type(answer) is Refusal and answer.code in _OTHER_FORM:
            fact = answer.message.partition(" ")[2].encode()
            match answer.code:
                case "NOSCRIPT":
                    self._text = True
                case "FENCED":
                    self._know(fact)
                case "REFUSED":
                    self._refusal = fact
                case "UNSETTLED":
                    self._is_lost = True
            return True
        if isinstance(answer, Lost) and answer.sent and not self._is_found:  # that one changes nothing
            self._is_lost, self._carried = True, self._attempt
        return super().note(answer, policy)

    @property
    def _is_found(self) -> bool:
        return self._attempt.startswith(b"=")

    def _know(self, fence: bytes) -> None:
        self._attempt = fence
        self._fences.learn(self.call.flow_id, fence)

    def give_up(self, failure: Refusal | Lost) -> None:
        """Settle with an error: unknown, if an attempt may have run."""
        super().give_up(failure)
        error = self.outcome
        if self._is_lost or self._is_found:
            unknown = OutcomeUnknown(self.call.op_id, f"{self.subject}: no reply came, and then: {error}")
            unknown.__cause__ = error.__cause__ or error
            self.outcome = unknown


def _source_of(script: Script, policy: Policy) -> Source:
    return script.plain if policy.plain_scripts else script.source


def _error(subject: str, failure: Refusal | Lost) -> FlowError:
    """The error that a refusal or a loss is to the caller."""
    if isinstance(failure, Lost):
        message = f"{subject}: {failure}" if failure.sent else str(failure)
        error = StorageError(message, failure.code, lasting=failure.lasting)
        error.__cause__ = failure.__cause__
        return error
    if failure.code == "WRONGTYPE":
        return InvalidData(f"{subject}: a key of it holds the wrong kind of value; nothing was changed")
    meaning = _MEANINGS.get(failure.code, "the server refused")
    lasting = failure.code not in PASSING
    return StorageError(f"{subject}: {meaning}: {failure.message}", failure.code, lasting=lasting)


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


# Makes the step that sends what is pending, to be answered by a time, after what came before.
_NextStep = Callable[[Sequence[Any], float, Again], Step]


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
    silent: set[str] = set()
    hops = 0
    while True:
        silent |= {answer.server for answer in answers if isinstance(answer, Lost) and answer.server}
        notes = list(zip(pending, answers, strict=True))
        at_once = any([each.note(answer, policy) for each, answer in notes])  # noqa: C419 - notes them all
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
        until_s = max(backoff.until_s, policy.clock() + _LEAST_WAIT_S)
        failures = yield from _settle([each for each in pending if isinstance(each, _Called)], until_s, policy)
        ready = [each for each in pending if not each.settled and each not in failures]
        again = Again(silent, [each.redirect for each in ready])
        replies = iter((yield from _sent(next_step(ready, until_s, again))) if ready else ())
        pending = [each for each in pending if not each.settled]
        answers = [failures[each] if each in failures else next(replies) for each in pending]
        if not pending:
            return [each.outcome for each in attempts]


def _settle(attempts: Sequence[_Called], until_s: float, policy: Policy) -> Generator[Step, Any, dict[_Attempts, Lost]]:
    """Find out what became of those that are in doubt. Returns a failure for each where that cannot be known yet."""
    by_slot: dict[int | None, list[tuple[_Called, Doubt]]] = {}
    for each in attempts:
        if (doubt := each.doubt) is not None:
            by_slot.setdefault(each.slot, []).append((each, doubt))
    failures: dict[_Attempts, Lost] = {}
    for slot, some in by_slot.items():
        # Whatever is in doubt at the time, at the node of one slot, is settled by one search: a crowd of calls that
        # lost one connection must not have the server read the same trail for each of them.
        run = partial(_settling, until_s=until_s, policy=policy)
        try:
            verdicts: Verdicts = yield Together(("settle", slot), [doubt for _, doubt in some], run, until_s)
        except Lost as lost:
            failures |= {each: lost for each, _ in some}
            continue
        for each, doubt in some:
            verdict = verdicts[doubt]
            if isinstance(verdict, Verdict):
                each.judge(verdict)
            else:
                failures[each] = _failure(verdict)
    return failures


def _settling(doubts: Sequence[Doubt], *, until_s: float, policy: Policy) -> Generator[Step, Any, Verdicts]:
    left = attrs.evolve(policy, deadline_s=max(until_s - policy.clock(), _LEAST_WAIT_S))
    return settle(lambda commands: _deliver_read(Read(commands, tolerant=True), left), doubts)


def _failure(error: FlowError) -> Lost:
    """Return an error as the loss of a packet that was not sent for it."""
    lasting, code = (error.lasting, error.code) if isinstance(error, StorageError) else (True, "")
    lost = Lost(str(error), sent=False, lasting=lasting, code=code)
    lost.__cause__ = error.__cause__
    return lost


def _asking(pending: Sequence[_Asked], until_s: float, again: Again) -> Packet:
    return Packet([each.slot for each in pending], [each.args for each in pending], until_s, again)


def _calling(confirm: Confirm | None, pending: Sequence[_Called], until_s: float, again: Again) -> Packet:
    told: set[object] = set()
    commands = [each.command(told) for each in pending]
    slots = [each.slot for each in pending]
    return Packet(slots, commands, until_s, again, _confirm(confirm, [each.call for each in pending]))


def _confirm(confirm: Confirm | None, calls: Sequence[Call]) -> Confirm | None:
    return confirm and attrs.evolve(confirm, flow_keys=[call.keys[0] for call in calls])


# Refusals of an attempt that was not applied, and is sent again in another form.
_OTHER_FORM = frozenset({"NOSCRIPT", "FENCED", "REFUSED", "UNSETTLED"})
_NOT_YET = Lost("it was not sent", sent=False)  # in place of an answer to a first attempt
TROUBLES = (Refusal, Lost)  # what an answer is that is no reply


def _rescue(call: Call, trouble: Refusal | Lost, sent_s: float, policy: Policy) -> Generator[Step, Any, Reply]:
    """Carry out a call whose first attempt met with trouble."""
    next_step = partial(_calling, policy.confirm)
    (outcome,) = yield from _insist((_Called(call, policy),), (trouble,), sent_s, policy, next_step)
    if isinstance(outcome, FlowError):
        raise outcome from outcome.__cause__
    return outcome


def _rounds(calls: Sequence[Call]) -> Iterator[Sequence[int]]:
    """Part calls, by number, into those that may go together: no flow twice.

    Of the calls in one packet some may be refused and sent again: by a server that restarts, is busy, has forgotten a
    script, or has given the slot away. They would run after calls of the same flow that were queued after them.
    """
    rounds: list[list[int]] = [[]]
    calls_of: Counter[UUID] = Counter()
    for number, call in enumerate(calls):
        nth = calls_of[call.flow_id]
        calls_of[call.flow_id] += 1
        if nth == len(rounds):
            rounds.append([])
        rounds[nth].append(number)
    for numbers in rounds:
        for start in range(0, len(numbers), _BATCH_LIMIT):
            yield numbers[start : start + _BATCH_LIMIT]


def _first_attempts(
    calls: Sequence[Call], sent_s: float, confirm: Confirm | None, policy: Policy
) -> Generator[Step, Any, Sequence[Reply | Refusal | Lost]]:
    """Send calls for the first time, but for those that must be settled before. Returns an answer each."""
    ready = [call for call in calls if not call.doubtful]
    answers: Iterator[Any] = iter(())
    if ready:
        commands = [_first_command(call, policy) for call in ready]
        slots = [call.slot for call in ready]
        packet = Packet(slots, commands, sent_s + policy.deadline_s, confirm=_confirm(confirm, ready))
        answers = iter((yield from _sent(packet)))
    return [_NOT_YET if call.doubtful else next(answers) for call in calls]


def _deliver_batch(batch: Batch, policy: Policy) -> Generator[Step, Any, list[Reply | FlowError]]:
    outcomes: list[Reply | FlowError] = [None] * len(batch.calls)
    confirm = policy.confirm if batch.confirm else None
    for numbers in _rounds(batch.calls):
        calls = [batch.calls[number] for number in numbers]
        sent_s = policy.clock()
        answers = yield from _first_attempts(calls, sent_s, confirm, policy)
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
        lambda _pending, _until, again: attrs.evolve(step, again=again),
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


def _first_command(call: Call, policy: Policy) -> tuple[bytes, ...]:
    """Build the command of a call that is sent for the first time, and note the fence that it knows."""
    call.fence = policy.fences.of(call) if policy.fences else fence_of(call.copy)
    return call.command(_source_of(call.script, policy), call.fence)


def first_attempt(call: Call, sent_s: float, policy: Policy) -> Packet:
    """Build the packet of a call that is sent for the first time."""
    command, until_s = _first_command(call, policy), sent_s + policy.deadline_s
    if policy.confirm is None:
        return Packet((call.slot,), (command,), until_s)
    return Packet((call.slot,), (command,), until_s, confirm=_confirm(policy.confirm, [call]))


def _result(stop: StopIteration, short: Unconfirmed | None, op_id: str) -> Any:
    """Return what the operation came to, unless fewer replicas have it than should."""
    if short is not None:
        raise short.error(stop.value, op_id) from None
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
    op_id = ""
    try:
        while True:
            try:
                if trouble is not None:
                    met, trouble = trouble, None
                    reply = yield from _rescue(wanted, met, sent_s, policy)
                elif type(wanted) is Call:  # by far the most: the first attempt has no generator of its own
                    sent_s = policy.clock()
                    try:
                        (reply,) = (_NOT_YET,) if wanted.doubtful else (yield first_attempt(wanted, sent_s, policy))
                    except Lost as lost:
                        reply = lost
                    if type(reply) in TROUBLES:
                        trouble = reply
                        continue
                else:
                    reply = yield from _DELIVER[type(wanted)](wanted, policy)
                if type(reply) is Unconfirmed:
                    short, reply, op_id = reply, reply.reply, wanted.op_id
            except FlowError as error:
                wanted = op.throw(error)
            else:
                wanted = op.send(reply)
    except StopIteration as stop:
        outcome: T = _result(stop, short, op_id)
        return outcome
