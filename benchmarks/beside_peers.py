"""Changes per second, beside others who record a change of state with its history.

Subject: redisflow, `update_state` with the flow it holds. Yardsticks: redis-py's WATCH/MULTI loop; the algorithm that
redisflow replaces, on SQLite; DBOS, eventsourcing and LangGraph's checkpoint savers. Each does what its own
documentation says for the same change: two keys of ten, and an entry of history. `peers/README.md` says what each
guarantees, and links to where it is documented.

Fair, because everybody runs in a process of its own, driven by the same loop (`peers/worker.py`), called the way it
is fastest: threads or tasks, tried beforehand. Because only acknowledged changes count, and each is found in the
history afterwards. And because the durability of each row is said: a SQLite file is fsynced at every commit; the
server keeps nothing unless `--aof` is given, but the rows with AOF, where redisflow fsyncs every change too ("AOF
always"). Compare durable rows with durable rows.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import attrs

from benchmarks.measure import Plan, Row, compare, interleaved
from benchmarks.modules import serving_modules
from benchmarks.peers.process import Load, Worker, peers_python, working
from benchmarks.server import Server, serving

_MANY = 64
_MANY_CALLERS = f"{_MANY} callers, a flow each"
_FSYNCS = 50
_OURS = Path(sys.executable)
_SYNC, _ASYNC = "redisflow_sync:Redisflow", "redisflow_async:Redisflow"
# Everybody has the same time; the counts only bound what is stored.
_ONE = Load(callers=1, changes=40_000, limit_s=1.0)
_EACH = Load(callers=_MANY, changes=1_000, limit_s=1.0)
_SHARED = attrs.evolve(_EACH, shared=True)


@attrs.frozen
class Pair:
    """Who is compared with whom in a row, and its target."""

    name: str
    subject: Worker
    yardstick_name: str
    yardstick: Worker
    at_least: float | None = None


@attrs.frozen
class Arena:
    """Where the contestants are started, each in a folder of its own; they end with the stack."""

    stack: ExitStack
    folder: Path
    python: Path
    server: Server
    plan: Plan

    def ours(self, contestant: str, server: Server | None = None) -> Worker:
        """Start redisflow, with our interpreter."""
        return self._start(_OURS, contestant, server or self.server)

    def peer(self, contestant: str, server: Server | None = None) -> Worker:
        """Start a peer, with its interpreter."""
        return self._start(self.python, contestant, server or self.server)

    def _start(self, python: Path, contestant: str, server: Server) -> Worker:
        folder = self.folder / f"{len(list(self.folder.iterdir()))}-{contestant.replace(':', '-')}"
        return self.stack.enter_context(working(python, contestant, folder, server.url))

    def rows(self, load: Load, pairs: Sequence[Pair]) -> Iterator[Row]:
        """Measure all who are in these rows under the same load, in turns."""
        if self.plan.quick:
            load = attrs.evolve(load, limit_s=load.limit_s / 5)
        workers = list(dict.fromkeys(worker for pair in pairs for worker in (pair.subject, pair.yardstick)))
        before = [attrs.evolve(worker) for worker in workers]
        rounds = interleaved(self.plan.repeats, *(partial(worker.rate, load) for worker in workers))
        for pair in pairs:
            subject, yardstick = workers.index(pair.subject), workers.index(pair.yardstick)
            yield compare(
                pair.name,
                pair.yardstick_name + _gave_up(pair.yardstick, before[yardstick]),
                [(rates[subject], rates[yardstick]) for rates in rounds],
                unit="changes/s",
                at_least=pair.at_least,
            )


def run(server: Server, plan: Plan) -> Iterator[Row]:
    """Measure the rows."""
    python = peers_python()
    if python is None:
        _note("skipped: the peers have no environment; `make .venv-peers/.ready` makes it")
        return
    with server.client() as client:
        client.flushall()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rfp-")))
        _note(f"an fsync in the folder of the SQLite files takes {1e6 * _fsync_s(folder):,.0f} µs")
        arena = Arena(stack, folder, python, server, plan)
        yield from _beside_all(arena)
        yield from _beside_langgraph_redis(arena)


def _beside_all(arena: Arena) -> Iterator[Row]:
    always = arena.stack.enter_context(serving(arena.server.program, aof=True, fsync="always"))
    everysec = arena.stack.enter_context(serving(arena.server.program, aof=True, fsync="everysec"))
    watch_threads, watch_tasks = arena.peer("watch_multi:Threads"), arena.peer("watch_multi:Tasks")
    in_memory = arena.peer("reference_sqlite:InMemory")
    files = {
        "reference": arena.peer("reference_sqlite:OnFile"),
        "DBOS": arena.peer("dbos_sqlite:Dbos"),
        "eventsourcing": arena.peer("eventsourcing_sqlite:Eventsourcing"),
        "LangGraph": arena.peer("langgraph_sqlite:Threads"),
    }
    for each in (watch_threads, *files.values()):
        _note(each.about)

    tasks = arena.ours(_ASYNC)
    name = f"{_MANY} writers, 1 flow"
    yield from arena.rows(
        _SHARED,
        [
            Pair(name, tasks, "WATCH/MULTI", watch_threads, 10.0),
            Pair(name, tasks, "reference, SQLite in memory", in_memory),
            Pair(name, tasks, "reference, SQLite file", files["reference"]),
        ],
    )
    for name, load, contestant, watch, dbos_at_least in (
        ("1 caller", _ONE, _SYNC, watch_threads, None),
        (_MANY_CALLERS, _EACH, _ASYNC, watch_tasks, 20.0),
    ):
        ours, kept, kept_soon = (arena.ours(contestant, server) for server in (arena.server, always, everysec))
        targets = {"DBOS": dbos_at_least}
        yield from arena.rows(
            load,
            [
                Pair(name, ours, "WATCH/MULTI", watch),
                Pair(name, ours, "reference, SQLite in memory", in_memory),
                *(Pair(name, ours, f"{peer}, SQLite file", files[peer], targets.get(peer)) for peer in files),
                *(Pair(f"{name}, AOF always", kept, f"{peer}, SQLite file", files[peer]) for peer in files),
                Pair(f"{name}, AOF every second", kept_soon, "reference, SQLite file", files["reference"]),
            ],
        )


def _beside_langgraph_redis(arena: Arena) -> Iterator[Row]:
    found = arena.stack.enter_context(serving_modules(arena.server, arena.python))
    if isinstance(found, str):
        _note(f"no row beside LangGraph on Redis: {found}. Give `--engine` the path of a Redis 8 to have one.")
        return
    saver, graph = arena.peer("langgraph_redis:Threads", found), arena.peer("langgraph_redis:Graph", found)
    _note(f"{graph.about}, and redisflow beside it: on {found.name}")
    for name, load, contestant, at_least in (("1 caller", _ONE, _SYNC, 5.0), (_MANY_CALLERS, _EACH, _ASYNC, 20.0)):
        ours = arena.ours(contestant, found)
        yield from arena.rows(
            load,
            [
                Pair(name, ours, "LangGraph, Redis, put", saver, at_least),
                Pair(name, ours, "LangGraph, Redis, update_state", graph),
            ],
        )


def _gave_up(worker: Worker, before: Worker) -> str:
    """The share of changes that were refused since, for whoever gives up; only the others are in the rate."""
    changes, refused = worker.changes - before.changes, worker.refused - before.refused
    return f", {refused / (changes + refused):.0%} refused" if refused else ""


def _fsync_s(folder: Path) -> float:
    """The time of a write and its fsync: what durability costs on this disk. On some it costs next to nothing."""
    with (folder / "fsync").open("wb") as file:
        began = time.perf_counter()
        for _ in range(_FSYNCS):
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
        return (time.perf_counter() - began) / _FSYNCS


def _note(text: str) -> None:
    print(f"beside peers: {text}")
