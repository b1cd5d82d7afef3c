"""The rules of resending, driven by hand: no server, no socket, no time but the test's own."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import chain, pairwise, repeat
from typing import Any
from uuid import UUID

import attrs
import pytest

from redisflow import InvalidData, NotDurable, OutcomeUnknown, StorageError, scripts
from redisflow.calls import (
    Batch,
    Block,
    Call,
    Command,
    Confirm,
    Lost,
    Packet,
    Pause,
    Read,
    Refusal,
    Together,
    Unconfirmed,
)
from redisflow.delivery import Fences, Policy, deliver
from redisflow.scripts import SETTLE
from redisflow.settling import FIRST_PAGE, PAGE

OP = "ab" * 16
PASSING = [
    "TRYAGAIN",
    "CLUSTERDOWN",
    "LOADING",
    "READONLY",
    "MASTERDOWN",
    "BUSY",
    "MISCONF",
    "NOREPLICAS",
    "MAXCLIENTS",
]
LASTING = ["OOM", "NOPERM", "NOAUTH", "ERR", "EXECABORT"]
SENT = Lost("no reply", sent=True)
NOT_SENT = Lost("cannot connect", sent=False)
Answer = Any  # what a packet gets: replies, a Lost, or a function of the packet


FIRST, SECOND, THIRD = b"1-0-0", b"2-0-0", b"3-0-0"  # the fences that a world gives a flow, one after the other
NOT_FOUND = (0, 0, b"whole", b"")  # the end of a settlement's reply


def call(n: int = 0, **options: Any) -> Call:
    """The n-th call of a test."""
    op = f"{n:032x}" if n else OP
    return Call(
        scripts.UNTRIMMED.append_event, 7, (b"{t}:k%d" % n, b"{t}:e%d" % n), (b"rest",), UUID(int=n), op, **options
    )


def one(wanted: Any) -> Generator[Any, Any, Any]:
    """An operation of one yield."""
    return (yield wanted)


class World:
    """Answers packets from a list; its clock moves with pauses, and by `takes_s` for each packet.

    It settles flows by itself: each has a fence, and the attempts in doubt have not been applied.

    Attributes:
        packets: those that were answered from the list, and `sent_at` when they were sent.
        settlements: the packets that settled flows.
        verdicts: what comes behind the fence in the replies to the next settlements, or an answer in place of such a
            packet: a `Lost`, or refusals.
    """

    def __init__(self, *answers: Answer, takes_s: float = 0.0, verdicts: Iterable[Any] = ()) -> None:
        self.answers: Iterator[Answer] = iter(answers)
        self.takes_s = takes_s
        self.verdicts: Iterator[Any] = iter(verdicts)
        self.now_s = 1000.0
        self.packets: list[Any] = []
        self.settlements: list[Packet] = []
        self.together: list[Together] = []
        self.sent_at: list[float] = []
        self.pauses: list[float] = []
        self.fences: dict[bytes, bytes] = {}

    def then_for_ever(self, answer: Answer) -> World:
        """Give that answer to whatever comes after the listed ones."""
        self.answers = chain(self.answers, repeat(answer))
        return self

    def run(self, op: Generator[Any, Any, Any], *, deadline_s: float = 15.0, **options: Any) -> Any:
        """Carry an operation out."""
        return self._drive(deliver(op, Policy(deadline_s, clock=lambda: self.now_s, **options)))

    def _drive(self, steps: Generator[Any, Any, Any]) -> Any:
        try:
            step = next(steps)
            while True:
                answer = self._answer(step)
                step = steps.throw(answer) if isinstance(answer, Lost) else steps.send(answer)
        except StopIteration as stop:
            return stop.value

    def _answer(self, step: Any) -> Any:
        if isinstance(step, Pause):
            self.pauses.append(step.seconds)
            self.now_s += step.seconds
            return None
        if isinstance(step, Together):
            self.together.append(step)
            return self._drive(step.run(step.items))
        sent_at, self.now_s = self.now_s, self.now_s + self.takes_s
        if isinstance(step, Packet) and all(map(is_settlement, step.commands)):
            self.settlements.append(step)
            return self._settled(step)
        self.packets.append(step)
        self.sent_at.append(sent_at)
        answer = next(self.answers)
        return answer(step) if callable(answer) else answer

    def _settled(self, packet: Packet) -> Any:
        replies = []
        for command in packet.commands:
            verdict = next(self.verdicts, NOT_FOUND)
            if not isinstance(verdict, tuple):
                return verdict
            key, carried = command[3], argv(command)[1]
            fence = self.fences.get(key, b"")
            if carried == b"*" or b"|%b|" % fence in carried:
                fence = self.fences[key] = b"%d-0-0" % (int(fence.partition(b"-")[0] or b"0") + 1)
            replies.append([fence, *verdict])
        return replies

    def commands(self, n: int) -> list[Any]:
        """The commands of the n-th packet."""
        packet = self.packets[n]
        assert isinstance(packet, Packet)
        return [list(command) for command in packet.commands]


def argv(command: Sequence[bytes]) -> Sequence[bytes]:
    """Return the arguments of a script behind its keys."""
    return command[3 + int(command[2]) :]


def is_settlement(command: Sequence[bytes]) -> bool:
    """Tell whether a command settles a flow."""
    return command[1] in {SETTLE.source.sha, SETTLE.source.text, SETTLE.plain.text}


def refuse(code: str) -> list[Refusal]:
    """A packet of one command, refused."""
    return [Refusal(code, f"{code} because")]


def attempts(world: World) -> list[bytes]:
    """Return the fence that each packet's first command knew."""
    return [attempt_of(world.commands(n)[0]) for n in range(len(world.packets))]


