"""A process that holds one contestant: `python -m benchmarks.peers.worker MODULE:CLASS FOLDER REDIS_URL`.

It says `{"about": …}` when it is open. Then each line it reads is a load, and each line it writes what came of it:

    {"callers": 64, "changes": 50, "shared": false, "limit_s": 1.0}
    {"changes": 3200, "refused": 0, "seconds": 0.61}

It ends when its input does.

The loop is the same for everybody: a record for each caller, or one for all; every caller makes its changes one after
the other, and begins none after `limit_s`. The clock runs from the moment all callers are ready until the last one is
done. Then everything is read back: a record whose history does not hold exactly the acknowledged changes, or whose
state is not the last one, is an error, so nobody is measured doing nothing.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any, NamedTuple, TextIO

from benchmarks.peers.contract import STATE, Stored, TasksPeer, ThreadsPeer, patch_of

_READY_WITHIN_S = 60.0


class Load(NamedTuple):
    """What to do: `changes` by each of the callers, to one record or to a record each, begun within `limit_s`."""

    callers: int
    changes: int
    shared: bool
    limit_s: float

    def record_of(self, caller: int) -> int:
        return 0 if self.shared else caller

    @property
    def records(self) -> int:
        return 1 if self.shared else self.callers

    def numbers(self, began: float) -> Iterator[int]:
        """The numbers of one caller's changes, until the time is up."""
        for number in range(1, self.changes + 1):
            if time.perf_counter() - began > self.limit_s:
                return
            yield number


class Done(NamedTuple):
    """What one caller did: acknowledged changes, refused ones, the last number acknowledged, when it ended."""

    changes: int
    refused: int
    last: int
    ended: float


def by_threads(peer: ThreadsPeer, load: Load) -> Mapping[str, Any]:
    """Measure a load."""
    peer.create(load.records)
    began = 0.0

    def start() -> None:
        nonlocal began
        began = time.perf_counter()

    ready = Barrier(load.callers, action=start, timeout=_READY_WITHIN_S)

    def call(caller: int) -> Done:
        record, done = load.record_of(caller), Done(0, 0, 0, 0.0)

        def work() -> None:
            nonlocal done
            changes = refused = last = 0
            ready.wait()
            for number in load.numbers(began):
                if peer.change(record, number):
                    changes, last = changes + 1, number
                else:
                    refused += 1
            done = Done(changes, refused, last, time.perf_counter())

        try:
            peer.caller(record, work)
        except BaseException:
            ready.abort()  # the others would wait for this one
            raise
        return done

    with ThreadPoolExecutor(load.callers) as pool:
        done = list(pool.map(call, range(load.callers)))
    return _result(load, done, began, [peer.stored(record) for record in range(load.records)])


async def by_tasks(peer: TasksPeer, load: Load) -> Mapping[str, Any]:
    """Measure a load; tasks are what threads are above."""
    await peer.create(load.records)
    began = 0.0
    waiting = load.callers
    ready = asyncio.Event()

    async def call(caller: int) -> Done:
        record, done = load.record_of(caller), Done(0, 0, 0, 0.0)

        async def work() -> None:
            nonlocal began, done, waiting
            changes = refused = last = 0
            waiting -= 1
            if not waiting:
                began = time.perf_counter()
                ready.set()
            await ready.wait()
            for number in load.numbers(began):
                if await peer.change(record, number):
                    changes, last = changes + 1, number
                else:
                    refused += 1
            done = Done(changes, refused, last, time.perf_counter())

        await peer.caller(record, work)
        return done

    async with asyncio.TaskGroup() as group:
        calls = [group.create_task(call(caller)) for caller in range(load.callers)]
    stored = [await peer.stored(record) for record in range(load.records)]
    return _result(load, [call.result() for call in calls], began, stored)


def _result(load: Load, done: Sequence[Done], began: float, stored: Sequence[Stored]) -> Mapping[str, Any]:
    for record, (state, changes) in enumerate(stored):
        by = [each for caller, each in enumerate(done) if load.record_of(caller) == record]
        acknowledged = sum(each.changes for each in by)
        if changes != acknowledged:
            raise AssertionError(f"record {record}: {acknowledged} changes acknowledged, {changes} in its history")
        lasts = [dict(STATE) | (patch_of(each.last) if each.last else {}) for each in by]
        if dict(state) not in lasts:
            raise AssertionError(f"record {record}: its state is {state}, the last change made it {lasts[0]}")
    return {
        "changes": sum(each.changes for each in done),
        "refused": sum(each.refused for each in done),
        "seconds": max(each.ended for each in done) - began,
    }


def main() -> None:
    """Open the contestant that the arguments name, serve loads."""
    name, folder, redis_url = sys.argv[1:]
    # Some packages log to standard output, which is for our lines alone.
    with os.fdopen(os.dup(1), "w", buffering=1) as replies:
        os.dup2(2, 1)
        module, _, class_name = name.partition(":")
        peer = getattr(importlib.import_module(f"benchmarks.peers.{module}"), class_name)()
        serve = _serve_threads if isinstance(peer, ThreadsPeer) else _serve_tasks
        serve(peer, Path(folder), redis_url, replies)


def _serve_threads(peer: ThreadsPeer, folder: Path, redis_url: str, replies: TextIO) -> None:
    peer.open(folder, redis_url)
    try:
        _serve(peer.about(), lambda load: by_threads(peer, load), replies)
    finally:
        peer.close()


def _serve_tasks(peer: TasksPeer, folder: Path, redis_url: str, replies: TextIO) -> None:
    with asyncio.Runner() as runner:
        runner.run(peer.open(folder, redis_url))
        try:
            _serve(runner.run(peer.about()), lambda load: runner.run(by_tasks(peer, load)), replies)
        finally:
            runner.run(peer.close())


def _serve(about: str, measure: Callable[[Load], Mapping[str, Any]], replies: TextIO) -> None:
    print(json.dumps({"about": about}), file=replies)
    for line in sys.stdin:
        print(json.dumps(measure(Load(**json.loads(line)))), file=replies)


if __name__ == "__main__":
    main()
