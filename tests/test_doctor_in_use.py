"""The health check of a store that is written to meanwhile, and of one that is large."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID

import pytest

from redisflow import (
    Diagnosis,
    ExternalEvent,
    Flow,
    FlowError,
    FlowManager,
    FlowStatus,
    Manual,
    NewFlow,
    Timer,
    WaitEngine,
)
from redisflow.ops import doctor
from tests.support.patients import SOON, problems
from tests.support.servers import ENGINES, Server
from tests.support.subjects import BACKENDS, WHO, Backend, LoopThread, Servers, Subject, flow_in, observed
from tests.support.waiting import wait_until

ROOT = Path(__file__).resolve().parent.parent


# --- a store in use ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Iterator[Server]:
    """A server with few keys, which are a page."""
    with Server(ENGINES[0]) as server:
        yield server


def one(step: Any) -> Generator[Any, Any, Any]:
    """A single step of an operation, as an operation."""
    return (yield step)


def interrupted(
    flows: FlowManager, op: Generator[Any, Any, Diagnosis], at: int, act: Callable[[], object]
) -> Diagnosis | None:
    """Carry an operation out, with something else happening before its step of that number; `None` without one."""
    wanted, number = next(op), 0
    try:
        while True:
            if number == at:
                act()
            wanted, number = op.send(flows.perform(one(wanted))), number + 1
    except StopIteration as stop:
        diagnosis: Diagnosis = stop.value
        return diagnosis if number >= at else None


def recreate(flows: FlowManager, flow: Flow) -> None:
    """Delete the flow, and create another of its id for another owner."""
    flows.delete(flow)
    flows.create_mirrored(**{**WHO, "owner_session_key": "another", "flow_id": flow.id})


CHANGES: dict[str, Callable[[FlowManager, Flow], object]] = {
    "resume": lambda flows, flow: flows.resume(flow.id),
    "wait anew": lambda flows, flow: flows.set_waiting(flows.resume(flow.id), ExternalEvent("t", "2", deadline=SOON)),
    "wait for nothing": lambda flows, flow: flows.set_waiting(flows.resume(flow.id), Manual()),
    "request cancel": lambda flows, flow: flows.request_cancel(flow.id),
    "update": lambda flows, flow: flows.update_state(flow.id, {"x": 1}),
    "cancel": lambda flows, flow: flows.cancel(flow.id),
    "delete": lambda flows, flow: flows.delete(flow.id),
    "recreate": recreate,
}


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_happens_between_two_looks_raises_no_alarm(small: Server, change: str, *, repair: bool) -> None:
    """A flow changes before one single step of an examination, before each of them in turn."""
    subject = Subject(Backend.of_server(small), None)
    flows = subject.manager()
    flows.connect()
    for number in range(100):
        flow = flow_in(flows, "waiting", wait=ExternalEvent("t", "1", deadline=SOON))
        op = doctor.doctor(flows.namespace, repair=repair, quiet_after=timedelta(days=1))
        diagnosis = interrupted(flows, op, number, partial(CHANGES[change], flows, flow))
        if diagnosis is None:
            break
        assert problems(diagnosis) == []
        assert diagnosis.mended == {}
        flows.delete(flow)
    assert 8 < number < 99
    subject.close()


class Life:
    """What one of many writers does: moves at random with flows of its own and of others."""

    def __init__(self, flows: FlowManager, seed: int, halt: threading.Event) -> None:
        self.flows, self.chance, self.halt = flows, Random(seed), halt
        self.engine = WaitEngine(flows)
        self.own = [UUID(int=self.chance.getrandbits(128)) for _ in range(6)]
        self.count = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.halt.is_set():
                with suppress(FlowError):
                    self.live()
                self.count += 1
        except BaseException as error:  # noqa: BLE001 - looked at when all have ended
            self.failure = error

    def live(self) -> None:
        """Create a flow, perhaps under the id of one that was deleted and another's, move it on, perhaps delete it."""
        flows, chance = self.flows, self.chance
        who = {**WHO, "owner_session_key": f"o-{chance.randrange(5)}"}
        flow = flows.create_mirrored(**who, flow_id=chance.choice(self.own), exist_ok=True)
        moves: list[Callable[[], object]] = [
            lambda: flows.set_waiting(flow.id, Timer(at=datetime.now(UTC) + timedelta(milliseconds=20))),
            lambda: flows.set_waiting(flow.id, ExternalEvent("t", str(chance.randrange(3)), deadline=SOON)),
            lambda: flows.resume(flow.id),
            lambda: flows.update_state(flow.id, increment={"n": 1}),
            lambda: flows.record_step_observation(observed(flow.id)),
            lambda: flows.request_cancel(flow.id),
            lambda: flows.finish(flow.id),
            lambda: self.engine.resume_waiters("t", str(chance.randrange(3))),
            self.engine.tick,
            lambda: flows.delete(flow.id),
        ]
        for move in chance.choices(moves, k=6):
            with suppress(FlowError):
                move()
        if chance.random() < 0.5:
            flows.delete(flow.id)


