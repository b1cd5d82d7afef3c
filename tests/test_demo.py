"""The demo as a real process, and its verification, which must be able to fail."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID, uuid4

import attrs
import pytest
from rich.console import Console

from redisflow import FlowManager, FlowStatus, StorageError
from redisflow.demo import crew as crew_module
from redisflow.demo import worker as worker_module
from redisflow.demo.crew import Crew, CrewFailed
from redisflow.demo.helpers import recount
from redisflow.demo.plan import OWNER, Plan, Route
from redisflow.demo.screen import screen_for
from redisflow.demo.sources import COUNTERS, Unreadable, count_file, find_sources
from redisflow.demo.verify import Outcome, verify
from redisflow.demo.worker import Worker
from tests.support.servers import ENGINES, Server
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import redis

    from redisflow import Flow

ROOT = Path(__file__).resolve().parent.parent
MINUTE_S = 60.0
FILES, BROKEN = 40, 4
SNIPPET = """
import os


class Counted:
    def method(self, items):
        try:
            for item in items:
                print(item)
        except OSError:
            return [item for item in items if item or os.sep]
        return []


"""


def _write_tree(root: Path, files: int = FILES) -> Path:
    for number in range(files):
        package = root / f"package_{number % 5}"
        package.mkdir(parents=True, exist_ok=True)
        (package / f"module_{number}.py").write_text(SNIPPET * (1 + number % 7))
    for number in range(BROKEN):
        (root / "package_0" / f"broken_{number}.py").write_text("def broken(:\n")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "unseen.py").write_text("unseen = True\n")
    os.mkfifo(root / "blocks.py")
    return root


def _demo(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "redisflow", *args],
        env={**os.environ, "PYTHONPATH": str(ROOT), "REDISFLOW_URL": "redis://127.0.0.1:1/0"},
        capture_output=True,
        text=True,
        timeout=2 * MINUTE_S,
        check=False,
    )


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One server for the module; every test has a namespace of its own."""
    with Server(ENGINES[0]) as server:
        yield server


# --- as a process --------------------------------------------------------------------------------------


def test_the_demo_ends_with_a_table_and_nothing_off(tmp_path: Path) -> None:
    """Exit code 0: a worker was killed, its flows were taken over, and everything adds up."""
    tree = _write_tree(tmp_path / "tree")
    ran = _demo("demo", str(tree))
    assert ran.returncode == 0, ran.stderr
    figures = dict(re.findall(r"^ *(\S.*?) {2,}([\d,.]+)", ran.stdout, re.MULTILINE))
    assert figures["files"] == str(FILES + BROKEN)
    assert int(figures["takeovers"]) >= 1
    assert int(figures["reviews"]) >= 1
    assert int(figures["timers"]) >= 1
    assert 1 <= int(figures["failed"]) <= BROKEN  # a few flows are cancelled, of any file
    assert sum(int(figures[status]) for status in ("finished", "failed", "cancelled")) == FILES + BROKEN
    assert int(figures["cancels"]) == int(figures["cancelled"]) >= 1
    assert "nothing is off" in ran.stdout
    assert re.search(r"worker-\d killed with SIGKILL, [234] flows in its hands", ran.stderr)
    assert "\x1b" not in ran.stdout + ran.stderr


def test_the_demo_on_a_given_server_can_keep_its_flows(tmp_path: Path, server: Server) -> None:
    """--url says where, --keep leaves the flows, and a second run there is refused."""
    tree = _write_tree(tmp_path / "tree", 20)
    prefix = f"kept-{uuid4().hex[:8]}"
    where = ["--url", server.url, "--prefix", prefix, "demo", str(tree), "--json"]
    ran = _demo(*where, "--keep")
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report["problems"] == []
    assert set(report["totals"]) == set(COUNTERS)
    with FlowManager.from_url(server.url, prefix=f"{prefix}-demo") as flows:
        counts = flows.count_by_status()
        assert {status: count for status, count in counts.items() if status.is_terminal} == report["statuses"]
        assert sum(counts.values()) == 20 + BROKEN
    again = _demo(*where)
    assert again.returncode == 2
    assert "has flows already" in again.stderr


