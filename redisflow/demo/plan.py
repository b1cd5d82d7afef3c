"""What is to happen to which file."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import attrs

from redisflow.demo.sources import find_sources

if TYPE_CHECKING:
    from pathlib import Path

    from redisflow.demo.sources import SourceFile

OWNER = "demo:coordinator"
REVIEW_TOPIC = "review"
FEWEST_FILES = 8
_LONG_RUN_FILES = 400


class Route(enum.StrEnum):
    """What a flow meets between `read` and `parse`."""

    DIRECT = "direct"  # nothing
    REVIEW = "review"  # waits for the reviewer's event: the largest files
    PAUSE = "pause"  # waits for a timer
    PARK = "park"  # waits for ever; the coordinator requests its cancel


@attrs.frozen
class Plan:
    """The files of one run, with their routes.

    Attributes:
        found: how many files the tree has; more than `routes` when the run is limited.
    """

    root: Path
    found: int
    routes: dict[str, Route]

    @classmethod
    def of(cls, root: Path, most: int) -> Plan:
        """Plan a run over at most `most` files of the tree at `root`, spread evenly over it."""
        sources = find_sources(root)
        step = max(1.0, len(sources) / most)
        chosen = [sources[int(n * step)] for n in range(min(most, len(sources)))]
        return cls(root, len(sources), _routes(chosen))

    @property
    def pace_s(self) -> float:
        """How long a worker rests before each file: a small tree would be over before anything can happen to it."""
        return 0.0 if len(self.routes) >= _LONG_RUN_FILES else min(0.25, 8 / max(1, len(self.routes)))

    def of_route(self, route: Route) -> int:
        """How many files take `route`."""
        return sum(each is route for each in self.routes.values())


def _routes(sources: list[SourceFile]) -> dict[str, Route]:
    by_size = sorted(sources, key=lambda source: source.size)
    n_large = max(1, len(sources) // 40)
    routes = {source.path: Route.DIRECT for source in sources}
    routes.update((source.path, Route.REVIEW) for source in by_size[-n_large:])
    rest = [source.path for source in sources if routes[source.path] is Route.DIRECT]
    routes.update(dict.fromkeys(rest[::20], Route.PAUSE))
    routes.update(dict.fromkeys(rest[5::100], Route.PARK))
    return routes