@pytest.mark.parametrize("shell", ["sync", "asyncio"])
@pytest.mark.parametrize("backend", [name for name, engine in BACKENDS.items() if engine is not None])
def test_a_store_in_use_is_sound(servers: Servers, loop_thread: LoopThread, backend: str, shell: str) -> None:
    """Eight threads write while it is examined again and again: nothing is found, and nothing mended."""
    engine = BACKENDS[backend]
    assert engine is not None
    subject = Subject(Backend.of_server(servers.of(engine)), loop_thread if shell == "asyncio" else None)
    flows, halt = subject.manager(), threading.Event()
    lives = [Life(subject.rival(), seed, halt) for seed in range(8)]
    threads = [threading.Thread(target=life.run, daemon=True) for life in lives]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: flows.doctor().flows[FlowStatus.RUNNING] > 5, description="flows that run")
        for repair in (False, True) * 8:
            diagnosis = flows.doctor(repair=repair)
            assert problems(diagnosis) == []
            assert diagnosis.mended == {}
    finally:
        halt.set()
        for thread in threads:
            thread.join(30)
    assert [life.failure for life in lives] == [None] * 8
    assert min(life.count for life in lives) > 0
    assert problems(flows.doctor()) == []
    subject.close()


# --- a large store -------------------------------------------------------------------------------------

LARGE = 50_000
MEASURE = """
import sys, time
from pathlib import Path
from redisflow import FlowManager
with FlowManager.from_url(sys.argv[1], prefix=sys.argv[2]) as flows:
    began = time.monotonic()
    diagnosis = flows.doctor()
    assert diagnosis.severity == "ok", diagnosis
    # What RUSAGE_SELF says would be no less than what the starting process had.
    peak_kb = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    print(time.monotonic() - began, peak_kb, sum(diagnosis.flows.values()))
    for usage in diagnosis.memory:
        print(usage.kind, usage.keys, usage.bytes, usage.estimated)
"""


def measured(url: str, prefix: str) -> list[list[str]]:
    """Examine a namespace in a process of its own. Returns what it printed, in words."""
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, url, prefix], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return [line.split() for line in ran.stdout.splitlines()]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no telling how much memory a process had")
def test_a_large_store_is_examined_in_bounded_pages() -> None:
    """50,000 flows take no more memory than none, no command for long, and a time that is theirs."""
    with Server(ENGINES[0]) as server, FlowManager.from_url(server.url, prefix="large") as flows:
        for start in range(0, LARGE, 5_000):
            flows.create_many(
                [
                    NewFlow(**{**WHO, "owner_session_key": f"o-{n // 10}", "state": {"n": n, "text": "x" * 40}})
                    for n in range(start, start + 5_000)
                ]
            )
        client: Any = server.client()
        ((_, little_kb, _), *_) = measured(server.url, "empty")
        client.config_resetstat()
        (took_s, peak_kb, count), *memory = measured(server.url, "large")
        commands: Any = client.info("commandstats")
        assert int(count) == LARGE
        assert float(took_s) < 120
        assert int(peak_kb) - int(little_kb) < 20_000
        looks = {
            "scan",
            "zscan",
            "type",
            "memory|usage",
            "hgetall",
            "hmget",
            "exists",
            "zscore",
            "eval",
            "evalsha",
            "time",
        }
        assert {name.removeprefix("cmdstat_") for name in commands} >= looks
        assert "cmdstat_keys" not in commands
        assert commands["cmdstat_scan"]["calls"] > 2 * LARGE / doctor.SCAN_COUNT
        usage = {kind: (int(keys), int(size), estimated) for kind, keys, size, estimated in memory}
        assert usage["flow"][0] == usage["events"][0] == LARGE
        assert usage["flow"][2] == usage["events"][2] == usage["owner"][2] == "True"
        assert usage["status"][0::2] == (16, "False")
        (flow,) = flows.list_by_status("created", limit=1)
        partition = flows.namespace.keyspace.partition_of(flow.id)
        size = client.memory_usage(partition.flow(str(flow.id).encode()))
        assert usage["flow"][1] / LARGE == pytest.approx(size, rel=0.1)