def attempt_of(command: Sequence[bytes]) -> bytes:
    """Return the fence that an attempt knew."""
    return argv(command)[1].partition(b"|")[0]


def carried(world: World) -> list[bytes]:
    """Return the fences that each settlement was to end, for its packet's first flow."""
    return [argv(settlement.commands[0])[1] for settlement in world.settlements]


def looked_for(world: World) -> list[tuple[Any, ...]]:
    """Return what each settlement looked for: how many ids not in the trail, and all ids."""
    return [tuple(argv(settlement.commands[0])[4:]) for settlement in world.settlements]


# --- single calls


def test_a_call_that_is_answered_is_sent_once_and_knows_no_fence() -> None:
    """The ordinary path: the script's SHA, its keys, its arguments as they are."""
    world = World([b"reply"])
    assert world.run(one(call())) == b"reply"
    sha = scripts.UNTRIMMED.append_event.source.sha
    command = (b"EVALSHA", sha, b"2", b"{t}:k0", b"{t}:e0", OP.encode(), b"", b"rest")
    assert world.packets == [Packet((7,), (command,), until_s=world.sent_at[0] + 15.0)]
    assert world.pauses == []
    assert world.settlements == []


def test_an_attempt_that_was_lost_is_settled_before_the_next() -> None:
    """Each of them: it is sent again with the fence that it was settled with. The op stays the same."""
    world = World(SENT, SENT, SENT, [b"reply"], takes_s=0.25)
    assert world.run(one(call())) == b"reply"
    assert attempts(world) == [b"", FIRST, SECOND, THIRD]
    assert carried(world) == [b"||", b"|1-0-0|", b"|2-0-0|"]
    assert {command[5] for n in range(4) for command in world.commands(n)} == {OP.encode()}
    page = (b"+", b"%d" % FIRST_PAGE)
    for settlement in world.settlements:
        (command,) = settlement.commands
        assert command[:6] == (b"EVALSHA", SETTLE.source.sha, b"2", b"{t}:k0", b"{t}:e0", b"")
        assert command[7:] == (*page, b"0", OP.encode())
        assert settlement.slots == [7]


def test_a_call_that_was_surely_not_sent_is_not_settled() -> None:
    """What never left cannot have run: the next attempt is a first one."""
    world = World(NOT_SENT, NOT_SENT, [b"reply"])
    assert world.run(one(call())) == b"reply"
    assert attempts(world) == [b"", b"", b""]
    assert world.settlements == []


def test_only_attempts_that_were_sent_are_settled() -> None:
    """Those that never left, and those that were refused, leave nothing in doubt."""
    world = World(NOT_SENT, SENT, NOT_SENT, refuse("BUSY"), [b"reply"], takes_s=1.0)
    world.run(one(call()))
    assert attempts(world) == [b"", b"", FIRST, FIRST, FIRST]
    assert carried(world) == [b"||"]


@pytest.mark.parametrize("code", PASSING)
def test_a_passing_refusal_is_tried_again_as_a_first_attempt(code: str) -> None:
    """The server answered and did not execute."""
    world = World(refuse(code), refuse(code), [b"reply"])
    assert world.run(one(call())) == b"reply"
    assert attempts(world) == [b"", b"", b""]
    assert world.settlements == []
    assert len(world.pauses) == 2


@pytest.mark.parametrize("code", LASTING)
def test_a_lasting_refusal_ends_it_at_once(code: str) -> None:
    """One packet, no pause, and a `StorageError` that says what the server said."""
    world = World(refuse(code))
    with pytest.raises(StorageError, match="because") as refused:
        world.run(one(call()))
    assert not isinstance(refused.value, OutcomeUnknown)
    assert (len(world.packets), world.pauses) == (1, [])


def test_a_key_of_the_wrong_type_is_invalid_data() -> None:
    """The store is damaged, not unreachable."""
    with pytest.raises(InvalidData, match=str(UUID(int=0))):
        World(refuse("WRONGTYPE")).run(one(call()))


@pytest.mark.parametrize("code", LASTING)
def test_a_lasting_refusal_after_a_settled_loss_ends_it_at_once(code: str) -> None:
    """The first attempt was not applied, and no longer can be: a plain `StorageError`."""
    world = World(SENT, refuse(code))
    with pytest.raises(StorageError, match="because") as refused:
        world.run(one(call()))
    assert not isinstance(refused.value, OutcomeUnknown)
    assert len(world.packets) == 2


@pytest.mark.parametrize("code", LASTING)
def test_a_lasting_refusal_of_what_was_applied_leaves_the_outcome_unknown(code: str) -> None:
    """The first attempt was found, and what it came to is not known; nothing is sent after the refusal."""
    world = World(SENT, refuse(code), verdicts=[found(b"12-3")])
    with pytest.raises(OutcomeUnknown) as unknown:
        world.run(one(call()))
    assert unknown.value.op_id == OP
    assert len(world.packets) == 2


