"""Many processes, threads and tasks on the same flows: no change is lost, each prize has one winner."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import attrs
import pytest
import redis

from redisflow import (
    AsyncFlowManager,
    ExternalEvent,
    FlowExists,
    FlowManager,
    FlowStatus,
    IllegalTransition,
    RevisionMismatch,
    Timer,
    WaitEngine,
)
from tests.support.servers import ENGINES, Server
from tests.support.waiting import wait_until

PROCESSES = 8
IDENTITY: dict[str, Any] = {"controller_id": "c", "goal": "g", "owner_session_key": "o", "requester_origin": "r"}
Job = Callable[[FlowManager, Any], Any]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One server for the module."""
    with Server(ENGINES[0]) as server:
        yield server


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """Processes of their own: nothing is shared with them but the server."""
    with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture
def prefix() -> str:
    """A namespace of the test's own."""
    return f"t{uuid4().hex}"


@pytest.fixture
def flows(server: Server, prefix: str) -> Iterator[FlowManager]:
    """The test's own manager."""
    with FlowManager.from_url(server.url, prefix=prefix) as flows:
        yield flows


def at_once(url: str, prefix: str, job: Job, work: Any) -> Any:
    """In a process: do the job when all the others are ready to."""
    with redis.Redis.from_url(url) as raw, FlowManager.from_url(url, prefix=prefix) as flows:
        raw.incr(f"{prefix}:ready")
        wait_until(
            lambda: int(raw.get(f"{prefix}:ready") or 0) == PROCESSES,
            description="the other processes",
            timeout_s=60,
        )
        return job(flows, work)


def race(pool: ProcessPoolExecutor, server: Server, prefix: str, job: Job, work: Any) -> list[Any]:
    """Do a job in every process at once."""
    started = [pool.submit(at_once, server.url, prefix, job, work) for _ in range(PROCESSES)]
    return [job.result(timeout=100) for job in started]


def add_two_hundred(flows: FlowManager, flow_id: UUID) -> None:
    """Add 1 two hundred times, by id and by the copy held."""
    flow = flows.get(flow_id)
    for n in range(200):
        held = flow if n % 2 else flow_id
        assert held is not None
        flow = flows.update_state(held, increment={"n": 1})


def test_increments_from_many_processes_lose_none(
    pool: ProcessPoolExecutor, server: Server, flows: FlowManager, prefix: str
) -> None:
    """No revision, no retry, no conflict: the server adds."""
    flow = flows.create_mirrored(**IDENTITY, state={"n": 0})
    race(pool, server, prefix, add_two_hundred, flow.id)
    after = flows.get(flow)
    assert after is not None
    assert after.state == {"n": 200 * PROCESSES}
    assert after.revision == 1 + 200 * PROCESSES
    assert [event.revision for event in flows.iter_events(flow)] == list(range(after.revision + 1))


def claim(flows: FlowManager, claims: list[tuple[UUID, int]]) -> list[UUID]:
    """Claim flows by revision; return those won."""
    won = []
    for flow_id, revision in claims:
        try:
            flows.update_state(flow_id, {"owner": "me"}, expected_revision=revision)
        except RevisionMismatch as late:
            if late.actual != revision + 1:
                raise
        else:
            won.append(flow_id)
    return won


def start(flows: FlowManager, flow_ids: list[UUID]) -> list[UUID]:
    """Start flows; return those this process started."""
    won = []
    for flow_id in flow_ids:
        try:
            flows.start_running(flow_id)
        except IllegalTransition as late:
            if (late.source, late.target) != (FlowStatus.RUNNING, FlowStatus.RUNNING):
                raise
        else:
            won.append(flow_id)
    return won


def create(flows: FlowManager, flow_ids: list[UUID]) -> list[UUID]:
    """Create flows of those ids; return those this process created."""
    won = []
    for flow_id in flow_ids:
        try:
            flows.create_managed(**IDENTITY, flow_id=flow_id)
        except FlowExists:
            assert flows.create_managed(**IDENTITY, flow_id=flow_id, exist_ok=True).id == flow_id
        else:
            won.append(flow_id)
    return won


def answer(flows: FlowManager, flow_ids: list[UUID]) -> list[UUID]:
    """Give flows the event they wait for; return those this process resumed."""
    engine = WaitEngine(flows)
    return [flow_id for flow_id in flow_ids if engine.try_resume_external(flow_id, "t", "c", {"x": 1}) is not None]


