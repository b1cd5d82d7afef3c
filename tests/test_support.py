"""The tests' own tools do what they say."""

from __future__ import annotations

import asyncio
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hiredis
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.support.leftovers import nothing_left, processes_in
from tests.support.proxy import (
    CUT_REPLY,
    CUT_REQUEST,
    DROP,
    HANG,
    HANG_REPLY,
    PASS,
    Fault,
    FaultProxy,
    Frames,
    aim,
    delay,
)
from tests.support.servers import ENGINES, Engine, Server
from tests.support.waiting import wait_until, wait_until_async

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
needs_proc = pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="finds processes in /proc")
INCR = "return redis.call('INCR', KEYS[1])"


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    """One server for the module."""
    with Server(ENGINES[0]) as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Server:
    """An empty server."""
    shared_server.client().flushall()
    return shared_server


def through(proxy: FaultProxy, **options: Any) -> redis.Redis:
    """Return a client that goes through the proxy and resends nothing."""
    settings: dict[str, Any] = {"host": "127.0.0.1", "port": proxy.port, "retry": Retry(NoBackoff(), 0)}
    return redis.Redis(**settings | options)


# --- servers


def test_there_is_an_engine_to_test_with() -> None:
    """The wheels bring their own servers: no machine tests nothing."""
    assert sum(engine.is_valkey for engine in ENGINES) >= 2
    assert all(engine.version >= (7, 0) for engine in ENGINES)


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_a_server_keeps_its_port_and_data_over_restart_and_crash(engine: Engine) -> None:
    """Stopped or killed, it comes back where it was with what it had."""
    with Server(engine) as server:
        client, port = server.client(), server.port
        client.set("a", 1)
        server.restart()
        client.set("b", 2)
        server.kill()
        assert not server.running
        server.start()
        assert server.port == port
        assert client.mget("a", "b") == [b"1", b"2"]
        with redis.Redis.from_url(server.unix_url) as local:
            assert local.get("a") == b"1"


def test_a_server_without_persistence_forgets() -> None:
    """`persistence=False` keeps nothing over a stop."""
    with Server(ENGINES[0], persistence=False) as server:
        server.client().set("a", 1)
        server.restart()
        assert server.client().dbsize() == 0


def test_config_arguments_win() -> None:
    """What a test asks for stands behind what the harness sets."""
    with Server(ENGINES[0], "--appendfsync", "always", "--appendonly", "no") as server:
        assert server.client().config_get("append*")["appendfsync"] == "always"
        assert server.client().config_get("appendonly") == {"appendonly": "no"}


def test_a_refused_setting_fails_loudly() -> None:
    """A server that does not start says why, in the words of its log."""
    with pytest.raises(RuntimeError, match="no-such-setting"), Server(ENGINES[0], "--no-such-setting", "1"):
        pass


def test_a_paused_server_answers_after_resume() -> None:
    """Frozen, it takes a command and runs it once it goes on."""
    with Server(ENGINES[0]) as server:
        hasty = server.client(socket_timeout=0.1)
        hasty.ping()
        server.pause()
        with pytest.raises(redis.TimeoutError):
            hasty.incr("n")
        server.resume()
        wait_until(lambda: server.client().get("n") == b"1", description="the command sent before the thaw ran")


def test_a_server_comes_back_as_it_was_configured() -> None:
    """What it rewrites its configuration to outlives it, unlike what it was merely told."""
    with Server(ENGINES[0]) as server:
        server.raw.config_set("hz", 23)
        server.raw.config_rewrite()
        server.raw.config_set("hz", 24)
        server.restart()
        assert server.raw.config_get("hz") == {"hz": "23"}


def test_a_frozen_server_is_not_up() -> None:
    """Neither is one that ended; a start makes it so, whatever it was before."""
    with Server(ENGINES[0]) as server:
        states = []
        for change in (server.pause, server.resume, server.pause, server.kill, server.start):
            change()
            states.append((server.running, server.up))
    assert states == [(True, False), (True, True), (True, False), (False, False), (True, True)]


@needs_proc
@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_a_crash_takes_a_saving_child_along(engine: Engine) -> None:
    """A child that writes a snapshot does not outlive its server."""
    with nothing_left() as folder, Server(engine, "--rdb-key-save-delay", "60000000") as server:
        server.raw.set("a", 1)
        server.raw.bgsave()
        assert len(processes_in(folder)) == 2


def test_a_taken_bus_port_is_not_fought_over() -> None:
    """A node of a cluster needs the port 10,000 above its own as well, and waits for it."""
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", 0))
        squatter.listen()
        late = Server(ENGINES[0], "--cluster-enabled", "yes", port=squatter.getsockname()[1] - 10_000)
        threading.Timer(0.3, squatter.close).start()
        with late:
            assert late.client().ping()


def test_a_taken_port_is_not_fought_over(server: Server) -> None:
    """A chosen port that another process binds first is replaced; a port asked for is waited for, then refused."""
    with Server(ENGINES[0]) as other:
        assert other.port != server.port
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", 0))
        squatter.listen()
        late = Server(ENGINES[0], port=squatter.getsockname()[1])
        threading.Timer(0.3, squatter.close).start()
        with late:
            assert late.client().ping()