@pytest.mark.parametrize("code", LASTING)
def test_a_lasting_refusal_of_the_settlement_leaves_the_outcome_unknown(code: str) -> None:
    """The first attempt may have run; nothing is sent after the refusal."""
    world = World(SENT, verdicts=[refuse(code)])
    with pytest.raises(OutcomeUnknown, match="because") as unknown:
        world.run(one(call()))
    assert unknown.value.op_id == OP
    assert (len(world.packets), len(world.settlements)) == (1, 1)


@pytest.mark.parametrize("trouble", [*map(refuse, PASSING), SENT, NOT_SENT], ids=str)
def test_a_settlement_is_tried_again(trouble: Any) -> None:
    """It may be asked any number of times; the call is not sent until it is answered."""
    world = World(SENT, [b"reply"], verdicts=[trouble] * 5)
    assert world.run(one(call())) == b"reply"
    assert attempts(world) == [b"", FIRST]
    assert carried(world) == [b"||"] * 6
    assert len(world.pauses) >= 6


def test_a_settlement_that_is_never_answered_leaves_the_outcome_unknown() -> None:
    """At the deadline; the call is not sent again."""
    world = World(SENT, verdicts=repeat(SENT))
    with pytest.raises(OutcomeUnknown) as unknown:
        world.run(one(call()))
    assert unknown.value.op_id == OP
    assert len(world.packets) == 1
    assert 14 <= world.now_s - 1000 <= 17


def test_a_settling_script_that_is_unknown_is_sent_as_text_at_once() -> None:
    """As any other; to fakeredis without a shebang."""
    for plain in (False, True):
        world = World(SENT, [b"reply"], verdicts=[refuse("NOSCRIPT")])
        assert world.run(one(call()), plain_scripts=plain) == b"reply"
        assert len(world.pauses) == 1
        _, second = (settlement.commands[0] for settlement in world.settlements)
        assert second[:2] == (b"EVAL", (SETTLE.plain if plain else SETTLE.source).text)


@pytest.mark.parametrize("sent", [True, False])
def test_a_lasting_loss_ends_it_at_once(sent: bool) -> None:
    """A wrong password stays wrong."""
    world = World(Lost("wrong password", sent=sent, lasting=True))
    with pytest.raises(StorageError) as refused:
        world.run(one(call()))
    assert isinstance(refused.value, OutcomeUnknown) == sent
    assert len(world.packets) == 1


def test_a_loss_to_the_end_leaves_the_outcome_unknown() -> None:
    """`OutcomeUnknown` carries the op id, and the client's own error as its cause."""
    lost = Lost("no reply", sent=True)
    lost.__cause__ = ConnectionResetError("reset")
    with pytest.raises(OutcomeUnknown) as unknown:
        World().then_for_ever(lost).run(one(call()))
    assert unknown.value.op_id == OP
    assert unknown.value.__cause__ is lost.__cause__


@pytest.mark.parametrize(
    "answers", [[NOT_SENT], [NOT_SENT, refuse("LOADING")], [refuse("BUSY")], [refuse("NOSCRIPT"), NOT_SENT]]
)
def test_what_was_never_executed_is_never_unknown(answers: list[Any]) -> None:
    """Refused or not sent to the end: a plain `StorageError`."""
    world = World(*answers).then_for_ever(answers[-1])
    with pytest.raises(StorageError) as failed:
        world.run(one(call()))
    assert not isinstance(failed.value, OutcomeUnknown)
    assert len(world.packets) > 2


@pytest.mark.parametrize("last", [NOT_SENT, refuse("LOADING"), refuse("READONLY")], ids=str)
@pytest.mark.parametrize("settled", [True, False])
def test_one_sent_attempt_among_unsent_ones_makes_it_unknown(last: Any, *, settled: bool) -> None:
    """However the last one failed; but not once it was settled."""
    world = World(NOT_SENT, SENT, verdicts=[] if settled else repeat(last)).then_for_ever(last)
    with pytest.raises(StorageError) as failed:
        world.run(one(call()))
    assert isinstance(failed.value, OutcomeUnknown) is not settled
    assert len(world.settlements) >= 1


# --- fences


def fenced(fence: bytes) -> list[Refusal]:
    """The refusal of an attempt that did not know the flow's fence."""
    return [Refusal("FENCED", f"FENCED {fence.decode()}".rstrip())]


def copied(fence: bytes) -> dict[bytes, bytes]:
    """A copy of the flow with that fence."""
    return {b"etag": b"e" * 32 + b" " * bool(fence) + fence, b"updated_at": b"1700000000000000"}


def test_an_attempt_that_does_not_know_the_fence_is_sent_again_with_it_at_once() -> None:
    """It was not applied: no pause, nothing to settle."""
    world = World(fenced(b"7-5-5"), [b"reply"])
    assert world.run(one(call())) == b"reply"
    assert attempts(world) == [b"", b"7-5-5"]
    assert (world.pauses, world.settlements) == ([], [])


