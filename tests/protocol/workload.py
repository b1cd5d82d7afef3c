"""One schedule: a few clients, flows and calls, drawn by a seed, and carried out to the last late packet."""

from __future__ import annotations

import random as chance
from collections.abc import Callable, Sequence
from random import random
from typing import Any, TypeVar
from uuid import UUID

from redisflow.batch import FlowBatch
from redisflow.errors import FlowError, OutcomeUnknown
from redisflow.flow import Flow, FlowEvent, FlowStep, StepObservation
from redisflow.ops import changes, namespace, records, upkeep
from redisflow.ops.namespace import Namespace
from redisflow.waits import Manual
from tests.protocol.beginnings import (
    BOUND,
    LIBRARY,
    N_FLOWS,
    NAMESPACES,
    NODE_SIZE,
    Kind,
    beginnings,
    copy_of,
    fill_op_ids,
    flow_id,
    increment,
    new_flow,
)
from tests.protocol.model import Server
from tests.protocol.network import Clock, Network, Weather
from tests.protocol.store import Hash
from tests.protocol.themes import THEMES, Theme
from tests.protocol.world import Client, Run, delivered

T = TypeVar("T")
Ref = Flow | UUID
Make = Callable[[Namespace, Ref, int | None, str | None], Any]
MOST_EVENTS = 20_000  # of one schedule's agenda


def pick(options: Sequence[T]) -> T:
    """Choose one of some."""
    return options[int(random() * len(options))]


def _id(flow: Ref) -> UUID:
    return flow.id if isinstance(flow, Flow) else flow


VERBS: dict[str, Make] = {
    "create": lambda n, f, _, op: new_flow(n, _id(f), op, mirrored=False, exist_ok=False),
    "mirror": lambda n, f, _, op: new_flow(n, _id(f), op, mirrored=True, exist_ok=False),
    "get_or_create": lambda n, f, _, op: new_flow(n, _id(f), op, mirrored=False, exist_ok=True),
    "start_running": lambda n, f, e, op: changes.start_running(n, f, expected_revision=e, op_id=op),
    "set_waiting": lambda n, f, e, op: changes.set_waiting(n, f, Manual(), expected_revision=e, op_id=op),
    "resume": lambda n, f, e, op: changes.resume(n, f, {"r": 1}, expected_revision=e, op_id=op),
    "finish": lambda n, f, e, op: changes.finish(n, f, {"f": 1}, expected_revision=e, op_id=op),
    "cancel": lambda n, f, e, op: changes.cancel(n, f, expected_revision=e, op_id=op),
    "request_cancel": lambda n, f, e, op: changes.request_cancel(n, f, expected_revision=e, op_id=op),
    "increment": increment,
    "append": lambda n, f, e, op: records.append_event(n, f, "note", None, expected_revision=e, op_id=op),
    "append_created": lambda n, f, e, op: records.append_event(n, f, "created", None, expected_revision=e, op_id=op),
    "observe": lambda n, f, e, op: records.record_step_observation(
        n, StepObservation(f, "run", "task", "running"), runtime="mirrored", expected_revision=e, op_id=op
    ),
    "delete": lambda n, f, e, op: upkeep.delete(n, f, expected_revision=e, op_id=op),
}


class Record:
    """A call, and what came of it.

    Attributes:
        op: the operation's id; `brought` says whether the caller brought it.
        settles: the call whose outcome was unknown, which this one settles.
        batch: the calls that were sent together, in their order.
        result, error: what the caller was answered.
        ended_s: when; endless where the call never ended.
    """

    __slots__ = (
        "batch", "began_s", "brought", "client", "ended_s", "error", "expected", "flow", "is_cancelled", "number",
        "op", "ref", "result", "run", "settles", "verb",
    )  # fmt: skip

    def __init__(self, number: int, client: Client, verb: str, flow: int) -> None:
        self.number = number
        self.client = client
        self.verb = verb
        self.flow = flow
        self.ref: Ref | None = None
        self.expected: int | None = None
        self.op = ""
        self.brought = False
        self.settles: Record | None = None
        self.batch: Sequence[Record] = ()
        self.began_s = self.ended_s = float("inf")
        self.is_cancelled = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.run: Run | None = None

    def __str__(self) -> str:
        return f"call {self.number} ({self.verb} of flow {self.flow} by client {self.client.number}, op {self.op[-4:]})"


