"""The rules of resending, driven by hand: no server, no socket, no time but the test's own."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from itertools import chain, pairwise, repeat
from typing import Any
from uuid import UUID

import attrs
import pytest

from redisflow import InvalidData, NotDurable, OutcomeUnknown, StorageError, scripts
from redisflow.calls import Batch, Block, Call, Command, Confirm, Lost, Packet, Pause, Read, Refusal, Unconfirmed
from redisflow.delivery import Policy, deliver

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


def call(n: int = 0) -> Call:
    """The n-th call of a test."""
    op = f"{n:032x}" if n else OP
    return Call(scripts.UNTRIMMED.append_event, 7, (b"{t}:k%d" % n,), (b"rest",), UUID(int=n), op)


def one(wanted: Any) -> Generator[Any, Any, Any]:
    """An operation of one yield."""
    return (yield wanted)


class World:
    """Answers packets from a list; its clock moves with pauses, and by `takes_s` for each packet."""

    def __init__(self, *answers: Answer, takes_s: float = 0.0) -> None:
        self.answers: Iterator[Answer] = iter(answers)
        self.takes_s = takes_s
        self.now_s = 1000.0
        self.packets: list[Any] = []
        self.sent_at: list[float] = []
        self.pauses: list[float] = []

    def then_for_ever(self, answer: Answer) -> World:
        """Give that answer to whatever comes after the listed ones."""
        self.answers = chain(self.answers, repeat(answer))
        return self

    def run(self, op: Generator[Any, Any, Any], *, deadline_s: float = 15.0, **options: Any) -> Any:
        """Carry an operation out."""
        steps = deliver(op, Policy(deadline_s, clock=lambda: self.now_s, **options))
        try:
            step = next(steps)
            while True:
                if isinstance(step, Pause):
                    self.pauses.append(step.seconds)
                    self.now_s += step.seconds
                    step = steps.send(None)
                    continue
                self.packets.append(step)
                self.sent_at.append(self.now_s)
                self.now_s += self.takes_s
                answer = next(self.answers)
                answer = answer(step) if callable(answer) else answer
                step = steps.throw(answer) if isinstance(answer, Lost) else steps.send(answer)
        except StopIteration as stop:
            return stop.value

    def commands(self, n: int) -> list[Any]:
        """The commands of the n-th packet."""
        packet = self.packets[n]
        assert isinstance(packet, Packet)
        return [list(command) for command in packet.commands]


def refuse(code: str) -> list[Refusal]:
    """A packet of one command, refused."""
    return [Refusal(code, f"{code} because")]


def spans(world: World) -> list[int | None]:
    """What each packet's first command said of its first attempt, milliseconds."""
    looks = [world.commands(n)[0][5].partition(b"|")[0] for n in range(len(world.packets))]
    return [int(re.sub(rb"\D", b"", look)) if look else None for look in looks]


# --- single calls


def test_a_call_that_is_answered_is_sent_once_and_says_no_span() -> None:
    """The ordinary path: the script's SHA, its keys, its arguments as they are."""
    world = World([b"reply"])
    assert world.run(one(call())) == b"reply"
    sha = scripts.UNTRIMMED.append_event.source.sha
    command = (b"EVALSHA", sha, b"1", b"{t}:k0", OP.encode(), b"", b"rest")
    assert world.packets == [Packet((7,), (command,), until_s=world.sent_at[0] + 15.0)]
    assert world.pauses == []


def test_a_resend_says_how_long_ago_the_first_attempt_was() -> None:
    """Counted from the first that may have arrived, never less than the truth; the op stays the same."""
    world = World(SENT, SENT, SENT, [b"reply"], takes_s=0.25)
    assert world.run(one(call())) == b"reply"
    first, *resends = spans(world)
    assert first is None
    for span, at in zip(resends, world.sent_at[1:], strict=True):
        assert span is not None
        assert 0 <= span - (at - world.sent_at[0]) * 1000 <= 2
    assert {command[4] for n in range(4) for command in world.commands(n)} == {OP.encode()}