def test_a_fence_may_be_taken_back() -> None:
    """A failover has lost it: the attempt knows one that the flow has no more."""
    world = World(fenced(b""), [b"reply"])
    assert world.run(one(call(copy=copied(b"7-5-5")))) == b"reply"
    assert attempts(world) == [b"7-5-5", b""]


def test_a_fence_that_was_told_is_known_from_then_on() -> None:
    """By every first attempt on that flow, and no other; of it and the copy's, the later one is taken."""
    fences = Fences()
    World(fenced(b"7-5-5"), [b"reply"]).run(one(call()), fences=fences)
    World(SENT, [b"reply"]).run(one(call(3)), fences=fences)
    world = World().then_for_ever([b"reply"])
    for wanted in (
        call(),
        call(copy=copied(b"")),
        call(copy=copied(b"6-9-9")),
        call(copy=copied(b"10-4-4")),
        call(2),
        call(2, copy=copied(b"10-4-4")),
        call(3),
    ):
        world.run(one(wanted), fences=fences)
    assert attempts(world) == [b"7-5-5", b"7-5-5", b"7-5-5", b"10-4-4", b"", b"10-4-4", FIRST]


def test_fences_are_forgotten_past_ten_thousand_flows() -> None:
    """Each then costs a round trip; the memory is bounded."""
    fences = Fences()
    for n in range(1, 10_002):
        fences.learn(UUID(int=n), FIRST)
    assert (fences.of(call(1)), fences.of(call(10_001))) == (b"", FIRST)


def test_a_lost_attempt_is_settled_by_the_fence_that_it_knew() -> None:
    """The copy's, or that which a refusal told."""
    for copy, answers in ((copied(b"7-5-5"), []), ({}, [fenced(b"7-5-5")])):
        world = World(*answers, SENT, [b"reply"])
        world.fences[b"{t}:k0"] = b"7-5-5"
        assert world.run(one(call(copy=copy))) == b"reply"
        assert carried(world) == [b"|7-5-5|"]
        assert attempts(world)[-2:] == [b"7-5-5", b"8-0-0"]


def test_an_endless_quarrel_about_the_fence_pauses() -> None:
    """Somebody settles the flow again and again."""
    world = World(*[fenced(b"%d-0-0" % n) for n in range(1, 30)], [b"reply"])
    assert world.run(one(call())) == b"reply"
    assert attempts(world) == [b"", *[b"%d-0-0" % n for n in range(1, 30)]]
    assert 0 < len(world.pauses) < 30


# --- what a settlement finds


def found(event_id: bytes, op: str = OP) -> tuple[Any, ...]:
    """A settlement that finds what the operation left."""
    return (0, 0, b"more", event_id, op.encode(), event_id)


def test_an_operation_that_was_applied_is_asked_for_what_it_did() -> None:
    """By the event it left: the answer is that of the first attempt."""
    world = World(SENT, [b"reply"], verdicts=[found(b"12-3")])
    assert world.run(one(call())) == b"reply"
    assert attempts(world) == [b"", b"=12-3"]


def test_a_lost_question_for_what_was_done_is_asked_again() -> None:
    """It changes nothing, so there is nothing to settle; lost to the end, the outcome is unknown all the same."""
    world = World(SENT, SENT, SENT, [b"reply"], verdicts=[found(b"12-3")])
    assert world.run(one(call())) == b"reply"
    assert attempts(world) == [b"", b"=12-3", b"=12-3", b"=12-3"]
    assert len(world.settlements) == 1
    for last in (SENT, NOT_SENT, refuse("LOADING")):
        with pytest.raises(OutcomeUnknown):
            World(SENT, verdicts=[found(b"12-3")]).then_for_ever(last).run(one(call()))


def test_an_event_that_is_gone_is_settled_again() -> None:
    """A failover has lost what was found: the flow is settled anew, and the call sent."""
    world = World(SENT, refuse("UNSETTLED"), [b"reply"], verdicts=[found(b"12-3")])
    assert world.run(one(call())) == b"reply"
    assert attempts(world) == [b"", b"=12-3", FIRST]
    assert len(world.settlements) == 2
    assert len(world.pauses) == 1


def test_a_trimmed_trail_leaves_the_outcome_unknown() -> None:
    """It does not reach back to the first attempt: nothing is sent."""
    world = World(SENT, verdicts=[(0, 0, b"trimmed", b"12-3")])
    with pytest.raises(OutcomeUnknown, match="trail") as unknown:
        world.run(one(call()))
    assert unknown.value.op_id == OP
    assert len(world.packets) == 1


def test_a_long_trail_is_searched_page_by_page() -> None:
    """100 entries, then 1,000 at a time, each page behind the last; the flow is fenced by the first."""
    pages = [(0, 0, b"more", b"9-0"), (0, 0, b"more", b"8-0"), (0, 0, b"more", b"7-0", OP.encode(), b"7-5")]
    world = World(SENT, [b"reply"], verdicts=pages)
    assert world.run(one(call())) == b"reply"
    looked = [tuple(argv(settlement.commands[0])[2:4]) for settlement in world.settlements]
    assert looked == [(b"+", b"%d" % FIRST_PAGE), (b"(9-0", b"%d" % PAGE), (b"(8-0", b"%d" % PAGE)]
    assert attempts(world)[1:] == [b"=7-5"]
    assert len(world.pauses) == 1


