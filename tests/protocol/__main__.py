"""`python -m tests.protocol`: carry out very many schedules, and tell the story of those that went wrong."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from secrets import randbelow

from tests.protocol.exploring import Found, explore, story_of

_AT_ONCE = 2_000  # schedules given to a process
_SEEDS_APART = 10**9  # between the first schedules of two seeds
_STORIES = 3
_PROGRESS_EVERY_S = 10.0


def main() -> int:
    """Carry out schedules on all cores. Returns 1 if anything was wrong with one."""
    parser = argparse.ArgumentParser(prog="python -m tests.protocol", description=main.__doc__)
    parser.add_argument("--schedules", type=int, default=1_000_000, help="how many (1,000,000)")
    parser.add_argument("--seed", type=int, default=1 + randbelow(10**6), help="of all of them; a random one")
    parser.add_argument("--schedule", type=int, metavar="SEED", help="tell the story of just this one")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="one for each core")
    options = parser.parse_args()
    if options.schedule is not None:
        story = story_of(options.schedule)
        _say(story)
        return int("\nWRONG: " in story)
    _say(f"seed {options.seed}: {options.schedules:,} schedules in {options.processes} processes")
    begun_s = said_s = time.monotonic()
    done, found = 0, list[Found]()
    with ProcessPoolExecutor(options.processes) as pool:
        for count, wrong in pool.map(_some, _portions(options.seed * _SEEDS_APART, options.schedules)):
            done += count
            found += wrong
            now_s = time.monotonic()
            if now_s > said_s + _PROGRESS_EVERY_S or wrong:
                said_s = now_s
                _say(f"{done:,} schedules, {done / (now_s - begun_s):,.0f} a second, {len(found)} wrong")
    for one in found[:_STORIES]:
        _say(f"\n{story_of(one.seed)}\nagain: python -m tests.protocol --schedule {one.seed}")
    seconds = time.monotonic() - begun_s
    rate = f"{done:,} schedules in {seconds:.0f} s, {done / seconds:,.0f} a second"
    others = f": {', '.join(str(one.seed) for one in found[:20])}" if found else ""
    _say(f"{rate}; {len(found) or 'nothing'} wrong{others}")
    return int(bool(found))


def _say(what: str) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


def _portions(first: int, count: int) -> Iterator[range]:
    """Part the seeds among the processes."""
    for start in range(0, count, _AT_ONCE):
        yield range(first + start, first + min(start + _AT_ONCE, count))


def _some(seeds: range) -> tuple[int, list[Found]]:
    """Carry out some schedules, in a process of the pool."""
    return len(seeds), [found for found in explore(seeds) if found is not None]


if __name__ == "__main__":
    sys.exit(main())
