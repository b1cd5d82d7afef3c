"""A server, a proxy before it that loses replies, and a manager that goes around the proxy."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pytest

from redisflow import FlowManager
from tests.support.lua import EVERY_SCRIPT
from tests.support.proxy import FaultProxy
from tests.support.servers import ENGINES, Server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One server that knows every script: a cut reply is then never just a NOSCRIPT."""
    with Server(ENGINES[0]) as server:
        for script in EVERY_SCRIPT:
            server.client().script_load(script.source.text.decode())
        yield server


@pytest.fixture
def prefix() -> str:
    """A namespace of the test's own."""
    return f"t{uuid4().hex}"


@pytest.fixture
def direct(server: Server, prefix: str) -> Iterator[FlowManager]:
    """A manager that reaches the server without the proxy."""
    with FlowManager.from_url(server.url, prefix=prefix) as flows:
        yield flows


@pytest.fixture
def proxy(server: Server) -> Iterator[FaultProxy]:
    """A proxy before the server, faultless so far."""
    with FaultProxy(server.port) as proxy:
        yield proxy