def test_a_call_that_was_surely_not_sent_says_no_span() -> None:
    """What never left cannot have run: the next attempt is a first one."""
    world = World(NOT_SENT, NOT_SENT, [b"reply"])
    assert world.run(one(call())) == b"reply"
    assert spans(world) == [None, None, None]


def test_the_span_counts_from_the_first_attempt_that_was_sent() -> None:
    """Attempts that never left before it do not count, nor does one after it reset it."""
    world = World(NOT_SENT, SENT, NOT_SENT, refuse("BUSY"), [b"reply"], takes_s=1.0)
    world.run(one(call()))
    assert spans(world)[:2] == [None, None]
    for span, at in zip(spans(world)[2:], world.sent_at[2:], strict=True):
        assert span is not None
        assert 0 <= span - (at - world.sent_at[1]) * 1000 <= 2


@pytest.mark.parametrize("code", PASSING)
def test_a_passing_refusal_is_tried_again_as_a_first_attempt(code: str) -> None:
    """The server answered and did not execute."""
    world = World(refuse(code), refuse(code), [b"reply"])
    assert world.run(one(call())) == b"reply"
    assert spans(world) == [None, None, None]
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
def test_a_lasting_refusal_after_a_loss_leaves_the_outcome_unknown(code: str) -> None:
    """The first attempt may have run; nothing is sent after the refusal."""
    world = World(SENT, refuse(code))
    with pytest.raises(OutcomeUnknown) as unknown:
        world.run(one(call()))
    assert unknown.value.op_id == OP
    assert len(world.packets) == 2


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


def test_one_sent_attempt_among_unsent_ones_makes_it_unknown() -> None:
    """However the last one failed."""
    for last in (NOT_SENT, refuse("LOADING"), refuse("READONLY")):
        with pytest.raises(OutcomeUnknown):
            World(NOT_SENT, SENT).then_for_ever(last).run(one(call()))


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
    assert world.commands(1) == [[b"EVAL", text, b"1", b"{t}:k0", OP.encode(), b"", b"rest"]]


def test_an_unknown_script_on_a_resend_keeps_the_span() -> None:
    """A promoted replica has the data and not the script."""
    world = World(SENT, refuse("NOSCRIPT"), [b"reply"])
    world.run(one(call()))
    first, *rest = spans(world)
    assert first is None
    assert None not in rest
    assert world.commands(2)[0][0] == b"EVAL"


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
    assert [command[5] for command in world.commands(1)] == [b"", b""]


def test_a_lost_batch_is_resent_whole_with_spans() -> None:
    """No telling which of it ran: each call says its span, each is settled by its own reply."""
    world = World(SENT, [b"a", Refusal("BUSY", "BUSY"), Refusal("ERR", "ERR x")], [b"b"])
    a, b, c = world.run(one(Batch([call(n) for n in (1, 2, 3)])))
    assert (a, b) == (b"a", b"b")
    assert isinstance(c, OutcomeUnknown)
    assert c.op_id == call(3).op_id
    assert all(command[5] for n in (1, 2) for command in world.commands(n))


def test_a_batch_that_is_lost_to_the_end_has_an_outcome_for_each() -> None:
    """Those that were answered keep their answers; the others are unknown, each with its own op id."""
    world = World([b"a", Refusal("BUSY", "BUSY"), Refusal("BUSY", "BUSY")]).then_for_ever(SENT)
    a, b, c = world.run(one(Batch([call(n) for n in (1, 2, 3)])))
    assert a == b"a"
    assert [error.op_id for error in (b, c)] == [call(2).op_id, call(3).op_id]


def test_a_large_batch_is_parted_and_keeps_its_order() -> None:
    """No packet of unbounded size; outcomes come in the order of the calls."""

    def echo(packet: Packet) -> list[bytes]:
        return [bytes(command[3]) for command in packet.commands]

    world = World(echo, SENT).then_for_ever(echo)
    outcomes = world.run(one(Batch([call(n) for n in range(1, 1201)])))
    assert outcomes == [b"{t}:k%d" % n for n in range(1, 1201)]
    assert all(len(packet.commands) <= 500 for packet in world.packets if isinstance(packet, Packet))