def test_a_flow_that_was_deleted_is_not_brought_back() -> None:
    """Whether there is another by now: the lost attempt was meant for the one that was deleted."""
    world = World(SENT, verdicts=[(1, 0, b"whole", b"")])
    assert world.run(one(call())) == [b"ABSENT"]
    assert len(world.packets) == 1
    world = World(SENT, verdicts=[(1, 0, b"whole", b"")])
    assert world.run(one(call(if_deleted=[b"OK"]))) == [b"OK"]
    world = World(SENT, [b"reply"], verdicts=[(1, 0, b"whole", b"")])
    assert world.run(one(call(if_deleted=None))) == b"reply"
    assert attempts(world) == [b"", FIRST]


def test_an_attempt_that_knew_the_new_flows_fence_was_meant_for_it() -> None:
    """And may be sent again."""
    world = World(SENT, [b"reply"], verdicts=[(7, 0, b"whole", b"")])
    world.fences[b"{t}:k0"] = b"7-5-5"
    assert world.run(one(call(copy=copied(b"7-5-5")))) == b"reply"
    assert attempts(world) == [b"7-5-5", b"8-0-0"]


# --- ids that callers bring


def brought(n: int = 0, **options: Any) -> Call:
    """The n-th call of a test, under an id that the caller brought: the last key is the index of those."""
    seen = b"{t}:s%d" % n
    wanted = call(n, brought=True, seen=seen, **options)
    return attrs.evolve(wanted, keys=(*wanted.keys, seen))


def test_a_brought_id_is_sent_as_any_other_and_looked_up_in_the_index() -> None:
    """Not in the trail."""
    world = World(SENT, [b"reply"])
    assert world.run(one(brought())) == b"reply"
    assert attempts(world) == [b"", FIRST]
    assert world.settlements[0].commands[0][2:6] == (b"3", b"{t}:k0", b"{t}:e0", b"{t}:s0")
    assert looked_for(world) == [(b"1", OP.encode())]
    world = World(SENT, [b"reply"], verdicts=[(0, 0, b"whole", b"", OP.encode(), b"12")])
    assert world.run(one(brought())) == b"reply"
    assert attempts(world) == [b"", b"=12"]


def test_a_drawn_id_that_is_brought_back_is_settled_before_it_is_sent() -> None:
    """Whatever fence somebody else's attempt knew; the trail is searched for it, and fenced once."""
    world = World([b"reply"])
    assert world.run(one(brought(doubtful=True))) == b"reply"
    assert attempts(world) == [FIRST]
    assert carried(world) == [b"*"]
    assert looked_for(world) == [(b"0", OP.encode())]
    world = World([b"reply"], verdicts=[(0, 0, b"more", b"13-0"), found(b"12-3")])
    assert world.run(one(brought(doubtful=True))) == b"reply"
    assert attempts(world) == [b"=12-3"]
    assert carried(world)[0] == b"*"
    assert carried(world)[1] != b"*"


def test_the_copy_of_who_brings_an_id_back_ends_no_search() -> None:
    """It may be newer than what the operation did."""
    known = (0, 0, b"more", b"9-0", b"e" * 32, b"1700000000000-5")
    world = World([b"reply"], verdicts=[known, found(b"8-3")])
    assert world.run(one(brought(doubtful=True, copy=copied(b"")))) == b"reply"
    assert attempts(world) == [b"=8-3"]
    world = World(SENT, [b"reply"], verdicts=[known])
    assert world.run(one(call(copy=copied(b"")))) == b"reply"
    assert attempts(world) == [b"", FIRST]


def test_a_drawn_id_whose_flow_was_deleted_stays_unknown() -> None:
    """Nobody knows which of the two flows the attempt was meant for."""
    world = World(verdicts=[(1, 0, b"whole", b"")])
    with pytest.raises(OutcomeUnknown, match="deleted"):
        world.run(one(brought(doubtful=True)))
    assert world.packets == []


def test_an_operation_that_was_refused_in_the_meantime_is_sent_again_with_the_note() -> None:
    """It was not applied, and the caller asks anew: at once, on this attempt and the following ones."""
    world = World([Refusal("REFUSED", "REFUSED -123")], refuse("BUSY"), SENT, [b"reply"])
    assert world.run(one(brought())) == b"reply"
    assert [argv(world.commands(n)[0])[1] for n in range(4)] == [b"", b"|-123||", b"|-123||", FIRST + b"|-123||"]


# --- time


@pytest.mark.parametrize("deadline_s", [0.001, 0.05, 1.0, 15.0])
@pytest.mark.parametrize("takes_s", [0.0, 0.3])
def test_the_deadline_counts_from_the_first_attempt(deadline_s: float, takes_s: float) -> None:
    """No attempt begins after it, and there is one close to it."""
    world = World(takes_s=takes_s).then_for_ever(NOT_SENT)
    with pytest.raises(StorageError):
        world.run(one(call()), deadline_s=deadline_s)
    elapsed_s = [at - world.sent_at[0] for at in world.sent_at]
    assert elapsed_s[-1] <= deadline_s + 1e-6
    assert elapsed_s[-1] >= deadline_s - 1.0 - takes_s


