"""Whether what many writers of one flow were answered can have happened in some order, one call after the other.

The search is Wing and Gong's with memoised configurations, as in Lowe's "Testing for linearizability" and in
porcupine: it goes through the answers in the order they came, and before each it lets as many of the calls under way
take effect as that answer needs.

Two things are particular here:
- A change takes effect once, but may be answered by a later version than its own: a resend whose first attempt was
  applied is answered with the flow as it is by then. So a change has two points, effect and answer, both between its
  invocation and its return.
- A revision is never used twice. So an answer that tells a revision can be given at that revision only, and a change
  that made the next revision must be the next to take effect.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, Final

import attrs

from tests.chaos.specification import CREATIONS, READS, Answer, Call, Noted, Refusal, Version, step


@attrs.frozen
class Unknown:
    """No answer came: the call takes effect at any moment after its invocation, or never."""

    def __str__(self) -> str:
        return "no answer"


UNKNOWN: Final = Unknown()
Outcome = Answer | Unknown


@attrs.frozen(eq=False)
class Operation:
    """One call of one process, from its first attempt to its answer, however many resends there were between.

    A call that certainly was not carried out (`StorageError`, but not `OutcomeUnknown`) is no operation.

    Attributes:
        arguments: by the library's names, without the flow and the `op_id`.
        invoked_s, returned_s: of one monotonic clock; `returned_s` means nothing where the outcome is unknown.
        outcome: what the call answered: `Version.of` a flow, `Refusal.of` an error, `Noted`, `None` for a `get` that
            found none, or `UNKNOWN`.
    """

    process: int
    verb: str
    arguments: Mapping[str, Any]
    invoked_s: float
    returned_s: float | None
    outcome: Outcome
    call: Call = attrs.field(init=False, repr=False)

    @call.default
    def _call(self) -> Call:
        return Call(self.verb, self.arguments)

    def __attrs_post_init__(self) -> None:
        if self.is_answered and (self.returned_s is None or self.returned_s < self.invoked_s):
            raise ValueError(f"an answer needs a time behind its invocation: {self}")

    @property
    def is_answered(self) -> bool:
        """Whether it is known how it ended."""
        return self.outcome is not UNKNOWN

    def __str__(self) -> str:
        until = f"{self.returned_s:.6f}" if self.is_answered and self.returned_s is not None else "?"
        return f"[{self.invoked_s:.6f} – {until}] process {self.process}: {self.call} → {self.outcome or 'no flow'}"


@attrs.frozen(eq=False)
class Violation:
    """The fewest first operations that no order explains.

    Attributes:
        operations: those that had been invoked when the last of them returned, by invocation; the outcome of one
            that returned later is unknown.
        unexplained: the one that returned last.
        reached: what the flow was as far as there is an order.
    """

    operations: Sequence[Operation]
    unexplained: Operation
    reached: Sequence[Version | None]

    def __str__(self) -> str:
        def overlaps(other: Operation) -> bool:
            return not other.is_answered or (other.returned_s or 0.0) >= self.unexplained.invoked_s

        others = [other for other in self.operations if other is not self.unexplained]
        beside = [other for other in others if overlaps(other)]
        earlier = sorted((o for o in others if not overlaps(o)), key=lambda o: o.returned_s or 0.0)[-_SHOWN:]
        return "\n".join(
            [
                f"no order of the first {len(self.operations)} operations explains this answer:",
                f"  {self.unexplained}",
                "as far as there is an order, the flow was",
                *(f"  {version or 'absent'}" for version in self.reached[:_SHOWN]),
                *(["at the same time there were", *(f"  {other}" for other in beside)] if beside else []),
                *(["and the last before", *(f"  {other}" for other in earlier)] if earlier else []),
            ]
        )


class Undecided(Exception):
    """The search was given up: too many calls without an answer were under way at once."""


_SHOWN = 4
_MOST_STEPS = 100_000
_MOST_STEPS_TO_SHORTEN = 10_000


def check(history: Iterable[Operation], *, most_steps: int = _MOST_STEPS) -> Violation | None:
    """Return what is wrong with a history of one flow, `None` for one that is linearizable.

    Args:
        history: the operations, in any order; the flow does not exist before the first.
        most_steps: how many configurations to look at.

    Raises:
        Undecided: after so many.
    """
    search = _Search(history)
    stuck = search.run(most_steps)
    return None if stuck is None else search.shortest_violation(stuck)


@attrs.frozen(cache_hash=True)
class _Point:
    """How far one order has come.

    Attributes:
        done: calls under way that took effect, or have none, and whose answer has been given or is unknown.
        owed: calls under way that took effect and whose answer is still to be given.
    """

    version: Version | None = None
    done: frozenset[int] = frozenset()
    owed: frozenset[int] = frozenset()

    @property
    def revision(self) -> int:
        return -1 if self.version is None else self.version.revision


class _Traits:
    """What the search asks of an operation over and over."""

    __slots__ = ("call", "is_unknown", "makes", "may_change", "outcome", "revision")

    def __init__(self, operation: Operation) -> None:
        verb, self.call = operation.verb, operation.call
        self.outcome = operation.outcome
        self.is_unknown = not operation.is_answered
        self.revision = _revision_of(operation.outcome)  # the only one it can be answered at
        self.may_change = verb not in READS and (self.is_unknown or isinstance(self.outcome, Version))
        # Whether it must have made a revision, by one more: the others may have found nothing to do.
        self.makes = self.may_change and not self.is_unknown and verb not in {*CREATIONS, "request_cancel"}


def _revision_of(outcome: Outcome) -> int | None:
    match outcome:
        case Version() | Noted():
            return outcome.revision
        case Refusal():
            return outcome.actual
    return None


@attrs.frozen(eq=False)
class _Round:
    """One return.

    Attributes:
        due: the operation that returned.
        under_way: those invoked by then that had not returned before, by invocation.
        ends: how many invocations and returns there were by then.
    """

    due: int
    under_way: tuple[int, ...]
    ends: int


class _Search:
    """Depth first: where calls commute, any order will do, and the first one tried is as good as another."""

    def __init__(self, history: Iterable[Operation]) -> None:
        self._operations = sorted(history, key=lambda operation: operation.invoked_s)
        self._traits = [_Traits(operation) for operation in self._operations]
        self._reached: set[Version | None] = set()

    @cached_property
    def _events(self) -> list[tuple[float, bool, int]]:
        """Time, whether it is a return, which operation. At the same time, both calls are under way."""
        events = [(operation.invoked_s, False, n) for n, operation in enumerate(self._operations)]
        for n, operation in enumerate(self._operations):
            if operation.is_answered and operation.returned_s is not None:
                events.append((operation.returned_s, True, n))
        return sorted(events)

    @cached_property
    def _rounds(self) -> list[_Round]:
        rounds, under_way = [], dict[int, None]()
        for ends, (_, is_return, n) in enumerate(self._events, 1):
            under_way[n] = None
            if is_return:
                rounds.append(_Round(n, tuple(under_way), ends))
                del under_way[n]
        return rounds

    def run(self, most_steps: int) -> int | None:
        """Return the number of the round that no order gets past, `None` if one gets past all.

        Raises:
            Undecided: after `most_steps`.
        """
        rounds, furthest = self._rounds, 0
        todo = [(0, _Point())] if rounds else []
        seen: set[tuple[int, _Point]] = set()
        self._reached = {None}
        while todo:
            number, unsettled = todo.pop()
            current = rounds[number]
            point = self._settled(current, unsettled)
            if point is None or (number, point) in seen:
                continue
            if len(seen) == most_steps:
                raise Undecided(f"after {most_steps} steps, at {self._operations[current.due]}")
            seen.add((number, point))
            if current.due not in point.done:
                todo += [(number, after) for after in self._effects(current, point)]
                continue
            number += 1
            if number == len(rounds):
                return None
            todo.append((number, _Point(point.version, point.done - {current.due}, point.owed)))
            if number > furthest:
                furthest, self._reached = number, set()
            if number == furthest:
                self._reached.add(point.version)
        return furthest if rounds else None

    def _settled(self, current: _Round, point: _Point) -> _Point | None:
        """Give every answer that can be given at this version; `None` if one can be given no more.

        Such an answer changes nothing, and a call that finds nothing to do now will find nothing to do later, so an
        order in which it comes later is an order still with it moved here.
        """
        given = []
        for n in current.under_way:
            traits = self._traits[n]
            if n in point.done or traits.is_unknown:
                continue
            if traits.revision is not None and traits.revision > point.revision:
                continue
            answer = point.version if n in point.owed else step(point.version, traits.call)[1]
            if answer == traits.outcome:
                given.append(n)
            elif traits.revision is not None:
                return None  # the flow is at its revision, or beyond
        return _Point(point.version, point.done.union(given), point.owed.difference(given)) if given else point

    def _effects(self, current: _Round, point: _Point) -> Iterator[_Point]:
        """Let each call take effect that may be the next to; the likeliest last."""
        waiting = [
            n for n in current.under_way if self._traits[n].may_change and n not in point.done and n not in point.owed
        ]
        # Taking effect later, it would make a later revision than the one it was answered.
        if makers := [n for n in waiting if self._traits[n].makes and self._traits[n].revision == point.revision + 1]:
            waiting = makers if len(makers) == 1 else []
        for n in sorted(waiting, key=self._rank, reverse=True):
            traits = self._traits[n]
            after, _ = step(point.version, traits.call)
            if after is point.version or after is None:
                continue
            if traits.is_unknown:
                yield _Point(after, point.done | {n}, point.owed)
            else:
                yield _Point(after, point.done, point.owed | {n})

    def _rank(self, n: int) -> tuple[bool, int]:
        return self._traits[n].is_unknown, self._traits[n].revision or 0

    def shortest_violation(self, stuck: int) -> Violation:
        """Find the first return that is unexplained, when nothing is known of the returns behind it.

        The search knew the answers of all calls under way, so the contradiction may be that of a later return.
        """
        last = max(number for number, other in enumerate(self._rounds) if other.due in self._rounds[stuck].under_way)
        for number in range(stuck, last):
            shorter = self._until(self._rounds[number])
            with suppress(Undecided):
                if shorter.run(_MOST_STEPS_TO_SHORTEN) is not None:
                    return shorter._violation()
        shorter = self._until(self._rounds[last])
        with suppress(Undecided):
            shorter.run(_MOST_STEPS_TO_SHORTEN)
        return shorter._violation()

    def _until(self, last: _Round) -> _Search:
        """The same at the moment of a return."""
        events = self._events[: last.ends]
        returned = {n for _, is_return, n in events if is_return}
        return _Search(
            self._operations[n] if n in returned else attrs.evolve(self._operations[n], outcome=UNKNOWN)
            for _, is_return, n in events
            if not is_return
        )

    def _violation(self) -> Violation:
        reached = sorted(self._reached, key=lambda version: -1 if version is None else version.revision)
        return Violation(self._operations, self._operations[self._rounds[-1].due], reached)