def test_in_a_cluster_a_flow_is_in_a_packet_once() -> None:
    """Sent on to another node, a call could run behind those of its flow that were queued after it."""
    first, second, third, other = call(1), call(1), call(1), call(2)
    world = World().then_for_ever(lambda packet: [command[3] for command in packet.commands])
    outcomes = world.run(one(Batch([first, second, other, third])), cluster=True)
    assert outcomes == [b"{t}:k1", b"{t}:k1", b"{t}:k2", b"{t}:k1"]
    assert [keys_of(world, n) for n in range(3)] == [[b"{t}:k1", b"{t}:k2"], [b"{t}:k1"], [b"{t}:k1"]]


# --- redirects


MOVED, ASK = Refusal("MOVED", "MOVED 7 other:1"), Refusal("ASK", "ASK 7 other:1")


@pytest.mark.parametrize("redirect", [MOVED, ASK])
def test_a_redirect_is_followed_at_once(redirect: Refusal) -> None:
    """Nothing was executed: no pause, no span; the wire is told where to."""
    world = World([redirect], [b"reply"])
    assert world.run(one(call()), cluster=True) == b"reply"
    assert world.pauses == []
    assert spans(world) == [None, None]
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


def test_a_redirect_of_a_loss_keeps_the_span() -> None:
    """The first attempt may have run before the slot moved."""
    world = World(SENT, [MOVED], [b"reply"])
    world.run(one(call()), cluster=True)
    assert None not in spans(world)[1:]


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
    """A packet to several nodes: what was lost is sent again, with its span, and nothing else."""
    world = World([b"a", SENT, b"c"], [b"b"])
    assert world.run(one(Batch([call(n) for n in (1, 2, 3)])), cluster=True) == [b"a", b"b", b"c"]
    assert keys_of(world, 1) == [b"{t}:k2"]
    assert world.commands(1)[0][5]


def test_a_lost_connection_is_closed_before_each_resend() -> None:
    """By its server's name for it; what is lost later is added."""
    first = Lost("no reply", sent=True, client=("a:1", 5))
    second = Lost("no reply", sent=True, client=("b:2", 5))
    world = World(first, second, refuse("BUSY"), [b"reply"])
    world.run(one(call()))
    lost = [packet.again.lost for packet in world.packets[1:]]
    assert lost[-1] == {("a:1", 5), ("b:2", 5)}
    assert world.packets[0].again is None


# --- replicas

CONFIRM = Confirm(2, 1.0)


def test_a_change_names_what_it_waits_for() -> None:
    """On every attempt; reads wait for nothing."""
    world = World(SENT, [b"reply"])
    world.run(one(call()), confirm=CONFIRM)
    assert [packet.confirm for packet in world.packets] == [Confirm(2, 1.0, [b"{t}:k0"])] * 2
    world = World([b"v"])
    world.run(one(read(b"k")), confirm=CONFIRM)
    assert world.packets[0].confirm is None


def test_a_shortfall_is_raised_when_the_operation_has_its_result() -> None:
    """Applied: the operation goes on as if nothing were; in the end NotDurable says how many."""
    with pytest.raises(NotDurable) as short:
        World([Unconfirmed(b"reply", 2, 1)]).run(one(call()), confirm=CONFIRM)
    assert (short.value.wanted, short.value.reached) == (2, 1)


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
    assert spans(world) == [None, None]


def test_each_yield_has_a_deadline_of_its_own() -> None:
    """A long operation is not cut off because its parts add up."""

    def operation() -> Generator[Any, Any, None]:
        for n in range(1, 6):
            yield call(n)

    world = World(*[answer for n in range(5) for answer in (NOT_SENT, [b"ok"])], takes_s=0.8)
    world.run(operation(), deadline_s=1.0)
    assert len(world.packets) == 10
