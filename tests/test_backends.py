"""URLs, handed-in clients, and what is checked when connecting."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis
import redis.asyncio
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from redisflow import (
    AsyncFlowManager,
    FlowManager,
    InvalidData,
    LayoutMismatch,
    OutcomeUnknown,
    StorageError,
)
from redisflow.calls import Refusal
from redisflow.ops import upkeep
from redisflow.ops.namespace import Namespace
from tests.support.proxy import CUT_REPLY, PASS, FaultProxy
from tests.support.servers import ENGINES, Server, _free_port
from tests.support.subjects import STATE, WHO, Blocking, LoopThread, Servers, create, trail
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from redisflow.calls import Read
    from tests.support.proxy import Fault
    from tests.support.subjects import Subject

ROOT = Path(__file__).parents[1]


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


def works(flows: Any) -> None:
    """Lead a flow through its life, with a block in it."""
    flow = create(flows)
    flow = flows.start_running(flow)
    flow = flows.update_state(flow, increment={"processed": 1})
    assert [event.kind for event in flows.watch(flow, after="0", timeout=0.01)][:2] == ["created", "started"]
    flow = flows.finish(flow)
    assert flows.get(flow.id) == flow == flows.wait_for(flow, timeout=5)
    assert flow in flows.list_by_owner(WHO["owner_session_key"])


# --- URLs ----------------------------------------------------------------------------------------------


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


# --- handed-in clients ---------------------------------------------------------------------------------

CLIENT_OPTIONS: list[dict[str, Any]] = [
    {},
    {"decode_responses": True},
    {"protocol": 3},
    {"protocol": 3, "decode_responses": True, "encoding": "latin-1"},
    {"health_check_interval": 1, "client_name": "mine"},
    {"socket_timeout": 0.5, "max_connections": 2},
]


@pytest.mark.parametrize("options", CLIENT_OPTIONS, ids=str)
def test_a_client_is_taken_as_it_is(server: Server, prefix: str, options: dict[str, Any]) -> None:
    """Whatever it was set up with, flows come whole; the client itself goes on working as before."""
    client = redis.Redis(port=server.port, **options)
    with FlowManager(client, prefix=prefix) as flows:
        works(flows)
        flow = create(flows, state={"bytes": b"\xff", "text": "ü"})
        assert flows.get(flow.id).state == {"bytes": b"\xff", "text": "ü"}
    assert client.ping()
    assert isinstance(client.echo("x"), str if options.get("decode_responses") else bytes)
    client.close()


@pytest.mark.parametrize("options", CLIENT_OPTIONS, ids=str)
async def test_an_asyncio_client_is_taken_as_it_is(server: Server, prefix: str, options: dict[str, Any]) -> None:
    """The same for asyncio."""
    client = redis.asyncio.Redis(port=server.port, **options)
    async with AsyncFlowManager(client, prefix=prefix) as flows:
        flow = await flows.create_managed(**WHO, state={"bytes": b"\xff", "text": "ü"})
        assert (await flows.get(flow.id)).state == {"bytes": b"\xff", "text": "ü"}
        assert [event.kind async for event in flows.watch(flow, after="0", timeout=0)] == ["created"]
    assert await client.ping()
    await client.aclose()


@pytest.mark.parametrize("cls", [FlowManager, AsyncFlowManager])
def test_what_is_no_client_is_refused(cls: type, server: Server) -> None:
    """The other shell's client, a URL, nothing: InvalidData says what is wanted."""
    wrong = redis.asyncio.Redis() if cls is FlowManager else redis.Redis()
    for client in (wrong, server.url, None, redis.ConnectionPool()):
        with pytest.raises(InvalidData, match="Redis"):
            cls(client)


class Recorder:
    """A proxy's plan: notes the scripts that pass, and loses the reply to the next one when told to."""

    def __init__(self) -> None:
        self.scripts: list[list[bytes]] = []
        self.lose = False

    def __call__(self, command: list[bytes]) -> Fault:
        if command[0] not in {b"EVALSHA", b"EVAL"}:
            return PASS
        self.scripts.append(command)
        lose, self.lose = self.lose, False
        return CUT_REPLY if lose else PASS


def test_a_clients_own_resending_is_off(server: Server, prefix: str) -> None:
    """A lost reply is followed by our resend, which says that it is one: nothing is applied twice."""
    plan = Recorder()
    with FaultProxy(server.port, plan) as proxy:
        client = redis.Redis(port=proxy.port, retry=Retry(ExponentialBackoff(0.001, 0.001), 10))
        with FlowManager(client, prefix=prefix) as flows:
            flow = flows.start_running(create(flows))
            flow = flows.update_state(flow, increment={"processed": 1})
            plan.scripts.clear()
            plan.lose = True
            flow = flows.update_state(flow, increment={"processed": 1})
            assert (flow.state["processed"], flow.revision) == (2, 3)
            assert flows.get(flow.id) == flow
            assert len(trail(flows, flow)) == 4
        first, second = plan.scripts
        assert first != second
        assert [part for part in first if part == flow.etag.encode()]
        assert [part for part in second if part == flow.etag.encode()]
        client.close()


