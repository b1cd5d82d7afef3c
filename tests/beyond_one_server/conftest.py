"""Clusters and replicated servers for this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from redisflow import AsyncFlowManager, FlowManager
from tests.support.clusters import Cluster
from tests.support.servers import ENGINES
from tests.support.subjects import Blocking, LoopThread

SHELLS = ("sync", "asyncio")
Open = Callable[..., Any]


@pytest.fixture(params=SHELLS)
def open_url(request: pytest.FixtureRequest, loop_thread: LoopThread) -> Iterator[Open]:
    """Makes managers of a shell for a URL or a client; they are closed with the test."""
    with ExitStack() as stack:

        def open_url(url: str, **options: Any) -> Any:
            kind = FlowManager if request.param == "sync" else AsyncFlowManager
            manager: Any = kind.from_url(url, **options)
            if request.param == "asyncio":
                manager = Blocking(manager, loop_thread)
            stack.callback(manager.close)
            return manager

        yield open_url


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three primaries with a replica each, for tests that leave it whole."""
    with Cluster(ENGINES[0]) as cluster:
        yield cluster
