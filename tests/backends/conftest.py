"""A server, a namespace on it, and `from_url` of either shell."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import pytest

from redisflow import AsyncFlowManager, FlowManager
from tests.support.servers import ENGINES, Server
from tests.support.subjects import Blocking, LoopThread, Servers


@pytest.fixture
def server(servers: Servers) -> Server:
    """A running server, shared."""
    return servers.of(ENGINES[0])


@pytest.fixture
def prefix() -> str:
    """A fresh namespace."""
    return f"b-{secrets.token_hex(6)}"


@pytest.fixture(params=["sync", "asyncio"])
def from_url(request: pytest.FixtureRequest, loop_thread: LoopThread) -> Iterator[Any]:
    """`from_url` of either shell, behind one synchronous face; closes what it made."""
    made: list[Any] = []

    def make(url: str | None = None, **options: Any) -> Any:
        if request.param == "sync":
            made.append(FlowManager.from_url(url, **options))
        else:
            made.append(Blocking(AsyncFlowManager.from_url(url, **options), loop_thread))
        return made[-1]

    yield make
    for manager in made:
        manager.close()