async def test_an_asyncio_clients_own_resending_is_off(server: Server, prefix: str) -> None:
    """The same for asyncio."""
    plan = Recorder()
    with FaultProxy(server.port, plan) as proxy:
        retry = redis.asyncio.retry.Retry(ExponentialBackoff(0.001, 0.001), 10)
        client = redis.asyncio.Redis(port=proxy.port, retry=retry)
        async with AsyncFlowManager(client, prefix=prefix) as flows:
            flow = await flows.create_mirrored(**WHO, state=STATE)
            flow = await flows.update_state(flow, increment={"processed": 1})
            plan.scripts.clear()
            plan.lose = True
            flow = await flows.update_state(flow, increment={"processed": 1})
            assert (flow.state["processed"], flow.revision) == (2, 3)
        first, second = plan.scripts
        assert first != second
        await client.aclose()


# --- what is checked when connecting -------------------------------------------------------------------


def checked(info: str, save: list[bytes] | Refusal, *, allow_eviction: bool = False) -> Read:
    """Drive the connection's check by hand: give it what INFO and CONFIG GET save say."""
    op = upkeep.connect(Namespace("p"), real_server=True, allow_eviction=allow_eviction)
    next(op)
    return op.send([info.replace("\n", "\r\n").encode(), save])


GOOD = "# Server\nredis_version:7.4.0\naof_enabled:1\nmaxmemory_policy:noeviction\n"
VALKEY = "redis_version:7.2.4\nvalkey_version:8.1.0\naof_enabled:1\nmaxmemory_policy:noeviction\n"


@pytest.mark.parametrize(
    ("info", "said"),
    [
        (GOOD.replace("7.4.0", "6.2.14"), r"Redis 6\.2\.14.*7\.0"),
        (GOOD.replace("7.4.0", "5.0.7"), r"Redis 5\.0\.7"),
        (VALKEY.replace("8.1.0", "7.0.1"), r"Valkey 7\.0\.1.*7\.2"),
    ],
)
def test_an_old_server_is_refused(info: str, said: str) -> None:
    """Below Redis 7.0, Valkey 7.2: StorageError says which it is and which is needed."""
    with pytest.raises(StorageError, match=said):
        checked(info, [b"save", b"3600 1"])


@pytest.mark.parametrize("info", [GOOD, GOOD.replace("7.4.0", "7.0.0"), GOOD.replace("7.4.0", "10.0.1"), VALKEY])
def test_a_new_enough_server_is_accepted(info: str) -> None:
    """The bounds belong to what is accepted; versions are numbers, not text."""
    assert checked(info, [b"save", b""])


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-lfu", "allkeys-random"])
def test_an_evicting_server_is_refused(policy: str) -> None:
    """Unless the caller accepts it; `volatile-*` evicts nothing of ours."""
    info = GOOD.replace("noeviction", policy)
    with pytest.raises(StorageError, match=f"{policy}.*allow_eviction"):
        checked(info, [b"save", b""])
    assert checked(info, [b"save", b""], allow_eviction=True)
    assert checked(info.replace("allkeys", "volatile"), [b"save", b""])