def test_the_demo_fails_where_something_is_off(tmp_path: Path, server: Server) -> None:
    """Exit code 5, what is off, and where the flows can be looked at: here one that somebody tampered with."""
    tree = _write_tree(tmp_path / "tree", 8)
    prefix = f"off-{uuid4().hex[:8]}"
    with FlowManager.from_url(server.url, prefix=f"{prefix}-demo") as flows:

        def tamper() -> None:
            (flow,) = wait_until(
                lambda: flows.list_by_status(FlowStatus.FINISHED, limit=1), description="one ends", timeout_s=MINUTE_S
            )
            (key,) = server.client().keys(f"*flow:{flow.id}")
            server.client().hincrby(key, "s:lines", 1)

        tampering = threading.Thread(target=tamper)
        tampering.start()
        ran = _demo("--url", server.url, "--prefix", prefix, "demo", str(tree))
        tampering.join()
        assert ran.returncode == 5
        assert "2 problems" in ran.stdout  # the flow, and the total it is in
        assert re.search(r"Error: flow \S+ counted .*, the recount ", ran.stderr)
        assert f"redisflow --url {server.url} --prefix {prefix}-demo list" in ran.stderr
        assert sum(flows.count_by_status().values()) == 8 + BROKEN


def test_the_demo_leaves_a_given_server_as_it_was(tmp_path: Path, server: Server) -> None:
    """Without --keep only the namespace's own record stays, and for an hour the tombstones of its flows."""
    tree = _write_tree(tmp_path / "tree", 8)
    prefix = f"gone-{uuid4().hex[:8]}"
    ran = _demo("--url", server.url, "--prefix", prefix, "demo", str(tree))
    assert ran.returncode == 0, ran.stderr
    client = server.client()
    left = {key for key in client.keys(f"*{prefix}*") if b":flow:" not in key or not client.hexists(key, "gone")}
    assert left == {f"{prefix}-demo:meta".encode()}


def test_a_tree_too_small_to_disturb_is_refused(tmp_path: Path) -> None:
    """Exit code 2 and the reason."""
    (tmp_path / "only.py").write_text("pass\n")
    ran = _demo("demo", str(tmp_path))
    assert ran.returncode == 2
    assert "has 1 Python files; the demo needs 8" in ran.stderr


# --- the input -----------------------------------------------------------------------------------------


def test_every_file_gets_a_route(tmp_path: Path) -> None:
    """Hidden folders and what is no regular file are left out; the largest files are reviewed."""
    tree = _write_tree(tmp_path / "tree")
    sizes = {source.path: source.size for source in find_sources(tree)}
    assert len(sizes) == FILES + BROKEN
    plan = Plan.of(tree, 1000)
    assert plan.routes.keys() == sizes.keys()
    assert all(plan.of_route(route) for route in Route)
    reviewed = [path for path, route in plan.routes.items() if route is Route.REVIEW]
    assert {sizes[path] for path in reviewed} == {max(sizes.values())}
    some = Plan.of(tree, 10)
    assert (len(some.routes), some.found) == (10, FILES + BROKEN)


def test_a_file_is_counted_as_its_author_would(tmp_path: Path) -> None:
    """Lines, functions, classes, branches and imports; a file that does not parse says why."""
    (tmp_path / "counted.py").write_text(SNIPPET)
    counts = {"lines": 14, "statements": 8, "functions": 1, "classes": 1, "branches": 2, "imports": 1}
    assert count_file(tmp_path, "counted.py") == counts
    (tmp_path / "no_newline.py").write_text("pass\npass")
    assert count_file(tmp_path, "no_newline.py")["lines"] == 2
    for source, reason in (
        (b"def broken(:", "SyntaxError"),
        (b"\0", "SyntaxError|ValueError"),
        (b"\xff", "SyntaxError"),
    ):
        (tmp_path / "broken.py").write_bytes(source)
        with pytest.raises(Unreadable, match=reason):
            count_file(tmp_path, "broken.py")
    with pytest.raises(Unreadable, match="FileNotFoundError"):
        count_file(tmp_path, "gone.py")


