"""What was acknowledged survives: the end of the server, its crash, and the crash of a writer."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import attrs
import pytest
import redis

from redisflow import Flow, FlowManager, FlowStatus, Manual, StepObservation
from tests.support.servers import ENGINES, Engine, Server
from tests.support.waiting import wait_until

IDENTITY: dict[str, Any] = {"controller_id": "c", "goal": "g", "owner_session_key": "o", "requester_origin": "r"}


@pytest.fixture
def folder() -> Iterator[str]:
    """A short path: the server's socket is in it."""
    with tempfile.TemporaryDirectory(prefix="rf-", ignore_cleanup_errors=True) as folder:
        yield folder


def whole_life(flows: FlowManager, chance: random.Random) -> Flow:
    """A flow through its life, with records beside it."""
    flow = flows.create_managed(**IDENTITY, state={"n": 0})
    flow = flows.start_running(flow)
    for _ in range(chance.randrange(5)):
        flow = flows.update_state(flow, {"last": chance.random()}, increment={"n": 1}, next_step="s")
        flows.append_event(flow, "note", {"x": 1})
        flows.record_step_observation(StepObservation(flow, f"run-{chance.randrange(2)}", "task", "running"))
    if chance.random() < 0.5:
        flow = flows.resume(flows.set_waiting(flow, Manual()), {"resumed": True})
    ending: Callable[[Flow], Flow] = chance.choice([flows.finish, flows.cancel, flows.request_cancel])
    return ending(flow)


def audit(flows: FlowManager) -> list[Flow]:
    """Hold hashes, trails and indexes against each other; return the flows."""
    owned = flows.list_by_owner("o")
    by_status = {status: flows.list_by_status(status) for status in FlowStatus}
    assert Counter(flow.id for listed in by_status.values() for flow in listed) == Counter(flow.id for flow in owned)
    assert flows.count_by_status() == {status: len(listed) for status, listed in by_status.items()}
    for flow in owned:
        assert flow in by_status[flow.status]
        events = list(flows.iter_events(flow))
        made = [event for event in events if event.kind not in {"note", "step_observed"}]
        assert [event.revision for event in made] == list(range(flow.revision + 1))
        assert made[-1].op_id == flow.etag
        later = events[1:]  # a mirrored flow begins with two events of one operation
        assert len({event.op_id for event in later}) == len(later)
        assert flow.state["n"] == sum(event.kind == "state_updated" for event in events)
        assert {step.run_id for step in flows.list_steps(flow)} == {
            event.payload["run_id"] for event in events if event.kind == "step_observed"
        }
    return owned


def test_an_embedded_servers_data_is_there_the_next_time(folder: str) -> None:
    """The last user leaves, the server stops; the next one finds every flow, event and step as it was."""
    url = f"embedded://{folder}"
    with FlowManager.from_url(url) as flows:
        made = [whole_life(flows, random.Random(seed)) for seed in range(20)]
        before = {flow.id: (list(flows.iter_events(flow)), flows.list_steps(flow)) for flow in made}
    with FlowManager.from_url(url) as flows:
        assert {flow.id: flow for flow in flows.list_by_owner("o")} == {flow.id: flow for flow in made}
        assert {flow.id: (list(flows.iter_events(flow)), flows.list_steps(flow)) for flow in made} == before
        audit(flows)


@attrs.define
class Writers:
    """Threads that add to flows and keep account of what was acknowledged."""

    flows: FlowManager
    ids: list[UUID]
    stop: threading.Event = attrs.field(factory=threading.Event)
    acknowledged: Counter[UUID] = attrs.field(factory=Counter)

    def write(self, seed: int) -> None:
        chance = random.Random(seed)
        mine = self.ids[seed]
        while not self.stop.is_set():
            self.flows.update_state(mine, {"last": chance.random()}, increment={"n": 1})
            self.acknowledged[mine] += 1

    def has_acknowledged(self, changes: int) -> bool:
        """Whether that many changes were acknowledged."""
        return self.acknowledged.total() >= changes

    def keep_crashing(self, crash: Callable[[], None], *, times: int) -> None:
        """Crash the server again and again while all of them write."""
        with ThreadPoolExecutor(len(self.ids)) as threads:
            writing = [threads.submit(self.write, seed) for seed in range(len(self.ids))]
            try:
                for _ in range(times):
                    wait_until(
                        partial(self.has_acknowledged, self.acknowledged.total() + 300),
                        description="300 more acknowledged changes",
                        timeout_s=40,
                    )
                    crash()
            finally:
                self.stop.set()
        for future in writing:
            future.result()


def assert_nothing_is_lost_or_doubled(flows: FlowManager, writers: Writers) -> None:
    """Each change was acknowledged in the end, so each is there, once."""
    assert {flow.id: flow.state["n"] for flow in audit(flows)} == dict(writers.acknowledged)


def test_the_crash_of_an_embedded_server_loses_and_doubles_nothing(folder: str) -> None:
    """Killed in the middle of writing, it is started again, and the writers notice nothing but a pause."""
    with FlowManager.from_url(f"embedded://{folder}") as flows:
        writers = Writers(flows, [flows.create_mirrored(**IDENTITY, state={"n": 0}).id for _ in range(4)])
        socket_path = Path(folder) / "valkey.sock"
        writers.keep_crashing(lambda: kill_server(socket_path), times=3)
        assert_nothing_is_lost_or_doubled(flows, writers)
    with FlowManager.from_url(f"embedded://{folder}") as flows:
        assert_nothing_is_lost_or_doubled(flows, writers)


