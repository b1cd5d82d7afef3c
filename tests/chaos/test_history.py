"""The linearizability checker: held against brute force, against stores with seeded bugs, and the real library."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, combinations
from random import Random
from typing import Any

import attrs
import pytest

from tests.chaos.history import UNKNOWN, Operation, Undecided, check
from tests.chaos.simulated import (
    AppliesResendsAgain,
    ChangesWhatIsToBeCancelled,
    IgnoresExpectedRevision,
    IncrementsTwice,
    LosesAcknowledgedChanges,
    Network,
    ServesStaleReads,
    Store,
    any_update,
    simulate,
)
from tests.chaos.specification import Noted, Refusal, Version, step

# --- brute force -----------------------------------------------------------------------------------------


def explained(history: Sequence[Operation]) -> bool:
    """Whether there is an order, by trying all: with any of the unknown calls, and without."""
    answered = [operation for operation in history if operation.is_answered]
    unknown = [operation for operation in history if not operation.is_answered]
    subsets = chain.from_iterable(combinations(unknown, size) for size in range(len(unknown) + 1))
    return any(explains(order) for subset in subsets for order in orders([*answered, *subset]))


def precedes(first: Operation, second: Operation) -> bool:
    """Whether one had returned before the other was invoked."""
    return first.is_answered and first.returned_s is not None and first.returned_s < second.invoked_s


def orders(operations: Sequence[Operation]) -> Iterator[list[Operation]]:
    """Every order in which what returned before another was invoked comes before it."""
    if not operations:
        yield []
    for first in operations:
        rest = [other for other in operations if other is not first]
        if not any(precedes(other, first) for other in rest):
            yield from ([first, *order] for order in orders(rest))


def explains(order: Sequence[Operation]) -> bool:
    """Whether all that was answered is right in this order."""
    versions: list[Version | None] = [None]  # after so many operations
    answers = []
    for operation in order:
        after, answer = step(versions[-1], operation.call)
        versions.append(after)
        answers.append(answer)
    for at, (operation, answer) in enumerate(zip(order, answers, strict=True)):
        if not operation.is_answered or operation.outcome == answer:
            continue
        if versions[at + 1] is versions[at] or not isinstance(operation.outcome, Version):
            return False
        # A change may be answered by a later version, until something takes effect that was invoked after the answer.
        until = next((n for n, other in enumerate(order) if precedes(operation, other)), len(order))
        if operation.outcome not in versions[at + 1 : until + 1]:
            return False
    return True


def mutated(history: Sequence[Operation], chance: Random) -> list[Operation]:
    """The history with something else answered, at another time, or left out."""
    operations = list(history)
    n = chance.randrange(len(operations))
    operation = operations[n]
    match chance.choice(["answer", "answer", "other", "time", "time", "left out", "unknown"]):
        case "answer":
            operations[n] = attrs.evolve(operation, outcome=altered(operation.outcome, chance))
        case "other":
            other = chance.choice(operations)
            if operation.is_answered and other.is_answered:
                operations[n] = attrs.evolve(operation, outcome=other.outcome)
        case "time":
            by_s = chance.uniform(-3.0, 3.0)
            until_s = None if operation.returned_s is None else operation.returned_s + by_s
            operations[n] = attrs.evolve(operation, invoked_s=operation.invoked_s + by_s, returned_s=until_s)
        case "left out":
            del operations[n]
        case "unknown":
            operations[n] = attrs.evolve(operation, outcome=UNKNOWN)
    return operations


def altered(outcome: Any, chance: Random) -> Any:
    """Another answer of the same kind."""
    match outcome:
        case Version():
            return chance.choice(
                [
                    attrs.evolve(outcome, revision=max(0, outcome.revision + chance.choice([-1, 1]))),
                    attrs.evolve(outcome, state=frozenset({("n", chance.randrange(4))})),
                    attrs.evolve(outcome, status=chance.choice(["running", "waiting", "finished"])),
                    attrs.evolve(outcome, cancel_requested=not outcome.cancel_requested),
                    attrs.evolve(outcome, current_step="s1"),
                ]
            )
        case Noted():
            return Noted(max(0, outcome.revision + chance.choice([-1, 1])))
        case Refusal():
            return chance.choice([Refusal("CancelPending"), Refusal.named("AlreadyTerminal", {"status": "failed"})])
    return outcome


STORES: list[type[Store]] = [
    Store,
    Store,
    AppliesResendsAgain,
    IgnoresExpectedRevision,
    LosesAcknowledgedChanges,
    IncrementsTwice,
    ChangesWhatIsToBeCancelled,
]


def small_history(chance: Random) -> list[Operation]:
    """Few operations, many of them without an answer or answered late."""
    history, _ = simulate(
        chance,
        store=chance.choice(STORES),
        network=Network(loses_reply=chance.choice([0.1, 0.5]), gives_up=0.4),
        processes=chance.choice([2, 3, 4]),
        calls=chance.choice([2, 3, 4, 5]),
    )
    return history


@pytest.mark.parametrize("seed", range(4))
def test_the_verdict_is_that_of_brute_force(seed: int) -> None:
    """On a thousand small histories, half of them tampered with: none too strict, none too lenient."""
    chance = Random(seed)
    verdicts: Counter[bool] = Counter()
    for number in range(1000):
        history = small_history(chance)
        if number % 2:
            history = mutated(history, chance)
        chance.shuffle(history)
        violation, expected = check(history), explained(history)
        assert (violation is None) == expected, "\n".join(map(str, [*history, violation]))
        verdicts[expected] += 1
    assert min(verdicts.values()) > 200, verdicts


def test_a_violation_is_the_shortest_prefix_that_is_none_too_early() -> None:
    """Brute force explains the history up to each return before it, and not up to this one."""
    chance, seen = Random(1), 0
    for _ in range(600):
        history = mutated(small_history(chance), chance)
        violation = check(history)
        if violation is None:
            continue
        seen += 1
        ends = sorted({o.returned_s for o in history if o.is_answered and o.returned_s is not None})
        first = next(end for end in ends if not explained(known_at(history, end)))
        assert violation.unexplained.returned_s == first
        assert str(violation.unexplained) in str(violation)
    assert seen > 100


def known_at(history: Sequence[Operation], end: float) -> list[Operation]:
    """The history at a moment, just after a return."""
    return [
        o if o.is_answered and o.returned_s is not None and o.returned_s <= end else attrs.evolve(o, outcome=UNKNOWN)
        for o in history
        if o.invoked_s <= end
    ]


# --- executions that are right, and seeded bugs ------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_what_the_rules_bring_about_is_linearizable(seed: int) -> None:
    """The model of the rules, many callers, replies lost, answers late or never: nothing is found."""
    chance, refused = Random(seed), Counter[str]()
    for _ in range(100):
        history, _ = simulate(chance, processes=chance.randint(1, 16), calls=60)
        assert check(history) is None
        refused.update(o.outcome.name for o in history if isinstance(o.outcome, Refusal))
    wanted = {"RevisionMismatch", "AlreadyTerminal", "CancelPending", "IllegalTransition", "InvalidData", "FlowExists"}
    assert wanted <= refused.keys()


@pytest.mark.parametrize(
    "broken",
    [
        AppliesResendsAgain,
        IgnoresExpectedRevision,
        LosesAcknowledgedChanges,
        ServesStaleReads,
        IncrementsTwice,
        ChangesWhatIsToBeCancelled,
    ],
)
def test_a_seeded_bug_is_caught(broken: type[Store]) -> None:
    """Nearly whenever it made a difference to anybody, and never where it made none."""
    struck = caught = 0
    for seed in range(150):
        history, store = simulate(Random(seed), store=broken, network=Network(gives_up=0.0))
        violation = check(history)
        assert violation is None or store.struck, f"seed {seed}: {violation}"
        struck += bool(store.struck)
        caught += violation is not None
    assert struck > 40
    assert caught > 0.85 * struck


def operation(process: int, verb: str, times: tuple[float, float], outcome: Any, **arguments: Any) -> Operation:
    """An operation, in short."""
    return Operation(process, verb, arguments, *times, outcome)


def version(revision: int, n: int) -> Version:
    """A running flow that counts."""
    return Version("running", revision, frozenset({("n", n)}), "init", cancel_requested=False)


RUNNING_AGAIN = {"source": "running", "target": "running"}


def test_a_stale_read_is_told_from_a_late_answer() -> None:
    """A resend answers with the flow as it is by then, which is right; a read of what was overwritten is not."""
    begun = [
        operation(0, "create_mirrored", (0, 1), version(1, 0), state={"n": 0}),
        operation(1, "start_running", (1, 2), Refusal.named("IllegalTransition", RUNNING_AGAIN)),
        operation(1, "update_state", (2, 9), version(3, 3), increment={"n": 1}),
        operation(2, "update_state", (3, 4), version(3, 3), increment={"n": 2}),
    ]
    assert check([*begun, operation(3, "get", (10, 11), version(3, 3))]) is None
    assert check([*begun, operation(3, "get", (4, 11), version(2, 1))]) is None
    stale = check([*begun, operation(3, "get", (5, 11), version(2, 1))])
    assert stale is not None
    assert (
        str(stale)
        == """\