def test_a_claim_by_revision_has_one_winner(
    pool: ProcessPoolExecutor, server: Server, flows: FlowManager, prefix: str
) -> None:
    """`expected_revision` lets one through, and tells the others what they met."""
    claims = [(flow.id, flow.revision) for flow in (flows.create_mirrored(**IDENTITY) for _ in range(100))]
    winners = Counter(flow_id for won in race(pool, server, prefix, claim, claims) for flow_id in won)
    assert winners == Counter(flow_id for flow_id, _ in claims)


@pytest.mark.parametrize(("job", "kind"), [(start, "started"), (answer, "resumed")])
def test_a_transition_has_one_winner(
    pool: ProcessPoolExecutor, server: Server, flows: FlowManager, prefix: str, *, job: Job, kind: str
) -> None:
    """Without any revision the lifecycle itself lets one through."""
    made = [flows.create_managed(**IDENTITY) for _ in range(100)]
    if job is answer:
        made = [flows.set_waiting(flows.start_running(flow), ExternalEvent("t", "c")) for flow in made]
    ids = [flow.id for flow in made]
    winners = Counter(flow_id for won in race(pool, server, prefix, job, ids) for flow_id in won)
    assert winners == Counter(ids)
    for flow in made:
        assert [event.kind for event in flows.iter_events(flow)].count(kind) == 1


def test_an_id_is_created_once(pool: ProcessPoolExecutor, server: Server, flows: FlowManager, prefix: str) -> None:
    """One creator wins; the others get `FlowExists`, or with `exist_ok` the flow."""
    ids = [uuid4() for _ in range(100)]
    winners = Counter(flow_id for won in race(pool, server, prefix, create, ids) for flow_id in won)
    assert winners == Counter(ids)
    assert {flow.id for flow in flows.list_by_owner("o")} == set(ids)
    for flow_id in ids:
        assert [event.kind for event in flows.iter_events(flow_id)] == ["created"]


def run_engine(flows: FlowManager, _: None) -> tuple[int, int]:
    """Tick until nothing waits; return how many were resumed and cancelled."""
    resumed = cancelled = 0
    while True:
        report = WaitEngine(flows).tick()
        assert report.errors == 0
        resumed, cancelled = resumed + report.resumed, cancelled + report.cancelled
        if report.still_waiting == 0:
            return resumed, cancelled


def test_any_number_of_engines_end_each_wait_once(
    pool: ProcessPoolExecutor, server: Server, flows: FlowManager, prefix: str
) -> None:
    """Each due flow is resumed, each unwanted one cancelled, by just one engine; the reports add up."""
    past = datetime.now(UTC) - timedelta(hours=1)
    made = [flows.set_waiting(flows.create_mirrored(**IDENTITY), Timer(at=past)) for _ in range(300)]
    unwanted = {flows.request_cancel(flow).id for flow in made[::10]}
    reports = race(pool, server, prefix, run_engine, None)
    assert sum(resumed for resumed, _ in reports) == 270
    assert sum(cancelled for _, cancelled in reports) == 30
    for flow in made:
        kinds = Counter(event.kind for event in flows.iter_events(flow))
        assert (kinds["resumed"], kinds["cancelled"]) == ((0, 1) if flow.id in unwanted else (1, 0))


def test_sixty_four_threads_update_one_flow_without_a_failure(flows: FlowManager) -> None:
    """More threads than connections: each waits its turn."""
    flow = flows.create_mirrored(**IDENTITY, state={"n": 0})

    def work(_: int) -> None:
        for _ in range(15):
            flows.update_state(flow, increment={"n": 1})

    with ThreadPoolExecutor(64) as threads:
        list(threads.map(work, range(64)))
    after = flows.get(flow)
    assert after is not None
    assert after.state == {"n": 64 * 15}


async def test_sixty_four_tasks_update_one_flow_without_a_failure(server: Server, prefix: str) -> None:
    """The same in asyncio."""
    async with AsyncFlowManager.from_url(server.url, prefix=prefix) as flows:
        flow = await flows.create_mirrored(**IDENTITY, state={"n": 0})

        async def work() -> None:
            for _ in range(15):
                await flows.update_state(flow, increment={"n": 1})

        await asyncio.gather(*(work() for _ in range(64)))
        after = await flows.get(flow)
        assert after is not None
        assert after.state == {"n": 64 * 15}


def test_rewrites_from_many_threads_lose_none(flows: FlowManager) -> None:
    """`mutate` reads and writes again when another writer won; every acknowledged change is there."""
    flow = flows.create_mirrored(**IDENTITY, state={"n": 0})

    def work(_: int) -> None:
        for _ in range(10):
            flows.mutate(
                flow.id, lambda seen: attrs.evolve(seen, state={"n": seen.state["n"] + 1}), kind="added", retries=10_000
            )

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    after = flows.get(flow)
    assert after is not None
    assert after.state == {"n": 80}
    assert after.revision == 81
