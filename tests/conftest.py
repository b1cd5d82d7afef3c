"""What every test may ask for: running servers, and the subjects of the contract suite."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.certificates import certificate
from tests.support.servers import ENGINES, Engine, Server
from tests.support.subjects import BACKENDS, CLUSTER, Backend, LoopThread, Servers, Subject

SHELLS = ("sync", "asyncio")


def pytest_report_header() -> str:
    """Say which engines run."""
    engines = ", ".join(f"{engine.name} ({engine.binary})" for engine in ENGINES) or "none: no server binary was found"
    return f"engines: {engines}; and fakeredis"


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """One server per engine and test process."""
    with Servers() as running:
        yield running


@pytest.fixture(scope="session")
def loop_thread() -> Iterator[LoopThread]:
    """The event loop that the asyncio subjects run in."""
    with LoopThread() as thread:
        yield thread


def _subject(servers: Servers, loop_thread: LoopThread, backend_name: str, shell: str) -> Iterator[Subject]:
    if backend_name == CLUSTER:
        backend = Backend.of_cluster(servers.cluster)
    else:
        engine = BACKENDS[backend_name]
        backend = Backend.in_memory() if engine is None else Backend.of_server(servers.of(engine))
    subject = Subject(backend, loop_thread if shell == "asyncio" else None)
    yield subject
    subject.close()
    backend.raw.close()


@pytest.fixture(params=[f"{backend}-{shell}" for backend in (*BACKENDS, CLUSTER) for shell in SHELLS])
def subject(request: pytest.FixtureRequest, servers: Servers, loop_thread: LoopThread) -> Iterator[Subject]:
    """Every backend × sync and asyncio."""
    backend, _, shell = request.param.rpartition("-")
    yield from _subject(servers, loop_thread, backend, shell)


@pytest.fixture(params=[f"{engine.name}-{shell}" for engine in ENGINES[:1] for shell in SHELLS])
def real_subject(request: pytest.FixtureRequest, servers: Servers, loop_thread: LoopThread) -> Iterator[Subject]:
    """One real server × sync and asyncio, for what does not depend on the server."""
    backend, _, shell = request.param.rpartition("-")
    yield from _subject(servers, loop_thread, backend, shell)


@pytest.fixture(params=SHELLS)
def own_subject(request: pytest.FixtureRequest, loop_thread: LoopThread) -> Iterator[Subject]:
    """A real server of the test's own, to stop and start, × sync and asyncio."""
    with Server(ENGINES[0]) as server:
        subject = Subject(Backend.of_server(server), loop_thread if request.param == "asyncio" else None)
        yield subject
        subject.close()


@pytest.fixture
def flows(subject: Subject) -> Any:
    """A manager of the subject, connected."""
    manager = subject.manager()
    manager.connect()
    return manager


# --- TLS -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tls_engine() -> Engine:
    """An engine that speaks TLS."""
    engine = next((engine for engine in ENGINES if not engine.is_valkey), None)
    if engine is None:
        pytest.skip("no redis-server on the PATH: the wheels' servers have no TLS")
    return engine


@pytest.fixture(scope="session")
def tls_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates: ours for 127.0.0.1, a stranger's, and ours for another host."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on the PATH to make certificates with")
    folder = tmp_path_factory.mktemp("tls")
    certificate(folder, "ours", "IP:127.0.0.1")
    certificate(folder, "stranger", "IP:127.0.0.1")
    certificate(folder, "elsewhere", "DNS:elsewhere.example")
    return folder