no order of the first 5 operations explains this answer:
  [5.000000 – 11.000000] process 3: get() → revision 2, running, at 'init', {'n': 1}
as far as there is an order, the flow was
  revision 3, running, at 'init', {'n': 3}
at the same time there were
  [2.000000 – 9.000000] process 1: update_state(increment={'n': 1}) → revision 3, running, at 'init', {'n': 3}
and the last before
  [0.000000 – 1.000000] process 0: create_mirrored(state={'n': 0}) → revision 1, running, at 'init', {'n': 0}
  [1.000000 – 2.000000] process 1: start_running() → IllegalTransition(source=running, target=running)
  [3.000000 – 4.000000] process 2: update_state(increment={'n': 2}) → revision 3, running, at 'init', {'n': 3}"""
    )


def test_an_answer_before_its_question_is_no_operation() -> None:
    """Two clocks were compared that must not be."""
    with pytest.raises(ValueError, match="a time behind its invocation"):
        operation(0, "get", (2, 1), None)


# --- how long it takes ---------------------------------------------------------------------------------


def seconds(what: Callable[[], object]) -> float:
    """The processor time of a call: others share the machine."""
    before = time.process_time()
    what()
    return time.process_time() - before


def test_many_long_histories_take_a_moment() -> None:
    """12,000 operations on 20 flows, 16 writers each, some replies lost and a few never got: well under 5 s."""
    network = Network(loses_reply=0.05, gives_up=0.05)
    histories = [
        simulate(Random(seed), network=network, choose=any_update, processes=16, calls=600)[0] for seed in range(20)
    ]
    assert sum(map(len, histories)) > 12_000
    assert sum(not operation.is_answered for history in histories for operation in history) > 10
    assert seconds(lambda: [check(history) for history in histories]) < 5.0
    assert [check(history) for history in histories] == [None] * 20


def test_one_very_long_history_takes_a_moment() -> None:
    """Nothing grows with the length of a history but the number of its operations."""
    network = Network(loses_reply=0.05, gives_up=0.01)
    history, _ = simulate(Random(5), network=network, choose=any_update, processes=16, calls=5_000)
    broken = [*history, operation(99, "get", (2.0, 3.0), version(1, 77))]
    assert seconds(lambda: check(history)) < 5.0
    assert check(history) is None
    assert seconds(lambda: check(broken)) < 5.0
    assert check(broken) is not None


def test_calls_that_commute_are_no_puzzle() -> None:
    """Sixteen replies cut at once, and each resend answered by the last version: any order is one."""
    answered = Version("running", 17, frozenset((f"k{n}", n) for n in range(16)), "init", cancel_requested=False)
    history = [operation(0, "create_mirrored", (0, 1), Version("running", 1, frozenset(), "init", False))]
    history += [operation(n, "update_state", (2, 3), answered, patch={f"k{n}": n}) for n in range(16)]
    assert check(history) is None


def test_a_search_that_would_not_end_says_so() -> None:
    """Too many calls without an answer: undecided, and no verdict."""
    history = [operation(0, "create_mirrored", (0, 1), version(1, 0), state={"n": 0})]
    history += [Operation(n, "update_state", {"patch": {f"k{n}": n}}, 2.0, None, UNKNOWN) for n in range(16)]
    history += [operation(99, "get", (3, 4), version(14, 1))]
    with pytest.raises(Undecided, match="after 1000 steps"):
        check(history, most_steps=1000)
