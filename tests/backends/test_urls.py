"""URLs: what they name, and how `rediss://` is verified."""

from __future__ import annotations

import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from redisflow import FlowManager, InvalidData, StorageError
from tests.support.servers import ENGINES, Server, _free_port
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


# --- TLS -----------------------------------------------------------------------------------------------


def certificate(folder: Path, name: str, subject_alt_name: str) -> None:
    """Make a CA of that name, and a certificate signed by it."""

    def openssl(*args: str) -> None:
        subprocess.run(["openssl", *args], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *key, "-keyout", f"{name}-ca.key", "-out", f"{name}-ca.crt", "-subj", f"/CN={name}")
    openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}-server")
    (folder / f"{name}.ext").write_text(f"subjectAltName={subject_alt_name}\n")
    signing = ("-CA", f"{name}-ca.crt", "-CAkey", f"{name}-ca.key", "-CAcreateserial", "-extfile", f"{name}.ext")
    openssl("x509", "-req", "-in", f"{name}.csr", *signing, "-days", "2", "-out", f"{name}.crt")


@pytest.fixture(scope="module")
def tls_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates: ours for 127.0.0.1, a stranger's, and ours for another host."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on the PATH to make certificates with")
    folder = tmp_path_factory.mktemp("tls")
    certificate(folder, "ours", "IP:127.0.0.1")
    certificate(folder, "stranger", "IP:127.0.0.1")
    certificate(folder, "elsewhere", "DNS:elsewhere.example")
    return folder


def tls_port(server: Server) -> int:
    """The port a TLS server listens on."""
    return int(server.config_args[1])


@pytest.fixture(scope="module")
def tls_servers(tls_folder: Path) -> Iterator[dict[str, Server]]:
    """Servers with the certificate for 127.0.0.1, and with the one for another host."""
    engine = next((engine for engine in ENGINES if not engine.is_valkey), None)
    if engine is None:
        pytest.skip("no redis-server on the PATH: the wheels' servers have no TLS")

    def tls(name: str) -> Server:
        files = ("--tls-cert-file", f"{tls_folder}/{name}.crt", "--tls-key-file", f"{tls_folder}/{name}.key")
        trust = ("--tls-ca-cert-file", f"{tls_folder}/{name}-ca.crt", "--tls-auth-clients", "no")
        return Server(engine, "--tls-port", str(_free_port()), *files, *trust)

    with tls("ours") as ours, tls("elsewhere") as elsewhere:
        yield {"ours": ours, "elsewhere": elsewhere}


def tls_url(server: Server, **options: object) -> str:
    """A `rediss://` URL with options."""
    query = "&".join(f"{name}={value}" for name, value in options.items())
    return f"rediss://127.0.0.1:{tls_port(server)}/0?{query}"


def test_a_verified_certificate_is_accepted(
    tls_servers: dict[str, Server], tls_folder: Path, prefix: str, from_url: Any
) -> None:
    """`rediss://` with our CA works, blocking reads included."""
    works(from_url(tls_url(tls_servers["ours"], ssl_ca_certs=tls_folder / "ours-ca.crt"), prefix=prefix))


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