def test_where_config_is_forbidden_nothing_is_said() -> None:
    """Hosts that refuse CONFIG are no reason to warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused = StorageError("this user has no permissions to run CONFIG", "NOPERM")
        assert checked(GOOD.replace("aof_enabled:1", "aof_enabled:0"), refused)


def test_a_real_evicting_server_is_refused(prefix: str, from_url: Any) -> None:
    """As configured, over the wire; nothing is written."""
    with Server(ENGINES[0], "--maxmemory-policy", "allkeys-lru", "--maxmemory", "100mb") as server:
        with pytest.raises(StorageError, match="allkeys-lru"):
            from_url(server.url, prefix=prefix).connect()
        assert server.client().dbsize() == 0
        works(from_url(server.url, prefix=prefix, allow_eviction=True))


def test_a_server_that_keeps_nothing_is_warned_about_once(prefix: str, from_url: Any) -> None:
    """No append-only file and no snapshots: one warning, at connect."""
    with Server(ENGINES[0], persistence=False) as server:
        flows = from_url(server.url, prefix=prefix)
        with pytest.warns(RuntimeWarning, match="disk") as warned:
            flows.connect()
        assert len(warned) == 1
        works(flows)  # further warnings are errors
        flows.close()
        server.client().config_set("save", "3600 1")
        works(from_url(server.url, prefix=prefix))


def test_another_layout_is_refused_before_anything_is_written(real_subject: Subject) -> None:
    """Another partition count or layout version: LayoutMismatch with both numbers; without a wish, what is there."""
    flows = real_subject.manager(partitions=4)
    flow = create(flows)
    meta = f"{real_subject.prefix}:meta"
    before = real_subject.snapshot(), real_subject.raw.hgetall(meta)
    with pytest.raises(LayoutMismatch) as mismatch:
        create(real_subject.manager(partitions=8))
    assert (mismatch.value.prefix, mismatch.value.expected, mismatch.value.actual) == (real_subject.prefix, 8, 4)
    assert (real_subject.snapshot(), real_subject.raw.hgetall(meta)) == before
    assert real_subject.manager().get(flow.id) == real_subject.manager(partitions=4).get(flow.id) == flow
    real_subject.raw.hset(meta, "layout", 2)
    with pytest.raises(LayoutMismatch) as mismatch:
        create(real_subject.manager())
    assert (mismatch.value.expected, mismatch.value.actual) == (1, 2)
    assert real_subject.snapshot() == before[0]


def test_a_namespace_says_how_it_is_laid_out(real_subject: Subject) -> None:
    """`<prefix>:meta` has the layout version and the partition count; 16 unless chosen."""
    real_subject.manager().connect()
    meta = real_subject.raw.hgetall(f"{real_subject.prefix}:meta")
    assert meta == {b"layout": b"1", b"partitions": b"16"}
    assert real_subject.all_keys() == []


@pytest.mark.parametrize(
    "meta",
    [{"layout": "1", "partitions": "x"}, {"layout": "1"}, {"partitions": "16"}, {"layout": "1", "partitions": "1025"}],
    ids=str,
)
def test_a_damaged_namespace_is_named(real_subject: Subject, meta: dict[str, str]) -> None:
    """What cannot be a layout is InvalidData, naming the key."""
    real_subject.raw.hset(f"{real_subject.prefix}:meta", mapping=meta)
    with pytest.raises(InvalidData, match=f"{real_subject.prefix}:meta"):
        real_subject.manager().connect()


# --- processes, event loops, servers that are away -----------------------------------------------------

FORK = """
    import os, sys
    from redisflow import FlowManager

    flows = FlowManager.from_url(sys.argv[1], prefix=sys.argv[2])
    who = dict(controller_id="c", goal="g", owner_session_key="o", requester_origin="r")
    flow = flows.create_mirrored(**who, state={"n": 0})
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            for _ in range(50):
                flows.update_state(flow, increment={"n": 1})
            os._exit(0)
        children.append(child)
    for _ in range(50):
        flows.update_state(flow, increment={"n": 1})
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    flow = flows.get(flow.id)
    assert flow.state == {"n": 200}, flow
    assert flow.revision == 201
    flows.close()
"""
ASYNC_FORK = """
    import asyncio, os, sys
    from redisflow import AsyncFlowManager, StorageError

    flows = AsyncFlowManager.from_url(sys.argv[1], prefix=sys.argv[2])
    loop = asyncio.new_event_loop()
    assert loop.run_until_complete(flows.count_by_status())
    child = os.fork()
    if child == 0:
        for used in (loop, asyncio.new_event_loop()):
            try:
                used.run_until_complete(flows.count_by_status())
            except StorageError as error:
                assert "process" in str(error), error
            else:
                os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert loop.run_until_complete(flows.count_by_status())
    loop.run_until_complete(flows.aclose())
    loop.close()
"""


@pytest.mark.parametrize("script", [FORK, ASYNC_FORK], ids=["sync", "asyncio"])
def test_a_forked_child_does_not_share_its_parents_connections(server: Server, prefix: str, script: str) -> None:
    """Both go on: the sync child over connections of its own, the asyncio one with a clear error."""
    command = [sys.executable, "-c", textwrap.dedent(script), server.url, prefix]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_manager_belongs_to_one_event_loop(server: Server, prefix: str) -> None:
    """Used from another loop: StorageError says so; the first loop goes on; after closing, any loop will do."""
    flows = AsyncFlowManager.from_url(server.url, prefix=prefix)
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    try:
        flow = first.run_until_complete(flows.create_managed(**WHO))
        with pytest.raises(StorageError, match="event loop"):
            second.run_until_complete(flows.get(flow.id))
        assert first.run_until_complete(flows.get(flow.id)) == flow
        first.run_until_complete(flows.aclose())
        assert second.run_until_complete(flows.get(flow.id)) == flow
        second.run_until_complete(flows.aclose())
    finally:
        first.close()
        second.close()


def test_a_server_that_is_not_there_is_a_storage_error(from_url: Any, prefix: str) -> None:
    """Tried until the deadline, then StorageError with the client's own error as its cause."""
    port = _free_port()
    flows = from_url(f"redis://127.0.0.1:{port}/0", prefix=prefix, deadline_s=0.3)
    begun = time.monotonic()
    with pytest.raises(StorageError) as away:
        flows.connect()
    assert not isinstance(away.value, OutcomeUnknown)
    assert isinstance(away.value.__cause__, redis.ConnectionError)
    assert time.monotonic() - begun < 10