def test_servers_die_with_the_test_process() -> None:
    """A killed test run leaves no server behind."""
    script = (
        "import time; from tests.support.servers import *\n"
        "s = Server(ENGINES[0]); s.start(); print(s.port, s.socket_path, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        port, socket_path = run.stdout.readline().split()
        socket.create_connection(("127.0.0.1", int(port))).close()
        run.kill()

    def is_gone() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", int(port))) != 0

    wait_until(is_gone, description="the server is gone")
    wait_until(lambda: not Path(socket_path).parent.exists(), description="so is its folder")


# --- waiting


def test_wait_until_returns_the_value_or_says_what_it_waited_for() -> None:
    """Success gives the value; failure reads like the thing that did not happen."""
    values = iter([0, 0, 7])
    assert wait_until(lambda: next(values), description="a value") == 7
    with pytest.raises(AssertionError, match=r"not within 0\.05 s: pigs fly \(last: 0\)"):
        wait_until(lambda: 0, description="pigs fly", timeout_s=0.05)
    attempts = iter([ValueError("not yet"), None])

    def succeeds_later() -> bool:
        if error := next(attempts):
            raise error
        return True

    assert wait_until(succeeds_later, description="no error", ignoring=(ValueError,))


async def test_wait_until_async_takes_functions_and_coroutine_functions() -> None:
    """The event loop runs while it waits."""
    happened = asyncio.Event()
    asyncio.get_running_loop().call_later(0.02, happened.set)
    assert await wait_until_async(happened.is_set, description="the event")

    async def answer() -> int:
        return 7

    assert await wait_until_async(answer, description="the answer") == 7
    with pytest.raises(AssertionError, match="pigs fly"):
        await wait_until_async(lambda: None, description="pigs fly", timeout_s=0.02)


# --- proxy

LOST = (redis.ConnectionError, redis.TimeoutError)
EFFECTS = [(CUT_REPLY, b"1"), (CUT_REQUEST, None), (DROP, None), (HANG, None), (HANG_REPLY, b"1")]


@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
@pytest.mark.parametrize(("fault", "stored"), EFFECTS, ids=[fault.kind for fault, _ in EFFECTS])
def test_a_fault_loses_the_request_or_only_the_reply(
    server: Server, fault: Fault, stored: bytes | None, reset: bool
) -> None:
    """The client sees a lost connection either way; whether the command ran depends on the fault alone."""
    with FaultProxy(server.port, reset=reset) as proxy, through(proxy, socket_timeout=0.7) as client:
        client.set("other", 1)
        proxy.inject(fault, "INCR")
        with pytest.raises(LOST):
            client.execute_command("INCR", "n")
        assert server.client().get("n") == stored
        assert proxy.faults == {fault.kind: 1}
        assert client.incr("n") == int(stored or 0) + 1


def test_a_delayed_command_runs_late(server: Server) -> None:
    """The command waits in the proxy, then everything is as ever."""
    with FaultProxy(server.port, aim(delay(0.2), "INCRBY")) as proxy, through(proxy) as client:
        client.ping()
        started_at = time.monotonic()
        assert client.incr("n") == 1  # redis-py says INCRBY
        assert time.monotonic() - started_at >= 0.2
        assert proxy.faults == {"delay": 1}


@pytest.mark.parametrize("protocol", [2, 3])
def test_faults_hit_scripts_and_never_the_handshake(server: Server, protocol: int) -> None:
    """Left alone, a plan aims at EVALSHA and EVAL; HELLO, CLIENT, SELECT and the rest pass."""
    with FaultProxy(server.port) as proxy, through(proxy, protocol=protocol, db=3) as client:
        proxy.cut_next_reply()
        client.set("n", 5)
        with pytest.raises(redis.ConnectionError):
            client.eval(INCR, 1, "n")
        assert client.eval(INCR, 1, "n") == 7
        assert proxy.faults == {"cut_reply": 1}


@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
@pytest.mark.parametrize(("fault", "ran"), [(CUT_REPLY, "abc"), (CUT_REQUEST, "a")], ids=["reply", "request"])
def test_a_pipeline_is_cut_at_the_command_aimed_at(server: Server, fault: Fault, ran: str, reset: bool) -> None:
    """Replies before the cut arrive; commands behind a lost reply ran, those behind a lost request did not."""
    direct = server.client()
    with FaultProxy(server.port, lambda command: fault if command[1] == b"b" else PASS, reset=reset) as proxy:
        with connect(proxy) as raw:
            raw.sendall(b"".join(packed("INCR", name) for name in "abc"))
            assert read_to_end(raw) == b":1\r\n"
        wait_until(lambda: direct.exists(*"abc") == len(ran), description=f"just {ran} ran")
        assert direct.exists(*ran) == len(ran)


def test_large_payloads_pass_unharmed(server: Server) -> None:
    """Megabytes, split anywhere, binary, in both directions and in nested replies."""
    payload = random.Random(7).randbytes(3_000_000)
    with FaultProxy(server.port) as proxy, through(proxy) as client:
        with client.pipeline(transaction=True) as pipeline:
            for number in range(8):
                pipeline.set(f"k{number}", payload)
            pipeline.mget([f"k{number}" for number in range(8)])
            assert pipeline.execute()[-1] == [payload] * 8
        client.rpush("list", *range(50_000))
        assert len(client.lrange("list", 0, -1)) == 50_000


def test_thousands_of_connections_leave_nothing_behind(server: Server) -> None:
    """Every third connection is cut; the counts agree, and the proxy's thread ends."""
    threads_before = threading.active_count()
    seen = 0

    def every_third(command: list[bytes]) -> Fault:
        nonlocal seen
        if command[0] != b"INCR":
            return PASS
        seen += 1
        return CUT_REPLY if seen % 3 == 0 else PASS

    with FaultProxy(server.port, every_third) as proxy:
        for _ in range(2_000):
            with connect(proxy) as raw:
                send(raw, "INCR", "n")
                raw.recv(64)
        crowd = [connect(proxy) for _ in range(200)]
        wait_until(lambda: proxy.connections == 2_200, description="the proxy took every connection")
        for raw in crowd:
            raw.close()
    assert proxy.faults == {"cut_reply": 666}
    assert server.client().get("n") == b"2000"
    assert threading.active_count() == threads_before


def test_sever_closes_every_connection(server: Server) -> None:
    """Idle connections and blocked ones end alike."""
    with FaultProxy(server.port) as proxy, connect(proxy) as idle, connect(proxy) as blocked:
        send(blocked, "BLPOP", "none", "0")
        waiting = server.client()
        wait_until(lambda: waiting.info("clients")["blocked_clients"] == 1, description="the client is blocked")
        proxy.sever()
        assert read_to_end(idle) == read_to_end(blocked) == b""
        wait_until(lambda: waiting.info("clients")["blocked_clients"] == 0, description="the server noticed")


def test_messages_that_answer_nothing_are_not_taken_for_replies(server: Server) -> None:
    """A pushed invalidation between command and reply moves no fault to another command."""
    with FaultProxy(server.port) as proxy, connect(proxy) as raw:
        replies = hiredis.Reader()
        send(raw, "HELLO", "3")
        send(raw, "CLIENT", "TRACKING", "ON")
        send(raw, "GET", "watched")
        wait_until(lambda: receive(raw, replies) is None, description="GET is answered")
        server.client().set("watched", 1)
        assert isinstance(wait_until(lambda: receive(raw, replies), description="a push"), list)
        proxy.inject(CUT_REPLY, "INCR")
        send(raw, "ECHO", "hello")
        assert receive(raw, replies) == b"hello"
        send(raw, "INCR", "n")
        assert read_to_end(raw) == b""


def test_a_mistake_in_a_plan_comes_to_light(server: Server) -> None:
    """What a plan raises is raised again when the proxy is left."""

    def mistaken(command: list[bytes]) -> Fault:
        raise LookupError(command[0])

    with (
        pytest.raises(LookupError),
        FaultProxy(server.port, mistaken) as proxy,
        through(proxy) as client,
        pytest.raises(redis.ConnectionError),
    ):
        client.ping()


def test_frames_end_where_values_end() -> None:
    """However the bytes arrive, the same values come out."""
    values = [
        *(b"+OK\r\n", b":12\r\n", b"$3\r\na\r\n\r\n", b"$-1\r\n", b"*-1\r\n", b"*0\r\n", b"$0\r\n\r\n", b"_\r\n"),
        *(b"*2\r\n*1\r\n:1\r\n*2\r\n$1\r\nx\r\n+y\r\n", b"%1\r\n+k\r\n*1\r\n#t\r\n", b"=5\r\ntxt:a\r\n", b",1.5\r\n"),
        *(b"|1\r\n+k\r\n:1\r\n:99\r\n", b">2\r\n+inv\r\n*1\r\n$1\r\nk\r\n", b"~1\r\n:1\r\n", b"-ERR no\r\n"),
    ]
    stream = b"".join(values)
    for size in (1, 2, 3, 7, len(stream)):
        frames = Frames()
        chunks = [stream[at : at + size] for at in range(0, len(stream), size)]
        assert [frame for chunk in chunks for frame in frames.feed(chunk)] == values


def connect(proxy: FaultProxy) -> socket.socket:
    """Open a connection that does just what the test says."""
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=10)


def packed(*command: str) -> bytes:
    """Return a command as it is sent."""
    return b"*%d\r\n" % len(command) + b"".join(b"$%d\r\n%b\r\n" % (len(a), a.encode()) for a in command)


def send(raw: socket.socket, *command: str) -> None:
    """Send a command and wait for nothing."""
    raw.sendall(packed(*command))


def receive(raw: socket.socket, replies: hiredis.Reader) -> Any:
    """Return the next reply, or pushed message."""
    while (reply := replies.gets()) is False:
        replies.feed(raw.recv(65536))
    return reply


def read_to_end(raw: socket.socket) -> bytes:
    """Return what arrives before the connection ends, in whichever way."""
    received = b""
    try:
        while data := raw.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received