def test_a_name_no_flow_can_carry_is_left_out(tmp_path: Path) -> None:
    """File names are bytes; a state has text."""
    (tmp_path / "fine.py").touch()
    (tmp_path / os.fsdecode(b"\xff.py")).touch()
    (tmp_path / "dangling.py").symlink_to("nowhere")
    assert [source.path for source in find_sources(tmp_path)] == ["fine.py"]


def test_a_terminal_gets_a_bar_for_each_status() -> None:
    """And lines above the bars for what happens."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=80)
    with screen_for(console, 3) as screen:
        screen.say("worker-1 killed")
        screen.update(dict.fromkeys(FlowStatus, 1))
    shown = output.getvalue()
    assert "worker-1 killed" in shown
    assert all(status in shown for status in FlowStatus)
    assert "1/3" in shown


# --- a worker ------------------------------------------------------------------------------------------


@attrs.frozen
class Scene:
    """A few flows over a small tree, and what a verification needs."""

    flows: FlowManager
    client: redis.Redis
    root: Path
    ids: list[UUID]
    prefix: str

    def worker(self, name: str) -> Worker:
        return Worker(self.flows, self.root, name)

    def flow(self, number: int = 0) -> Flow:
        flow = self.flows.get(self.ids[number])
        assert flow is not None
        return flow

    def work_off(self, worker: Worker) -> None:
        while batch := worker.claim():
            for flow in batch:
                worker.advance(flow)

    def problems(self, victim: str | None = "worker-2") -> list[str]:
        paths = [source.path for source in find_sources(self.root)]
        counted = recount(threading.Event(), str(self.root), paths)
        return verify(self.flows, self.ids, Outcome.read(self.flows, self.ids, counted), victim)

    def key(self, part: str) -> bytes:
        (key,) = self.client.keys(f"*{self.prefix}*{part}")
        return cast("bytes", key)

    def entries(self, stream: bytes) -> Any:
        return self.client.xrange(stream)


@pytest.fixture
def scene(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """Four flows; a worker that finds one running takes it for abandoned at once."""
    monkeypatch.setattr(worker_module, "QUIET", -worker_module.PAUSE)
    monkeypatch.setattr(worker_module, "_QUIET_LOOKS_EVERY_S", 0)
    for number in range(4):
        (tmp_path / f"module_{number}.py").write_text(SNIPPET * (number + 1))
    client = server.client()
    prefix = f"scene-{uuid4().hex[:12]}"
    with FlowManager.from_url(server.url, prefix=prefix, partitions=1) as flows:
        ids = []
        for source in find_sources(tmp_path):
            state = {"path": source.path, "route": Route.DIRECT, "worker": None, **dict.fromkeys(COUNTERS, 0)}
            flow = flows.create_managed(
                controller_id="demo",
                goal=f"count {source.path}",
                owner_session_key=OWNER,
                requester_origin="test",
                current_step="read",
                state=state,
            )
            ids.append(flow.id)
        yield Scene(flows, client, tmp_path, ids, prefix)


def test_a_flow_is_taken_over_where_it_stood_and_nothing_counts_twice(scene: Scene) -> None:
    """The lines counted by the lost worker stay; the loser's next change is refused and it lets go."""
    lost, heir = scene.worker("worker-2"), scene.worker("worker-1")
    (held, *rest) = lost.claim()
    for flow in rest:
        lost.advance(flow)
    half_done = lost._step(held)
    assert half_done is not None
    scene.work_off(heir)
    lost.advance(half_done)
    assert scene.problems() == []
    (taken,) = [flow for flow in map(scene.flow, range(4)) if flow.id == held.id]
    assert taken.status is FlowStatus.FINISHED
    assert (taken.state["finished_by"], taken.state["taken_from"]) == ("worker-1", "worker-2")