def kill_server(socket_path: Path) -> None:
    """Kill the server behind a socket, and wait until another one answers."""
    with redis.Redis(unix_socket_path=str(socket_path)) as raw:
        pid = raw.info("server")["process_id"]
        os.kill(pid, signal.SIGKILL)
        wait_until(
            lambda: raw.info("server")["process_id"] != pid,
            description="another server",
            ignoring=(redis.RedisError,),
            timeout_s=30,
        )


def tear(server: Server, flows: FlowManager) -> Flow:
    """Change a flow three times, and start the server again from a file torn inside the third."""
    flow = flows.create_mirrored(**IDENTITY, state={"n": 0})
    for _ in range(3):
        flow = flows.update_state(flow, {"x": flow.revision}, increment={"n": 1})
    server.kill()
    file = max(server.directory.rglob("*.incr.aof"), key=lambda path: path.stat().st_mtime)
    written = file.read_bytes()
    file.write_bytes(written[: written.rfind(b"HSET") + 2])
    server.start()
    return flow


def warned_of_torn_files(flows: FlowManager) -> bool:
    """Whether the doctor tells of them."""
    return any("half a change" in finding.what for finding in flows.doctor().findings)


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_the_doctor_tells_of_just_the_servers_that_keep_half_a_change(engine: Engine) -> None:
    """Of a torn file. They apply it at the start behind that which cut it off."""
    with Server(engine, "--appendfsync", "always") as server, FlowManager.from_url(server.url) as flows:
        flow = tear(server, flows)
        warned = warned_of_torn_files(flows)
        flow = flows.update_state(flow.id, increment={"n": 1})
        server.kill()
        server.start()
        assert (flows.get(flow.id) != flow) == warned
        server.raw.config_set("aof-load-truncated", "no")
        assert not warned_of_torn_files(flows)


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_a_torn_file_that_is_written_anew_loses_whole_changes(engine: Engine) -> None:
    """Torn inside the last change. Without BGREWRITEAOF, Redis 7.0 and Valkey 8.1 apply half of it a start later."""
    with Server(engine, "--appendfsync", "always") as server, FlowManager.from_url(server.url) as flows:
        flow = tear(server, flows)
        (left,) = flows.get_many([flow.id])
        assert left is not None
        assert (left.revision, left.state["n"]) == (3, 2)
        server.raw.bgrewriteaof()
        wait_until(
            lambda: server.raw.info("persistence")["aof_rewrite_in_progress"] == 0 and _bases(server) != {1},
            description="the file is written anew",
        )
        flow = flows.update_state(flow.id, increment={"n": 1})
        server.kill()
        server.start()
        assert flows.get(flow.id) == flow
        assert [event.revision for event in flows.iter_events(flow)] == [0, 1, 2, 3, 4]
        assert flow.state == {"n": 3, "x": 2}


def _bases(server: Server) -> set[int]:
    return {int(path.name.split(".")[-3]) for path in server.directory.rglob("*.base.*")}


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_the_crash_of_a_server_with_an_append_only_file_loses_and_doubles_nothing(engine: Engine) -> None:
    """On every engine: what a reply was seen for is there after `kill -9`, hash and trail agreeing."""
    with ExitStack() as stack:
        server = stack.enter_context(Server(engine, "--appendfsync", "always"))
        flows = stack.enter_context(FlowManager.from_url(server.url))
        writers = Writers(flows, [flows.create_mirrored(**IDENTITY, state={"n": 0}).id for _ in range(4)])

        def crash() -> None:
            server.kill()
            server.start()

        writers.keep_crashing(crash, times=2)
        assert_nothing_is_lost_or_doubled(flows, writers)


def live_for_ever(url: str, seed: int) -> None:
    """In a process: one whole life after another."""
    chance = random.Random(seed)
    with FlowManager.from_url(url) as flows:
        while True:
            whole_life(flows, chance)


def has_flows(flows: FlowManager, count: int) -> bool:
    """Whether there are that many flows."""
    return sum(flows.count_by_status().values()) >= count


def test_a_writer_killed_midway_leaves_no_half_written_flow() -> None:
    """Whatever it was doing, every flow has its trail and its place in the indexes."""
    spawn = multiprocessing.get_context("spawn")
    with Server(ENGINES[0]) as server, FlowManager.from_url(server.url) as flows:
        writers = [spawn.Process(target=live_for_ever, args=(server.url, seed), daemon=True) for seed in range(3)]
        for writer in writers:
            writer.start()
        try:
            for n, writer in enumerate(writers, 1):
                wait_until(
                    partial(has_flows, flows, 60 * n),
                    description="a number of flows",
                    timeout_s=60,
                )
                assert writer.pid is not None
                os.kill(writer.pid, signal.SIGKILL)
                writer.join()
        finally:
            for writer in writers:
                writer.kill()
                writer.join()
        assert len(audit(flows)) >= 180
