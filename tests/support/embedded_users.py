"""Processes that share the server of a folder, and what can be found out about it from outside."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from redisflow import embedded
from tests.support.waiting import wait_until

# Joins, says so, and leaves when told to; then says that too.
USER = """
import sys
from pathlib import Path
from redisflow.embedded import join
directory = Path(sys.argv[1]) if sys.argv[1:] else None
print("ready", flush=True)
sys.stdin.readline()
with join(directory) as lease:
    print(lease.socket_path, flush=True)
    sys.stdin.readline()
print("left", flush=True)
"""


class User:
    """A process of its own that uses the server of a folder."""

    def __init__(self, directory: Path | None, script: str = USER, *, hold: bool = False) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *([str(directory)] if directory else [])],
            cwd=Path(embedded.__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if not hold:
            self.go()
            self.socket_path = self.joined()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.kill()
        self.process.communicate()

    def go(self) -> None:
        """Let it join, once it has come so far."""
        assert self.says() == "ready"
        self.tell("join")

    def joined(self) -> Path:
        """Return the socket it was given."""
        return Path(self.says())

    def leave(self) -> None:
        """Let it leave as a program that ends."""
        self.tell("leave")
        assert self.says() == "left"

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.wait()

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()


class Client:
    """Short-lived connections to a socket, so that none is left over from a server that is gone."""

    def __init__(self, socket_path: Path) -> None:
        self._options: dict[str, Any] = {"unix_socket_path": str(socket_path), "retry": Retry(NoBackoff(), 0)}

    def __call__(self, *command: str | int) -> Any:
        with redis.Redis(**self._options) as connection:
            return connection.execute_command(*command)

    def server_pid(self) -> int:
        return int(self("INFO", "server")["process_id"])


def unused(directory: Path) -> bool:
    """Say whether nobody holds any of the folder's locks."""
    for name in ("users.lock", "supervisor.lock", "server.lock"):
        with (directory / name).open("a") as file:
            try:
                (fcntl.lockf if name == "server.lock" else fcntl.flock)(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
    return True


def alive(pid: int) -> bool:
    """Say whether the process runs; one that is dead and not yet reaped does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except FileNotFoundError:  # gone in between; or no /proc here, and somebody who reaps
        return not Path("/proc/self/stat").exists()


def parent(pid: int) -> int:
    """Return the process that started it, or took it in."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def kill(pid: int) -> None:
    """End a process as a crash would."""
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not alive(pid), description=f"process {pid} is dead")


def starts(directory: Path) -> int:
    """Count the servers that were ever started in the folder."""
    return (directory / "server.log").read_text().count("just started")


def supervised(directory: Path) -> bool:
    """Say whether the folder has a supervisor."""
    with (directory / "supervisor.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def kill_supervisor(directory: Path, server_pid: int) -> None:
    """End the supervisor as a crash would; its lock goes with the last of its threads."""
    kill(parent(server_pid))
    wait_until(lambda: not supervised(directory), description="the supervisor's lock is free")