def test_pauses_grow_are_bounded_and_differ() -> None:
    """From some 10 ms to a second, with jitter, so that a thousand clients do not come back as one."""
    runs = []
    for _ in range(20):
        world = World().then_for_ever(NOT_SENT)
        with pytest.raises(StorageError):
            world.run(one(call()), deadline_s=30)
        runs.append(world.pauses)
    for pauses in runs:
        assert 0 < pauses[0] <= 0.02
        assert all(0 < pause <= 1.0 for pause in pauses)
        assert all(later <= 4 * earlier for earlier, later in pairwise(pauses))
        assert sum(pauses) == pytest.approx(30, abs=0.01)
        assert len(pauses) < 120
    assert len({tuple(pauses) for pauses in runs}) == len(runs)


# --- scripts


def test_an_unknown_script_is_sent_as_text_at_once() -> None:
    """NOSCRIPT costs one round trip, no pause; the arguments are those of a first attempt."""
    world = World(refuse("NOSCRIPT"), [b"reply"])
    assert world.run(one(call())) == b"reply"
    assert world.pauses == []
    text = scripts.UNTRIMMED.append_event.source.text
    assert world.commands(1) == [[b"EVAL", text, b"2", b"{t}:k0", b"{t}:e0", OP.encode(), b"", b"rest"]]


def test_an_unknown_script_on_a_resend_keeps_the_fence() -> None:
    """A promoted replica has the data and not the script."""
    for verdicts, attempt in (([], FIRST), ([found(b"12-3")], b"=12-3")):
        world = World(SENT, refuse("NOSCRIPT"), [b"reply"], verdicts=verdicts)
        world.run(one(call()))
        assert attempts(world) == [b"", attempt, attempt]
        assert world.commands(2)[0][0] == b"EVAL"
        assert len(world.settlements) == 1


def test_a_server_that_never_learns_a_script_ends_it() -> None:
    """NOSCRIPT to the text itself is no reason to go on for ever."""
    with pytest.raises(StorageError):
        World().then_for_ever(refuse("NOSCRIPT")).run(one(call()))


def test_fakeredis_gets_scripts_without_a_shebang() -> None:
    """By SHA and as text."""
    world = World(refuse("NOSCRIPT"), [b"reply"])
    world.run(one(call()), plain_scripts=True)
    assert world.commands(0)[0][1] == scripts.UNTRIMMED.append_event.plain.sha
    assert world.commands(1)[0][1] == scripts.UNTRIMMED.append_event.plain.text
    assert not scripts.UNTRIMMED.append_event.plain.text.startswith(b"#!")
    assert scripts.UNTRIMMED.append_event.source.text.startswith(b"#!lua")


# --- batches


def keys_of(world: World, n: int) -> list[bytes]:
    """The first key of each command of the n-th packet."""
    return [command[3] for command in world.commands(n)]


def test_a_batch_settles_each_call_by_itself() -> None:
    """Answered, refused for good, refused for now, unknown script: only what is open is sent again."""
    world = World(
        [b"a", Refusal("OOM", "OOM because"), Refusal("BUSY", "BUSY"), Refusal("NOSCRIPT", "NOSCRIPT"), b"e"],
        [b"c", b"d"],
    )
    a, b, c, d, e = world.run(one(Batch([call(n) for n in range(1, 6)])))
    assert (a, c, d, e) == (b"a", b"c", b"d", b"e")
    assert isinstance(b, StorageError)
    assert not isinstance(b, OutcomeUnknown)
    assert keys_of(world, 1) == [b"{t}:k3", b"{t}:k4"]
    assert [command[0] for command in world.commands(1)] == [b"EVALSHA", b"EVAL"]
    assert list(map(attempt_of, world.commands(1))) == [b"", b""]
    assert world.settlements == []


def test_a_lost_batch_is_settled_and_resent_whole() -> None:
    """No telling which of it ran: each flow is settled, in one packet, and each call has its own reply."""
    world = World(SENT, [b"a", Refusal("BUSY", "BUSY"), Refusal("ERR", "ERR x")], [b"b"])
    a, b, c = world.run(one(Batch([call(n) for n in (1, 2, 3)])))
    assert (a, b) == (b"a", b"b")
    assert isinstance(c, StorageError)
    assert not isinstance(c, OutcomeUnknown)  # it was settled, and then refused
    assert {attempt_of(command) for n in (1, 2) for command in world.commands(n)} == {FIRST}
    (settlement,) = world.settlements
    assert [command[3] for command in settlement.commands] == [b"{t}:k1", b"{t}:k2", b"{t}:k3"]
    assert [step.key for step in world.together] == [("settle", 7)]


def test_a_batch_of_which_some_was_applied_asks_for_that() -> None:
    """Each by its own event; what is unknown is not sent."""
    verdicts = [found(b"12-3", call(1).op_id), NOT_FOUND, (0, 0, b"trimmed", b"12-3")]
    world = World(SENT, [b"a", b"b"], verdicts=verdicts)
    a, b, c = world.run(one(Batch([call(n) for n in (1, 2, 3)])))
    assert (a, b) == (b"a", b"b")
    assert isinstance(c, OutcomeUnknown)
    assert c.op_id == call(3).op_id
    assert list(map(attempt_of, world.commands(1))) == [b"=12-3", FIRST]


