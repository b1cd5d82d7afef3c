"""The processes of a run: started fresh, stopped by a closed line, killed on request."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from typing import TYPE_CHECKING, Any, Self

import attrs

from redisflow.errors import FlowError
from redisflow.manager import FlowManager

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

_STOP_WITHIN_S = 5.0


class CrewFailed(Exception):
    """A process of the run ended before it was told to."""


@attrs.frozen
class Server:
    """Where the flows of a run are."""

    url: str
    prefix: str

    def connect(self) -> FlowManager:
        """Return a manager of this process's own."""
        return FlowManager.from_url(self.url, prefix=self.prefix)


@attrs.frozen
class Member:
    """One process. Its role gets `(stop, *args)` and what it returns can be received once."""

    name: str
    process: SpawnProcess
    line: Connection

    @property
    def pid(self) -> int:
        """The process's id."""
        assert self.process.pid is not None  # noqa: S101 - it was started in `Crew.start`
        return self.process.pid

    def receive(self) -> Any:
        """Return what the role returned; waits for it.

        Raises:
            CrewFailed: it ended without.
        """
        try:
            outcome, value = self.line.recv()
        except EOFError:
            self.process.join()
            raise CrewFailed(f"{self.name} ended with exit code {self.process.exitcode}") from None
        if outcome == "error":
            raise CrewFailed(f"{self.name}: {value}")
        return value


class Crew:
    """Every process of a run; leaving the block ends them all."""

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self._context = multiprocessing.get_context("spawn")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, name: str, role: Callable[..., object], *args: object) -> Member:
        """Start a process that runs `role(stop, *args)`; `stop` is a `threading.Event`."""
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_run_role, args=(theirs, role, args), name=name, daemon=True)
        process.start()
        theirs.close()
        self.members[name] = Member(name, process, ours)
        return self.members[name]

    def check(self) -> None:
        """Raise CrewFailed if a process has failed."""
        for member in self.members.values():
            if member.process.exitcode not in (None, 0):
                member.receive()

    def pause(self, name: str) -> None:
        """Stop a process where it is, to look at what it holds."""
        os.kill(self.members[name].pid, signal.SIGSTOP)

    def go_on(self, name: str) -> None:
        """Let a paused process go on."""
        os.kill(self.members[name].pid, signal.SIGCONT)

    def kill(self, name: str) -> None:
        """Kill a process with SIGKILL: it gets no chance to tidy up."""
        member = self.members.pop(name)
        member.process.kill()
        member.process.join()
        member.line.close()

    def stop(self) -> None:
        """End every process: ask all, wait, kill what is left."""
        for member in self.members.values():
            member.line.close()
        for member in self.members.values():
            member.process.join(_STOP_WITHIN_S)
            if member.process.exitcode is None:
                member.process.kill()
                member.process.join()
        self.members.clear()


def _run_role(line: Connection, role: Callable[..., object], args: tuple[object, ...]) -> None:
    """Run a role in its own process; the coordinator closing its end of the line, or dying, is the stop signal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the coordinator decides
    stop = threading.Event()

    def wait_for_the_end() -> None:
        try:
            line.recv()
        except (EOFError, OSError):
            stop.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    try:
        outcome = ("result", role(stop, *args))
    except FlowError as error:
        outcome = ("error", str(error))
    try:
        line.send(outcome)
    except OSError:
        return
    if outcome[0] == "error":
        raise SystemExit(1)
