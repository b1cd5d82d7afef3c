"""Whole lives of flows, their replies lost: every change is there once, reported as it was."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import attrs

from redisflow import (
    AlreadyTerminal,
    AsyncFlowManager,
    CancelPending,
    ExternalEvent,
    FlowError,
    FlowManager,
    FlowNotFound,
    FlowStatus,
    Manual,
    RevisionMismatch,
    StepObservation,
    Timer,
)
from tests.support.proxy import CUT_REPLY, CUT_REQUEST, DROP, HANG, HANG_REPLY, PASS, Fault, FaultProxy, delay
from tests.support.resends import IDENTITY, sent

ASIDE_KINDS = {"note", "aside", "step_observed"}  # they leave the revision alone
Step = tuple[str, tuple[Any, ...], dict[str, Any]]


def is_quiet(flow_id: UUID) -> bool:
    """Whether nobody but its owner writes to a flow."""
    return bool(flow_id.int >> 64 & 1)


@attrs.define
class Ledger:
    """What was acknowledged, flow by flow, from whichever side it was done."""

    kinds: dict[UUID, Counter[str]] = attrs.field(factory=lambda: defaultdict(Counter))
    added: Counter[UUID] = attrs.field(factory=Counter)
    added_aside: Counter[UUID] = attrs.field(factory=Counter)
    deleted: set[UUID] = attrs.field(factory=set)


class Storm:
    """A plan that loses replies, and lets another writer in before a resend arrives."""

    def __init__(self, direct: FlowManager, ledger: Ledger, faults: Callable[[bool], Fault]) -> None:
        self._direct, self._ledger, self._faults = direct, ledger, faults
        self._turn = 0
        self._sent: set[tuple[UUID, bytes]] = set()
        self.lost: set[bytes] = set()
        self.moved_on: set[bytes] = set()

    def __call__(self, command: list[bytes]) -> Fault:
        call = sent(command)
        if call is None:
            return PASS
        flow_id, op, _ = call
        resend = (flow_id, op) in self._sent
        self._sent.add((flow_id, op))
        if resend and not is_quiet(flow_id) and self._write_aside(flow_id):
            self.moved_on.add(op)
        fault = self._faults(resend)
        if fault is CUT_REPLY:
            self.lost.add(op)
        return fault

    def _write_aside(self, flow_id: UUID) -> bool:
        self._turn += 1
        try:
            if self._turn % 5:
                self._direct.update_state(flow_id, increment={"aside": 1})
            else:
                self._direct.append_event(flow_id, "aside")
        except (FlowNotFound, AlreadyTerminal, CancelPending):
            return False
        self._ledger.kinds[flow_id]["state_updated" if self._turn % 5 else "aside"] += 1
        self._ledger.added_aside[flow_id] += bool(self._turn % 5)
        return True


def life(  # noqa: C901, PLR0912, PLR0915 - one life, told in order
    chance: random.Random, ledger: Ledger
) -> Generator[Step, Any, None]:
    """One flow from creation to its end: yields calls, is resumed with what they gave."""
    flow_id = UUID(int=chance.getrandbits(128))
    quiet, kinds = is_quiet(flow_id), ledger.kinds[flow_id]
    mirrored = chance.random() < 0.3
    flow = yield (
        "create_mirrored" if mirrored else "create_managed",
        (),
        IDENTITY | {"flow_id": flow_id, "state": {"n": 0, "keep": [1]}},
    )
    assert flow.id == flow_id
    kinds.update(["created", "started"] if mirrored else ["created"])

    def ref() -> Any:
        return chance.choice([flow, flow_id, str(flow_id)])

    def options() -> dict[str, Any]:
        return {"expected_revision": flow.revision} if quiet and chance.random() < 0.5 else {}

    for _ in range(chance.randrange(4, 14)):
        if flow.status is FlowStatus.CREATED:
            flow = yield "start_running", (ref(),), options()
            kinds["started"] += 1
            continue
        if flow.status is FlowStatus.WAITING and chance.random() < 0.6:
            flow = yield "resume", (ref(), {"approved": chance.random()}), options()
            kinds["resumed"] += 1
            continue
        match chance.choice(["add", "add", "patch", "wait", "note", "step", "rewrite", "mutate"]):
            case "add":
                delta = chance.randrange(-50, 50)
                flow = yield "update_state", (ref(),), {"increment": {"n": delta}, **options()}
                kinds["state_updated"] += 1
                ledger.added[flow_id] += delta
            case "patch":
                patch = {"big": "x" * chance.randrange(2000)}
                flow = yield "update_state", (ref(), patch), {"next_step": "s", "unset": ["tmp"], **options()}
                kinds["state_updated"] += 1
            case "wait" if flow.status is FlowStatus.RUNNING:
                later = datetime.now(UTC) + timedelta(hours=1)
                wait = chance.choice([Manual(), Timer(at=later), ExternalEvent("t", "c", deadline=later)])
                flow = yield "set_waiting", (ref(), wait), options()
                kinds["waiting"] += 1
            case "note":
                event = yield "append_event", (ref(), "note", {"x": 1}), options()
                assert event.kind == "note"
                kinds["note"] += 1
            case "step":
                observation = StepObservation(flow_id, f"run-{chance.randrange(3)}", "task", "running")
                yield "record_step_observation", (observation,), options()
                kinds["step_observed"] += 1
            case "rewrite":
                try:
                    changed = attrs.evolve(flow, state={**flow.state, "rewritten": chance.random()})
                    flow, event = yield "update_and_append", (changed, "rewritten"), {}
                    assert event.kind == "rewritten"
                    kinds["rewritten"] += 1
                except RevisionMismatch:
                    assert not quiet, "a conflict reported against one's own write"
                    flow = yield "get", (flow_id,), {}
            case "mutate":
                flow = yield (
                    "mutate",
                    (flow_id, lambda seen: attrs.evolve(seen, state={**seen.state, "m": 1})),
                    {"kind": "mutated", "retries": 1000},
                )
                kinds["mutated"] += 1

    endings = ["cancel", "request_cancel"]
    if flow.status is FlowStatus.RUNNING:
        endings += ["finish", "finish"]
    if flow.status is not FlowStatus.CREATED:
        endings += ["fail"]
    match chance.choice(endings):
        case "finish":
            flow = yield "finish", (ref(), {"summary": "done"}), options()
            kinds["finished"] += 1
        case "fail":
            flow = yield "fail", (ref(), "broken"), options()
            kinds["failed"] += 1
        case "request_cancel":
            flow = yield "request_cancel", (ref(),), options()
            kinds["cancel_requested"] += 1
            assert flow.cancel_requested
            flow = yield "cancel", (ref(),), options()
            kinds["cancelled"] += 1
        case "cancel":
            flow = yield "cancel", (ref(),), options()
            kinds["cancelled"] += 1
    assert flow.status.is_terminal
    if chance.random() < 0.1:
        assert (yield "delete", (ref(),), options()) is True
        ledger.deleted.add(flow_id)


def live(flows: FlowManager, script: Generator[Step, Any, None]) -> None:
    """Carry a life out."""
    try:
        name, args, options = next(script)
        while True:
            try:
                outcome = getattr(flows, name)(*args, **options)
            except FlowError as error:
                name, args, options = script.throw(error)
            else:
                name, args, options = script.send(outcome)
    except StopIteration:
        pass


async def live_async(flows: AsyncFlowManager, script: Generator[Step, Any, None]) -> None:
    """Carry a life out in asyncio."""
    try:
        name, args, options = next(script)
        while True:
            try:
                outcome = await getattr(flows, name)(*args, **options)
            except FlowError as error:
                name, args, options = script.throw(error)
            else:
                name, args, options = script.send(outcome)
    except StopIteration:
        pass


def audit(flows: FlowManager, ledger: Ledger) -> None:
    """Hold the trails against what was acknowledged: nothing is missing, nothing is there twice."""
    for flow_id, kinds in ledger.kinds.items():
        flow, events = flows.get(flow_id), list(flows.iter_events(flow_id))
        if flow_id in ledger.deleted:
            assert flow is None
            assert events == []
            continue
        assert flow is not None
        assert Counter(event.kind for event in events) == kinds
        revisions = [event.revision for event in events if event.kind not in ASIDE_KINDS]
        assert revisions == list(range(flow.revision + 1))
        once = events[1:] if events[1].kind == "started" and events[1].op_id == events[0].op_id else events
        assert max(Counter(event.op_id for event in once).values()) == 1
        assert flow.state["n"] == ledger.added[flow_id]
        assert flow.state.get("aside", 0) == ledger.added_aside[flow_id]


def losing_replies(chance: random.Random) -> Callable[[bool], Fault]:
    """Nearly every first reply is lost, and some of those to resends."""
    return lambda resend: CUT_REPLY if chance.random() < (0.2 if resend else 0.9) else PASS


def test_no_thread_of_a_storm_of_lost_replies_sees_a_change_missing_doubled_or_refused(
    proxy: FaultProxy, direct: FlowManager, prefix: str
) -> None:
    """A change whose reply was lost is applied once and reported as done, whoever wrote meanwhile."""
    ledger, chance = Ledger(), random.Random(1)
    storm = proxy.plan = Storm(direct, ledger, losing_replies(chance))
    lives = [life(random.Random(seed), ledger) for seed in range(125)]
    with FlowManager.from_url(proxy.url, prefix=prefix, deadline_s=120) as flows, ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(live, flows, script) for script in lives]:
            done.result()
    audit(direct, ledger)
    assert len(storm.lost) >= 1000
    assert len(storm.moved_on) >= 300


async def test_no_task_of_a_storm_of_lost_replies_sees_a_change_missing_doubled_or_refused(
    proxy: FaultProxy, direct: FlowManager, prefix: str
) -> None:
    """The same in asyncio, where a lost connection takes every call in flight with it."""
    ledger, chance = Ledger(), random.Random(2)
    storm = proxy.plan = Storm(direct, ledger, losing_replies(chance))
    at_once = asyncio.Semaphore(25)

    async def one(flows: AsyncFlowManager, seed: int) -> None:
        async with at_once:
            await live_async(flows, life(random.Random(1000 + seed), ledger))

    async with (
        AsyncFlowManager.from_url(proxy.url, prefix=prefix, deadline_s=120) as flows,
        asyncio.TaskGroup() as tasks,
    ):
        for seed in range(150):
            tasks.create_task(one(flows, seed))
    audit(direct, ledger)
    assert len(storm.lost) >= 1000
    assert len(storm.moved_on) >= 300


def mixed(chance: random.Random) -> Callable[[bool], Fault]:
    """Every kind of fault; waits for what never comes are rare, because each costs a socket timeout."""
    kinds = [CUT_REPLY] * 6 + [CUT_REQUEST] * 6 + [DROP] * 6 + [delay(0.02)] * 6 + [HANG, HANG_REPLY]
    return lambda resend: chance.choice(kinds) if chance.random() < (0.3 if resend else 0.7) else PASS


def test_cut_requests_drops_delays_and_hangs_double_nothing_in_threads(
    proxy: FaultProxy, direct: FlowManager, prefix: str
) -> None:
    """Whether the lost attempt ran or not, its resend ends in one application."""
    ledger, chance = Ledger(), random.Random(3)
    proxy.plan = Storm(direct, ledger, mixed(chance))
    url = f"{proxy.url}?socket_timeout=0.5"
    with FlowManager.from_url(url, prefix=prefix, deadline_s=120) as flows, ThreadPoolExecutor(8) as pool:
        lives = [life(random.Random(2000 + seed), ledger) for seed in range(24)]
        for done in [pool.submit(live, flows, script) for script in lives]:
            done.result()
    audit(direct, ledger)
    assert proxy.faults.keys() == {"cut_reply", "cut_request", "drop", "delay", "hang", "hang_reply"}


async def test_cut_requests_drops_delays_and_hangs_double_nothing_in_tasks(
    proxy: FaultProxy, direct: FlowManager, prefix: str
) -> None:
    """The same in asyncio."""
    ledger, chance = Ledger(), random.Random(4)
    proxy.plan = Storm(direct, ledger, mixed(chance))
    url = f"{proxy.url}?socket_timeout=0.5"
    async with AsyncFlowManager.from_url(url, prefix=prefix, deadline_s=120) as flows, asyncio.TaskGroup() as tasks:
        for seed in range(24):
            tasks.create_task(live_async(flows, life(random.Random(3000 + seed), ledger)))
    audit(direct, ledger)
    assert proxy.faults.keys() == {"cut_reply", "cut_request", "drop", "delay", "hang", "hang_reply"}