@pytest.mark.parametrize("steps", range(4))
def test_a_takeover_is_right_at_every_step(scene: Scene, steps: int) -> None:
    """Whatever step the lost worker came to, the totals are those of one process."""
    held: Flow | None = scene.worker("worker-2").claim()[0]
    lost = scene.worker("worker-2")
    for _ in range(steps):
        assert held is not None
        held = lost._step(held)
    scene.work_off(scene.worker("worker-1"))
    assert scene.problems() == []


def test_a_requested_cancel_is_noticed_by_whoever_holds_the_flow(scene: Scene) -> None:
    """Before its start, in hand, and when a takeover comes too late."""
    scene.flows.request_cancel(scene.ids[0])
    worker = scene.worker("worker-2")
    batch = worker.claim()
    assert scene.flow(0).status is FlowStatus.CANCELLED or scene.ids[0] not in {flow.id for flow in batch}
    scene.flows.request_cancel(batch[0])
    worker.advance(batch[0])
    ended = scene.flows.get(batch[0].id)
    assert ended is not None
    assert ended.status is FlowStatus.CANCELLED
    scene.work_off(scene.worker("worker-1"))
    assert scene.problems() == []


# --- the verification can fail -------------------------------------------------------------------------


def _drop_from_status(scene: Scene) -> None:
    scene.client.zrem(scene.key(":status:finished"), str(scene.ids[0]))


def _list_under_another_status(scene: Scene) -> None:
    (prefix,) = {scene.key(":status:finished").removesuffix(b"finished")}
    scene.client.zadd(prefix + b"running", {str(scene.ids[0]): 1})


def _drop_from_owner(scene: Scene) -> None:
    scene.client.zrem(scene.key(f":owner:{OWNER}"), str(scene.ids[0]))


def _add_to_owner(scene: Scene) -> None:
    other = scene.flows.create_managed(
        controller_id="x", goal="x", owner_session_key=OWNER, requester_origin="x", current_step="x"
    )
    scene.flows.cancel(other)


def _delete_an_event(scene: Scene) -> None:
    stream = scene.key(f":events:{scene.ids[0]}")
    scene.client.xdel(stream, scene.entries(stream)[2][0])


def _repeat_an_event(scene: Scene) -> None:
    stream = scene.key(f":events:{scene.ids[0]}")
    scene.client.xadd(stream, scene.entries(stream)[-1][1])


def _lose_the_last_event(scene: Scene) -> None:
    stream = scene.key(f":events:{scene.ids[0]}")
    scene.client.xdel(stream, scene.entries(stream)[-1][0])


def _count_one_more(scene: Scene) -> None:
    scene.client.hincrby(scene.key(f":flow:{scene.ids[0]}"), "s:lines", 1)


def _revive(scene: Scene) -> None:
    scene.client.hset(scene.key(f":flow:{scene.ids[0]}"), "status", "running")


def _forget_the_cancel(scene: Scene) -> None:
    scene.client.hset(scene.key(f":flow:{scene.ids[0]}"), "cancel_requested", "1")


def _swap_the_file(scene: Scene) -> None:
    (scene.root / scene.flow().state["path"]).write_text("def broken(:")


def _fail_it(scene: Scene) -> None:
    state = scene.flow().state
    flow = scene.flows.create_managed(
        controller_id="x", goal="x", owner_session_key=OWNER, requester_origin="x", current_step="x", state=state
    )
    scene.flows.fail(scene.flows.start_running(flow), "no reason")
    scene.ids.append(flow.id)


def _leave_a_review_out(scene: Scene) -> None:
    scene.client.hset(scene.key(f":flow:{scene.ids[0]}"), "s:route", b"\xa6review")


