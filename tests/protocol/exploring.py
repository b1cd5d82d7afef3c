"""Carrying out many schedules, and telling the story of one."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager

import attrs

from redisflow import settling
from tests.protocol.checks import violations
from tests.protocol.model import Server
from tests.protocol.themes import Theme
from tests.protocol.workload import Schedule


class SmallPages(Server):
    """A server whose scripts look at two entries, so that a search of a short trail has several pages."""

    piece = 2


@attrs.frozen
class Found:
    """A schedule that something is wrong with.

    Attributes:
        tried: how many schedules were carried out until then.
    """

    seed: int
    wrong: list[str]
    tried: int


@contextmanager
def small_pages() -> Iterator[None]:
    """Have the library ask for small pages."""
    before = settling.FIRST_PAGE, settling.PAGE
    settling.FIRST_PAGE, settling.PAGE = 2, 4
    try:
        yield
    finally:
        settling.FIRST_PAGE, settling.PAGE = before


@contextmanager
def _little_collecting() -> Iterator[None]:
    """Collect garbage seldom: each schedule leaves some cycles, and all of them are small."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 1000)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def explore(
    seeds: Iterable[int], server: type[Server] = SmallPages, theme: Theme | None = None
) -> Generator[Found | None, None, None]:
    """Carry out the schedules of seeds. Iterates over what was found in each."""
    with small_pages(), _little_collecting():
        for tried, seed in enumerate(seeds, 1):
            schedule = Schedule(seed, server, theme=theme)
            schedule.run()
            wrong = violations(schedule)
            yield Found(seed, wrong, tried) if wrong else None


def first_found(
    seeds: Iterable[int],
    server: type[Server] = SmallPages,
    theme: Theme | None = None,
    *,
    shows: Callable[[Found], bool] = lambda _: True,
) -> Found | None:
    """Return the first schedule that something is wrong with, and that shows what is looked for."""
    with closing(explore(seeds, server, theme)) as schedules:
        return next((found for found in schedules if found is not None and shows(found)), None)


def story_of(seed: int, server: type[Server] = SmallPages, theme: Theme | None = None) -> str:
    """Carry out one schedule, and return what happened in it, and what is wrong."""
    lines: list[str] = []
    with small_pages():
        schedule = Schedule(seed, server, lines.append, theme)
        kind = "gentle" if schedule.is_gentle else "harsh"
        lines.insert(0, f"schedule {seed}, {kind}: {schedule.network.weather}")
        schedule.run()
        wrong = violations(schedule)
    return "\n".join([*lines, *(f"WRONG: {what}" for what in wrong)] if wrong else [*lines, "nothing is wrong"])
