"""Writers that send several verbs of one flow in one batch, and need them in their order."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any
from uuid import UUID

import attrs

from redisflow import Flow
from tests.chaos.crowd import Crowd, Writer, any_change, asked, flow_ids
from tests.chaos.findings import Breach, Finding
from tests.chaos.ledger import Ask, End, Entry

_WRITERS, _OWN, _SHARED = 6, 4, 3
_SIZES, _HOW_OFTEN = [1, 4, 15, 60, 520], [10, 30, 30, 10, 1]


@attrs.define(eq=False)
class _Own:
    """A flow that only one writer changes, so that it knows what each of its verbs will find."""

    flow_id: UUID
    status: str = ""
    revision: int = -1
    held: Flow | None = None
    broken: bool = False


class Batches(Crowd):
    """Writers with flows of their own, whose every verb needs the one before it, and flows that they share."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._ids = flow_ids(self.chance)
        self._shared = [next(self._ids) for _ in range(_SHARED)]

    def writers(self) -> Sequence[Writer]:
        """Make all writers; the first of them creates the flows that are shared."""
        return [self._writer(number, Random(self.chance.random())) for number in range(_WRITERS)]

    def _writer(self, number: int, chance: Random) -> Writer:
        ids = flow_ids(chance)
        own: list[_Own] = []
        if number == 0:
            yield [asked(self.ledger, "create_mirrored", flow_id) for flow_id in self._shared]
        while not self.stopped.is_set():
            own = [one for one in own if not one.broken and one.status != "finished"]
            own += [_Own(next(ids)) for _ in range(_OWN - len(own))]
            asks: list[Ask] = []
            whose: list[_Own | None] = []
            for _ in range(chance.choices(_SIZES, _HOW_OFTEN)[0]):
                one = chance.choice(own) if chance.random() < 0.8 else None
                if one is not None and one.status == "finished":
                    continue
                whose.append(one)
                if one is None:
                    asks.append(any_change(self.ledger, chance, chance.choice(self._shared), None))
                else:
                    asks.append(self._next(one, chance))
            if not asks:
                continue
            entries: Sequence[Entry] = yield asks
            for entry, one in zip(entries, whose, strict=True):
                if one is not None:
                    self._judge(one, entry)

    def _next(self, one: _Own, chance: Random) -> Ask:
        """Make the next verb of a flow, and note what it will make of it."""
        verb, status = _drawn(one.status, chance)
        more: dict[str, Any] = {}
        changes = verb != "append_event"
        if one.status and chance.random() < 0.4:
            more["expected_revision"] = one.revision
        ref = one.held if one.held is not None and not more and chance.random() < 0.5 else one.flow_id
        one.status = status
        one.revision += changes
        return asked(self.ledger, verb, ref, **more)

    def _judge(self, one: _Own, entry: Entry) -> None:
        """Take in what a verb came to. Of those after one that was not carried out nothing is known."""
        if entry.end is not End.DONE and not one.broken:
            one.broken = True
            if entry.end is End.REFUSED and not _is_storage(entry):
                sentence = f"nobody else changes it, and in its batch there was {entry}"
                self.findings.append(Finding(Breach.ORDER, one.flow_id, sentence))
        one.held = entry.flow or one.held


def _drawn(status: str, chance: Random) -> tuple[str, str]:
    """Draw a verb that is allowed in a status. Returns it and the status that it leads to."""
    match status:
        case "":
            return "create_managed", "created"
        case "created":
            return chance.choice([("start_running", "running"), ("resume", "running"), ("update_state", "created")])
        case "waiting":
            return chance.choice([("resume", "running"), ("update_state", "waiting"), ("append_event", "waiting")])
    verbs = [("update_state", "running"), ("set_waiting", "waiting"), ("append_event", "running")]
    return chance.choices([*verbs, ("finish", "finished")], [5, 5, 2, 1])[0]


def _is_storage(entry: Entry) -> bool:
    return type(entry.error).__name__ in {"StorageError", "NotDurable"}