def test_a_wrong_password_is_not_tried_again(prefix: str, from_url: Any) -> None:
    """No deadline is waited for; the right one works."""
    with Server(ENGINES[0], "--requirepass", "secret") as server:
        url = f"redis://:{{}}@127.0.0.1:{server.port}/0"
        with pytest.raises(StorageError) as refused:
            from_url(url.format("wrong"), prefix=prefix, deadline_s=600).connect()
        assert "secret" not in str(refused.value)
        with pytest.raises(StorageError):
            from_url(server.url, prefix=prefix, deadline_s=600).connect()
        works(from_url(url.format("secret"), prefix=prefix))


def test_an_unknown_outcome_is_settled_by_its_op_id(prefix: str, from_url: Any) -> None:
    """No reply within the deadline: OutcomeUnknown; the same verb with its op id answers what became of it."""
    with Server(ENGINES[0]) as server:
        flows = from_url(f"{server.url}?socket_timeout=0.2", prefix=prefix, deadline_s=0.5)
        flow = flows.start_running(create(flows))
        server.pause()
        with pytest.raises(OutcomeUnknown) as unknown:
            flows.update_state(flow, increment={"processed": 1})
        with pytest.raises(StorageError) as away:
            flows.get(flow.id)
        assert not isinstance(away.value, OutcomeUnknown)
        server.resume()
        settled = wait_until(
            lambda: flows.update_state(flow, increment={"processed": 1}, op_id=unknown.value.op_id),
            description="the server answers again",
            ignoring=(StorageError,),
        )
        assert (settled.state["processed"], settled.revision, settled.etag) == (1, 2, unknown.value.op_id)
        assert len(trail(flows, flow)) == 3


def test_a_manager_survives_a_restart(prefix: str, from_url: Any) -> None:
    """Connections and scripts are gone, flows are not: the next call works."""
    with Server(ENGINES[0]) as server:
        flows = from_url(server.url, prefix=prefix)
        flow = flows.start_running(create(flows))
        server.restart()
        flow = flows.update_state(flow, {"x": 1})
        assert flows.get(flow.id) == flow
        server.client().script_flush()
        assert flows.finish(flow).status == "finished"


def test_a_closed_manager_opens_again(server: Server, prefix: str, from_url: Any) -> None:
    """Closing twice is no error; the next use connects anew."""
    flows = from_url(server.url, prefix=prefix)
    flow = create(flows)
    flows.close()
    flows.close()
    assert flows.get(flow.id) == flow


def test_the_context_connects_and_closes(server: Server, prefix: str) -> None:
    """`with` checks the server at once, and leaves no connection."""
    name = f"conn-{prefix}"
    with FlowManager.from_url(f"{server.url}?client_name={name}", prefix=prefix) as flows:
        flow = create(flows)
        list(flows.watch(flow, timeout=0.01))
        assert [c for c in server.client().client_list() if c["name"] == name]
    wait_until(
        lambda: not [c for c in server.client().client_list() if c["name"] == name],
        description="the connections are closed",
    )


def test_more_callers_than_connections_take_turns(server: Server, prefix: str, from_url: Any) -> None:
    """A blocking pool: nobody is turned away."""
    flows = from_url(server.url, prefix=prefix, max_connections=1)
    flow = flows.start_running(create(flows))
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(flows.update_state, flow, increment={"processed": 1}) for _ in range(80)]
        assert {call.result(30).revision for call in calls} == set(range(2, 82))


async def test_a_cancelled_call_leaves_no_reply_behind(server: Server, prefix: str) -> None:
    """Its connection is not used again: every later call gets its own answer."""
    async with AsyncFlowManager.from_url(server.url, prefix=prefix, max_connections=2) as flows:
        made = [await flows.create_managed(**WHO, state={"n": n}) for n in range(10)]
        for n in range(100):
            task = asyncio.create_task(flows.get(made[n % 10].id))
            for _ in range(n % 7):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            other = made[(n + 3) % 10]
            assert await flows.get(other.id) == other
        assert await flows.prune_terminal_flows(timedelta(0)) == 0