class Schedule:
    """What one seed makes.

    Attributes:
        is_gentle: whether the server can be reached again well within the deadline of each call.
    """

    def __init__(
        self,
        seed: int,
        server: type[Server] = Server,
        tell: Callable[[str], None] | None = None,
        theme: Theme | None = None,
    ) -> None:
        beginnings()  # or the first schedule would find other ids drawn
        chance.seed(seed)
        fill_op_ids(1)
        self.seed = seed
        self.theme = theme = theme or pick(THEMES)
        self.clock = Clock()
        self.server = server(LIBRARY, NODE_SIZE)
        self._tell = None if tell is None else lambda what: tell(f"{self.clock.now_s:9.4f}  {what}")
        self.records: list[Record] = []
        self.is_gentle = random() < theme.gentle
        self.network = Network(self.clock, self.server, self._weather(), self._tell)
        self.flows = range(1 + int((1 if theme.alike else random()) * random() * min(theme.most_flows, N_FLOWS)))
        self.copies: list[list[Flow]] = []
        for number in self.flows:
            beginning = beginnings()[number, pick(theme.beginnings)]
            beginning.set_up(self.server)
            self.copies.append(list(beginning.copies))
        self.keys = [beginnings()[number, Kind.ABSENT].flow_key for number in self.flows]
        self.clients = [self._client(number) for number in range(2 + (random() < 0.3))]
        self._disturb()
        for _ in range(pick(theme.units)):
            self._plan()
        self.is_over = False

    # --- drawing

    def _weather(self) -> Weather:
        theme = self.theme
        weather = Weather(pick(theme.trouble), pick((0.3, 0.7)), 0.5 if self.is_gentle else 1.5)
        if random() < theme.outage:
            start_s = 0.2 * random()
            weather.outage = (start_s, start_s + random() * (0.1 if self.is_gentle else 0.6))
        if random() < theme.refusing:
            start_s = 0.2 * random()
            weather.refusing = (start_s, start_s + 0.1 * random())
        return weather

    def _client(self, number: int) -> Client:
        theme = self.theme
        bound = BOUND if random() < theme.trims else None
        owner = pick(("o", "p")) if random() < theme.bound else ""
        deadline_s = 15.0 if self.is_gentle else pick((0.02, 0.05, 0.2))
        client = Client(
            number, NAMESPACES[bound, owner], self.clock, self.network, deadline_s=deadline_s, shares=random() < 0.5
        )
        client.gathers = random() < 0.8
        return client

    def _disturb(self) -> None:
        theme, at = self.theme, self.clock.at
        if random() < theme.restarting:
            at(0.3 * random(), self.network.restart)
        if random() < theme.forgetting:
            for _ in range(1 + int(3 * random())):
                at(0.2 * random(), self.server.forget_scripts)
        if random() < theme.trimming:
            at(0.3 * random(), self._trim, pick(self.flows), int(3 * random()))
        if random() < 0.02:
            at(0.3 * random(), self._set_back)

    def _trim(self, flow: int, most: int) -> None:
        self.say(f"XTRIM of flow {flow} to {most}")
        self.server.trim(self.keys[flow].replace(b"}:flow:", b"}:events:"), most)

    def _set_back(self) -> None:
        self.say("the server's clock is set back")
        self.clock.behind_us = int(5e6 * random())

    def _plan(self) -> None:
        """Plan a call, a batch, or calls of several clients with one operation id."""
        theme, clock, kind = self.theme, self.clock, random()
        begins_s = theme.within_s * random()
        if kind < theme.batches:
            self._plan_batch(begins_s)
            return
        record = self._record(pick(self.clients), pick(self.flows))
        if kind < theme.batches + theme.brought:
            record.op, record.brought = f"{len(self.records):032x}", True
            for _ in range(pick((1, 1, 2))):
                twin = self._record(pick(self.clients), record.flow, record.verb)
                twin.op, twin.brought, twin.expected = record.op, True, record.expected
                clock.at(begins_s + pick((0.02, 0.2, 2.0)) * random(), self._begin, twin)
        clock.at(begins_s, self._begin, record)
        if random() < theme.cancels:
            clock.at(begins_s + pick((0.02, 0.1)) * random(), self._cancel, record)

    def _plan_batch(self, begins_s: float) -> None:
        client, flow, verb = pick(self.clients), pick(self.flows), self._batch_verb()
        batch: list[Record] = []
        for n in range(len(self.flows) if self.theme.alike else pick((2, 2, 3))):
            if self.theme.alike:
                batch.append(self._record(client, self.flows[n], verb))
            else:
                other = flow if random() < 0.7 else pick(self.flows)
                batch.append(self._record(client, other, self._batch_verb()))
        for record in batch:
            record.batch = batch
        self.clock.at(begins_s, self._begin_batch, batch)

    def _batch_verb(self) -> str:
        verb = pick(self.theme.verbs)
        return "increment" if verb == "delete" else verb  # no batch deletes

    def _record(self, client: Client, flow: int, verb: str = "") -> Record:
        record = Record(len(self.records), client, verb or pick(self.theme.verbs), flow)
        self.records.append(record)
        return record

    # --- carrying out

    @property
    def calm_s(self) -> float:
        """The time from which no packet meets with trouble."""
        return max(self.network.weather.calm_s, self.network.weather.outage[1], self.network.weather.refusing[1])

    def run(self) -> None:
        """Carry it all out, to the last late packet."""
        self.is_over = self.clock.run(MOST_EVENTS)

    def _prepare(self, record: Record) -> Any:
        """Build the operation of a call."""
        if record.ref is None:
            copies = self.copies[record.flow]
            record.ref = flow_id(record.flow)
            if copies and random() < self.theme.copies:
                record.ref = copies[-1] if random() < 0.6 else pick(copies)
            if copies and random() < 0.15 and record.settles is None:
                copy = record.ref if isinstance(record.ref, Flow) else copies[-1]
                record.expected = copy.revision
        record.began_s = self.clock.now_s
        if not record.brought and not record.batch:
            record.op = namespace._unused_op_ids[-1]
        op_id = record.op if record.brought else None
        return VERBS[record.verb](record.client.namespace, record.ref, record.expected, op_id)

    def _begin(self, record: Record) -> None:
        op = self._prepare(record)
        record.run = delivered(record.client, record, op, lambda result, error: self._ended(record, result, error))
        if self._tell is not None:
            how = "by id"
            if isinstance(record.ref, Flow):
                fence = fields_of(record.ref)[b"etag"][33:].decode()
                how = f"by a copy at revision {record.ref.revision}, fence {fence!r}"
            settles = f", settles {record.settles}" if record.settles is not None else ""
            self.say(f"begins: {record}, {how}, expected {record.expected}, brought {record.brought}{settles}")
        record.run.start()

    def _begin_batch(self, batch: Sequence[Record]) -> None:
        client = batch[0].client
        together = FlowBatch(client)  # type: ignore[arg-type]  # only its namespace is asked for
        queued = []
        for record in batch:
            verb = together._queue(self._prepare(record))
            assert verb.call is not None
            record.op = verb.call.op_id
            queued.append(verb)
            if self._tell is not None:
                self.say(f"begins in a batch: {record}")

        def ended(_: Any, error: BaseException | None) -> None:
            for record, verb in zip(batch, queued, strict=True):
                if error is not None:
                    self._ended(record, None, error)
                    continue
                try:
                    self._ended(record, verb.result(), None)
                except FlowError as refusal:
                    self._ended(record, None, refusal)

        run = delivered(client, batch[0], together._packet(), ended)
        for record in batch:
            record.run = run
        run.start()

    def _cancel(self, record: Record) -> None:
        if record.run is not None and not record.run.is_over:
            self.say(f"cancelled: {record}")
            record.is_cancelled, record.ended_s = True, self.clock.now_s
            record.run.cancel()

    def _ended(self, record: Record, result: Any, error: BaseException | None) -> None:
        record.ended_s, record.result, record.error = self.clock.now_s, result, error
        if self._tell is not None:
            outcome = f"{type(error).__name__}: {error}" if error is not None else f"done, {_brief(result)}"
            self.say(f"ends: {record}: {outcome}")
        if isinstance(result, Flow):
            self.copies[record.flow].append(result)
        elif random() < 0.5:
            fields = self.server.db.get(self.keys[record.flow])
            if fields and b"gone" not in fields and b"status" in fields:
                self.copies[record.flow].append(copy_of(flow_id(record.flow), fields))
        if isinstance(error, OutcomeUnknown) and len(self.records) < 9 and random() < 0.85:
            for _ in range(pick(self.theme.settlers)):
                self._settle(record)

    def _settle(self, unknown: Record) -> None:
        """Plan a call that settles another one, by its operation id."""
        record = self._record(pick(self.clients), unknown.flow, unknown.verb)
        if record.client.namespace.owner != unknown.client.namespace.owner:
            record.client = unknown.client
        record.op, record.brought = unknown.op, True
        record.expected, record.settles = unknown.expected, unknown
        if random() < 0.5 or unknown.expected is not None:
            record.ref = unknown.ref
        self.clock.at(self.clock.now_s + pick(self.theme.settled_within_s) * random(), self._begin, record)

    def say(self, what: str) -> None:
        """Add a line to the story, if one is told."""
        if self._tell is not None:
            self._tell(what)


def fields_of(flow: Flow) -> Hash:
    """Return the hash fields of a copy."""
    base: Any = flow._base
    fields: Hash = base.fields
    return fields


def _brief(result: Any) -> str:
    if isinstance(result, Flow):
        fields = fields_of(result)
        return f"revision {fields[b'revision'].decode()}, n {fields.get(b's:n', b'-').decode()}"
    return f"a {type(result).__name__}" if isinstance(result, FlowEvent | FlowStep) else str(result)