def test_what_is_in_doubt_at_several_nodes_is_settled_at_each() -> None:
    """A flow whose settlement is refused holds up only its own call."""
    calls = [attrs.evolve(call(n), slot=n) for n in (1, 2)]
    world = World(SENT, [b"b"], verdicts=[refuse("NOPERM"), NOT_FOUND])
    a, b = world.run(one(Batch(calls)), cluster=True)
    assert isinstance(a, OutcomeUnknown)
    assert b == b"b"
    assert [step.key for step in world.together] == [("settle", 1), ("settle", 2)]
    assert [step.slots for step in world.settlements] == [[1], [2]]


def test_calls_of_one_flow_are_settled_by_one_search() -> None:
    """However many callers wait: what is in doubt at the time is settled together, 500 operations a script."""
    world = World(SENT, [b"reply"])
    world.run(one(call()))
    (step,) = world.together
    (doubt,) = step.items
    items = [attrs.evolve(doubt, call=attrs.evolve(doubt.call, op_id=f"{n:032x}")) for n in range(600)]
    assert world._drive(step.run(items)).keys() == set(items)
    counts = [len(argv(command)[5:]) for command in world.settlements[-1].commands]
    assert counts == [500, 100]


@pytest.mark.parametrize("cluster", [False, True])
def test_a_flow_is_in_a_packet_once(*, cluster: bool) -> None:
    """Refused for now, or sent on to another node, a call could run behind those that were queued after it."""
    first, second, third, other = call(1), call(1), call(1), call(2)
    world = World().then_for_ever(lambda packet: [command[3] for command in packet.commands])
    outcomes = world.run(one(Batch([first, second, other, third])), cluster=cluster)
    assert outcomes == [b"{t}:k1", b"{t}:k1", b"{t}:k2", b"{t}:k1"]
    assert [keys_of(world, n) for n in range(3)] == [[b"{t}:k1", b"{t}:k2"], [b"{t}:k1"], [b"{t}:k1"]]


# --- redirects


MOVED, ASK = Refusal("MOVED", "MOVED 7 other:1"), Refusal("ASK", "ASK 7 other:1")


@pytest.mark.parametrize("redirect", [MOVED, ASK])
def test_a_redirect_is_followed_at_once(redirect: Refusal) -> None:
    """Nothing was executed: no pause, nothing to settle; the wire is told where to."""
    world = World([redirect], [b"reply"])
    assert world.run(one(call()), cluster=True) == b"reply"
    assert world.pauses == []
    assert attempts(world) == [b"", b""]
    assert world.settlements == []
    assert world.packets[1].again.redirects == [redirect]


def test_a_script_unknown_where_it_was_sent_on_to_is_told_there() -> None:
    """NOSCRIPT is answered by who was asked: the text goes the same way."""
    world = World([ASK], refuse("NOSCRIPT"), [b"reply"])
    assert world.run(one(call()), cluster=True) == b"reply"
    assert [packet.again.redirects for packet in world.packets[1:]] == [[ASK], [ASK]]
    assert world.commands(2)[0][0] == b"EVAL"


def test_who_is_sent_in_circles_pauses() -> None:
    """Nodes may disagree for a while."""
    world = World(*[[MOVED]] * 20, [b"reply"])
    assert world.run(one(call()), cluster=True) == b"reply"
    assert 0 < len(world.pauses) < 20


def test_a_redirect_of_a_loss_keeps_the_fence() -> None:
    """The first attempt was settled before the slot moved."""
    world = World(SENT, [MOVED], [b"reply"])
    world.run(one(call()), cluster=True)
    assert attempts(world) == [b"", FIRST, FIRST]
    assert len(world.settlements) == 1


def test_a_settlement_is_redirected_too() -> None:
    """To the node that the slot has moved to."""
    world = World(SENT, [b"reply"], verdicts=[[MOVED]])
    assert world.run(one(call()), cluster=True) == b"reply"
    assert [settlement.again and settlement.again.redirects for settlement in world.settlements] == [None, [MOVED]]


def test_a_lone_server_that_sends_elsewhere_is_a_node_of_a_cluster() -> None:
    """Which the error says."""
    with pytest.raises(StorageError, match=r"redis\+cluster://"):
        World([MOVED]).run(one(call()))


def test_reads_and_blocks_are_redirected_too() -> None:
    """Only those commands that were, each by its own refusal."""
    world = World([b"v", MOVED, ASK], [b"w", b"x"])
    assert world.run(one(read(b"a", b"b", b"c")), cluster=True) == [b"v", b"w", b"x"]
    assert world.packets[1].again.redirects == [MOVED, ASK]
    world = World([ASK], [None])
    assert world.run(one(Block(1, b"stream", b"5-0", 10.0)), cluster=True) is None
    assert world.packets[1].again.redirects == [ASK]


def test_the_loss_of_one_node_leaves_the_others_answers() -> None:
    """A packet to several nodes: what was lost is settled and sent again, and nothing else."""
    world = World([b"a", SENT, b"c"], [b"b"])
    assert world.run(one(Batch([call(n) for n in (1, 2, 3)])), cluster=True) == [b"a", b"b", b"c"]
    assert keys_of(world, 1) == [b"{t}:k2"]
    assert attempts(world)[1:] == [FIRST]
    assert [command[3] for command in world.settlements[0].commands] == [b"{t}:k2"]