def _delete_the_flow(scene: Scene) -> None:
    scene.flows.delete(scene.ids[0])


def _leave_something_due(scene: Scene) -> None:
    finished = scene.key(":status:finished")
    scene.client.zadd(finished.replace(b":status:finished", b":due"), {str(scene.ids[0]): 1})


@pytest.mark.parametrize(
    ("tamper", "problem"),
    [
        (_drop_from_status, "is missing from the index of status finished"),
        (_list_under_another_status, "the index of status running counts 1 flows, there are 0"),
        (_drop_from_owner, f"is missing from the index of owner {OWNER}"),
        (_add_to_owner, f"does not belong in the index of owner {OWNER}"),
        (_delete_an_event, "has state_updated at revision 3 where 2 belongs"),
        (_repeat_an_event, "twice, the second time as finished"),
        (_lose_the_last_event, "its trail leads to running"),
        (_count_one_more, "counted {'lines': 15"),
        (_count_one_more, "the finished flows have 141 lines, the recount 140"),
        (_revive, "is still running"),
        (_forget_the_cancel, "is finished, its cancel was requested"),
        (_swap_the_file, "which cannot be counted"),
        (_fail_it, "failed on module_0.py: no reason"),
        (_leave_a_review_out, "has reviews [], not one that succeeded"),
        (_delete_the_flow, "is gone"),
        (_leave_something_due, "an engine still finds 1 flows due"),
    ],
)
def test_the_verification_finds(scene: Scene, tamper: Callable[[Scene], None], problem: str) -> None:
    """Every kind of damage is named."""
    scene.worker("worker-2").claim()
    scene.work_off(scene.worker("worker-1"))
    assert scene.problems() == []
    tamper(scene)
    assert any(problem in line for line in scene.problems()), scene.problems()


def test_the_verification_wants_a_takeover(scene: Scene) -> None:
    """A run in which nobody took over from the killed worker proved nothing."""
    scene.work_off(scene.worker("worker-1"))
    assert scene.problems() == ["no flow of worker-2 was taken over"]
    assert scene.problems(victim=None) == ["no worker was killed"]


# --- the crew ------------------------------------------------------------------------------------------


def _ends_early(stop: threading.Event, code: int) -> None:
    sys.exit(code)


def _waits(stop: threading.Event, started: Path) -> str:
    started.touch()
    stop.wait()
    return "stopped"


def test_a_process_that_ends_early_fails_the_run(tmp_path: Path) -> None:
    """The coordinator does not wait for one that is gone."""
    with Crew() as crew:
        crew.start("waits", _waits, tmp_path / "started")
        crew.check()
        member = crew.start("ends", _ends_early, 3)
        member.process.join(MINUTE_S)
        with pytest.raises(CrewFailed, match="ends ended with exit code 3"):
            crew.check()


def test_leaving_the_crew_ends_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed line is the signal to stop; who does not hear it is killed."""
    with Crew() as crew:
        members = [crew.start(name, _waits, tmp_path / name) for name in ("waits", "paused")]
        started = [tmp_path / "waits", tmp_path / "paused"]
        wait_until(lambda: all(map(Path.exists, started)), description="both run", timeout_s=MINUTE_S)
        crew.pause("paused")
        crew.members["paused"].line.close()
        members[0].line.close()
        members[0].process.join(MINUTE_S)
        monkeypatch.setattr(crew_module, "_STOP_WITHIN_S", 0.2)
    assert [member.process.exitcode for member in members] == [0, -signal.SIGKILL]


def _cannot_reach(stop: threading.Event) -> None:
    raise StorageError("the server is gone")


def test_what_a_process_could_not_do_is_told() -> None:
    """The library's errors cross the line; no traceback is printed."""
    with Crew() as crew:
        member = crew.start("worker-1", _cannot_reach)
        with pytest.raises(CrewFailed, match="worker-1: the server is gone"):
            member.receive()
