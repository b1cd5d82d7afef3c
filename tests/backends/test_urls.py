"""URLs: what they name, and how `rediss://` is verified."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from redisflow import AsyncFlowManager, FlowManager, InvalidData, StorageError
from tests.support.certificates import certified
from tests.support.proxy import FaultProxy
from tests.support.servers import Engine, Server
from tests.support.subjects import WHO, create, works


def test_a_server_is_reached_over_tcp_and_its_socket(server: Server, prefix: str, from_url: Any) -> None:
    """`redis://` and `unix://` are the same server, and the same flows."""
    over_tcp, over_socket = from_url(server.url, prefix=prefix), from_url(server.unix_url, prefix=prefix)
    works(over_tcp)
    works(over_socket)
    flow = create(over_tcp)
    assert over_socket.get(flow.id) == flow


def test_the_default_url_is_the_environments(
    server: Server, prefix: str, from_url: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`$REDISFLOW_URL`, where no URL is given."""
    monkeypatch.setenv("REDISFLOW_URL", server.url)
    flow = create(from_url(prefix=prefix))
    assert from_url(server.url, prefix=prefix).get(flow.id) == flow


def test_a_url_chooses_its_database(server: Server, prefix: str, from_url: Any) -> None:
    """The path of `redis://` is a database number."""
    flow = create(from_url(server.url, prefix=prefix))
    assert from_url(f"redis://127.0.0.1:{server.port}/3", prefix=prefix).get(flow.id) is None


def test_memory_is_private_unless_named(from_url: Any) -> None:
    """`memory://` keeps to itself; `memory://name` is shared in the process, sync and asyncio alike."""
    first, second = from_url("memory://"), from_url("memory://")
    works(first)
    flow = create(first)
    assert second.get(flow.id) is None
    name = secrets.token_hex(4)
    named = from_url(f"memory://{name}")
    flow = create(named)
    assert from_url(f"memory://{name}").get(flow.id) == flow
    with FlowManager.from_url(f"memory://{name}") as flows:
        assert flows.get(flow.id) == flow
    assert from_url("memory://other").get(flow.id) is None


@pytest.mark.parametrize(
    "url", ["http://localhost", "localhost:6379", "redis", "://", "memcached://x", "file:///tmp/x"]
)
def test_a_url_of_no_known_kind_is_refused(url: str, from_url: Any) -> None:
    """When the manager is made; the message says what is known."""
    with pytest.raises(InvalidData, match="redis://"):
        from_url(url)


@pytest.mark.parametrize("url", ["redis://localhost:port/0", "redis://localhost:6379/0?socket_timeout=soon"])
def test_a_url_that_makes_no_sense_is_refused(url: str, from_url: Any) -> None:
    """InvalidData, at the latest when it is used; a password in it is not for the log."""
    with pytest.raises(InvalidData):
        from_url(url).connect()


def test_a_namespace_is_its_prefix(server: Server, from_url: Any) -> None:
    """Two prefixes on one server share nothing; one that begins like another is another."""
    base = f"b-{secrets.token_hex(4)}"
    first, second = from_url(server.url, prefix=base), from_url(server.url, prefix=f"{base}.x")
    flow = create(first)
    create(second)
    assert second.get(flow.id) is None
    assert [len(flows.list_by_owner(WHO["owner_session_key"])) for flows in (first, second)] == [1, 1]


@pytest.mark.parametrize(
    "options",
    [
        "decode_responses=True",
        "protocol=3&decode_responses=True&encoding=latin-1",
        "retry_on_timeout=True&health_check_interval=1&max_connections=1",
        "socket_timeout=0",
    ],
)
def test_a_urls_options_do_not_get_in_the_way(server: Server, prefix: str, from_url: Any, options: str) -> None:
    """Whatever redis-py would do by them: values come as they were stored, and a lost reply doubles nothing."""
    with FaultProxy(server.port) as proxy:
        flows = from_url(f"{proxy.url}?{options}", prefix=prefix)
        works(flows)
        flow = create(flows, state={"bytes": b"\xff", "text": "ü", "n": 0})
        flow = flows.update_state(flow, increment={"n": 1})
        proxy.cut_next_reply()
        flow = flows.update_state(flow, increment={"n": 1})
        assert proxy.faults["cut_reply"] == 1
        assert flows.get(flow).state == {"bytes": b"\xff", "text": "ü", "n": 2}
        assert flow.revision == 2


# --- TLS -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tls_servers(tls_engine: Engine, tls_folder: Path) -> Iterator[dict[str, Server]]:
    """Servers with the certificate for 127.0.0.1, and with the one for another host."""
    with ExitStack() as stack:
        names = ("ours", "elsewhere")
        servers = [Server(tls_engine, tls=certified(tls_folder, name)) for name in names]
        yield {name: stack.enter_context(server) for name, server in zip(names, servers, strict=True)}


def tls_url(server: Server, **options: object) -> str:
    """A `rediss://` URL with options."""
    query = "&".join(f"{name}={value}" for name, value in options.items())
    return f"rediss://127.0.0.1:{server.port}/0?{query}"


def test_a_verified_certificate_is_accepted(
    tls_servers: dict[str, Server], tls_folder: Path, prefix: str, from_url: Any
) -> None:
    """`rediss://` with our CA works, blocking reads included."""
    works(from_url(tls_url(tls_servers["ours"], ssl_ca_certs=tls_folder / "ours-ca.crt"), prefix=prefix))


async def test_tasks_that_share_a_connection_get_their_own_replies_over_tls(
    tls_servers: dict[str, Server], tls_folder: Path, prefix: str
) -> None:
    """Replies that come in several records of TLS at once, too."""
    url = tls_url(tls_servers["ours"], ssl_ca_certs=tls_folder / "ours-ca.crt")
    async with AsyncFlowManager.from_url(url, prefix=prefix, deadline_s=5.0) as flows:
        for _ in range(5):
            made = await asyncio.gather(
                *(flows.create_managed(**WHO, state={"n": n, "text": "x" * 8_000}) for n in range(100))
            )
            assert [flow.state["n"] for flow in made] == list(range(100))
            assert await asyncio.gather(*(flows.get(flow.id) for flow in made)) == made


@pytest.mark.parametrize(
    ("which", "trusted"), [("ours", "stranger-ca.crt"), ("ours", None), ("elsewhere", "elsewhere-ca.crt")]
)
def test_an_unverified_certificate_is_refused(
    tls_servers: dict[str, Server], tls_folder: Path, which: str, trusted: str | None, from_url: Any
) -> None:
    """Another CA, none we know, another host's name: StorageError, and nothing was sent."""
    options = {} if trusted is None else {"ssl_ca_certs": tls_folder / trusted}
    with pytest.raises(StorageError) as refused:
        from_url(tls_url(tls_servers[which], **options), deadline_s=0.3).connect()
    assert "certificate" in str(refused.value).lower()
    assert tls_servers[which].client().dbsize() == 0 or which == "ours"


def test_turning_verification_off_warns(tls_servers: dict[str, Server], prefix: str, from_url: Any) -> None:
    """It works, and says what it means."""
    flows = from_url(tls_url(tls_servers["elsewhere"], ssl_cert_reqs="none", ssl_check_hostname="false"), prefix=prefix)
    with pytest.warns(RuntimeWarning, match="verification"):
        flows.connect()
    works(flows)
    tls_servers["elsewhere"].client().flushall()