def test_servers_that_did_not_answer_are_named_to_the_wire() -> None:
    """Those of a call, from the first resend on; what is silent later is added."""
    first = Lost("no reply", sent=True, server="a:1")
    second = Lost("no reply", sent=True, server="b:2")
    world = World(first, second, refuse("BUSY"), [b"reply"])
    world.run(one(call()))
    assert [set(packet.again.silent) for packet in world.packets[2:]] == [{"a:1", "b:2"}] * 2
    assert world.packets[0].again is None


# --- replicas

CONFIRM = Confirm(2, 1.0)


def test_a_change_names_what_it_waits_for() -> None:
    """On every attempt; reads wait for nothing."""
    world = World(SENT, [b"reply"])
    world.run(one(call()), confirm=CONFIRM)
    assert [packet.confirm for packet in world.packets] == [Confirm(2, 1.0, [b"{t}:k0"])] * 2
    assert [packet.confirm for packet in world.settlements] == [None]
    world = World([b"v"])
    world.run(one(read(b"k")), confirm=CONFIRM)
    assert world.packets[0].confirm is None


def test_a_shortfall_is_raised_when_the_operation_has_its_result() -> None:
    """Applied: the operation goes on as if nothing were; in the end NotDurable says how many."""
    with pytest.raises(NotDurable) as short:
        World([Unconfirmed(b"reply", 2, 1)]).run(one(call()), confirm=CONFIRM)
    assert (short.value.op_id, short.value.wanted, short.value.reached) == (OP, 2, 1)


def test_a_batch_has_its_shortfalls_as_outcomes() -> None:
    """One wait serves them all, so they share it; a refusal stays a refusal."""
    short = Unconfirmed(b"a", 2, 1)
    world = World([short, Refusal("OOM", "OOM"), Unconfirmed(b"c", 2, 1)])
    a, b, c = world.run(one(Batch([call(n) for n in (1, 2, 3)], confirm=True)), confirm=CONFIRM)
    assert (a, c) == (short, Unconfirmed(b"c", 2, 1))
    assert isinstance(b, StorageError)
    assert world.packets[0].confirm == Confirm(2, 1.0, [b"{t}:k1", b"{t}:k2", b"{t}:k3"])


def test_a_batch_of_upkeep_waits_for_nobody() -> None:
    """What it loses is done again by the next."""
    world = World([b"a"])
    world.run(one(Batch([call(1)])), confirm=CONFIRM)
    assert world.packets[0].confirm is None


# --- reads, blocks, pauses


def read(*names: bytes, tolerant: bool = False) -> Read:
    """A read of those keys."""
    return Read([Command(3, (b"GET", name)) for name in names], tolerant)


def test_a_read_is_asked_again_until_the_deadline() -> None:
    """It may be asked any number of times; in the end a `StorageError`, never unknown."""
    world = World(SENT, NOT_SENT, refuse("LOADING"), [b"v"])
    assert world.run(one(read(b"k"))) == [b"v"]
    assert [world.commands(n) for n in range(len(world.packets))] == [[[b"GET", b"k"]]] * 4
    with pytest.raises(StorageError) as failed:
        World().then_for_ever(SENT).run(one(read(b"k")))
    assert not isinstance(failed.value, OutcomeUnknown)


def test_a_refused_read_raises_unless_it_is_tolerant() -> None:
    """A tolerant one gets the error as a value."""
    with pytest.raises(StorageError, match="NOPERM"):
        World([b"v", Refusal("NOPERM", "NOPERM because")]).run(one(read(b"a", b"b")))
    refusal = Refusal("NOPERM", "NOPERM because")
    value, error = World([b"v", refusal]).run(one(read(b"a", b"b", tolerant=True)))
    assert value == b"v"
    assert isinstance(error, StorageError)


def test_a_block_is_asked_again_after_a_loss() -> None:
    """From the same id: nothing is skipped."""
    block = Block(1, b"stream", b"5-0", 10.0)
    world = World(SENT, [None])
    assert world.run(one(block)) is None
    assert [attrs.asdict(step) | {"again": None} for step in world.packets] == [attrs.asdict(block)] * 2


def test_a_pause_is_handed_on() -> None:
    """The wires know how to sleep."""
    world = World()
    world.run(one(Pause(2.5)))
    assert world.pauses == [2.5]


# --- the operation


def test_an_error_is_raised_inside_the_operation_which_may_go_on() -> None:
    """An operation can catch what its call came to, and yield another."""

    def operation() -> Generator[Any, Any, Any]:
        try:
            yield call(1)
        except StorageError:
            return (yield call(2))

    world = World(refuse("ERR"), [b"second"])
    assert world.run(operation()) == b"second"
    assert attempts(world) == [b"", b""]


def test_each_yield_has_a_deadline_of_its_own() -> None:
    """A long operation is not cut off because its parts add up."""

    def operation() -> Generator[Any, Any, None]:
        for n in range(1, 6):
            yield call(n)

    world = World(*[answer for n in range(5) for answer in (NOT_SENT, [b"ok"])], takes_s=0.8)
    world.run(operation(), deadline_s=1.0)
    assert len(world.packets) == 10
