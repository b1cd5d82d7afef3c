"""Contestants in processes of their own: started here, driven by JSON lines, ended by handle."""

from __future__ import annotations

import json
import os
import select
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import attrs

_ROOT = Path(__file__).parent.parent.parent
_PYTHON = _ROOT / ".venv-peers" / "bin" / "python"
_ANSWERS_WITHIN_S = 120.0
_ENDS_WITHIN_S = 5.0
# All that a worker has of our environment: no setting of somebody's shell changes what is measured.
_ENVIRONMENT = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH")


class WorkerFailed(Exception):
    """A contestant does not start, is too slow to be measured, or did not store what it acknowledged."""


@attrs.frozen
class Load:
    """What each measurement is: see `worker.py`."""

    callers: int
    changes: int
    limit_s: float
    shared: bool = False


@attrs.define(eq=False)
class Worker:
    """A running contestant. `about` is what it says of itself; the counts are of all its measurements."""

    about: str
    _process: subprocess.Popen[str]
    _log: Path
    changes: int = 0
    refused: int = 0

    def rate(self, load: Load) -> float:
        """Acknowledged changes per second."""
        line = json.dumps(attrs.asdict(load)) + "\n"
        with _explained(self._log):
            stdin = _pipe(self._process.stdin)
            stdin.write(line)
            stdin.flush()
            answer = _answer(self._process)
        self.changes += answer["changes"]
        self.refused += answer["refused"]
        return float(answer["changes"] / answer["seconds"])


def peers_python() -> Path | None:
    """The interpreter of the peers' environment, if it was made."""
    return _PYTHON if _PYTHON.exists() else None


@contextmanager
def working(python: Path, contestant: str, folder: Path, redis_url: str = "") -> Iterator[Worker]:
    """Run a contestant, `MODULE:CLASS` of this folder."""
    folder.mkdir()
    log = folder / "log"
    command = [str(python), "-m", "benchmarks.peers.worker", contestant, str(folder), redis_url]
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=_ROOT,
            env=environment,
        )
    try:
        with _explained(log):
            about = _answer(process)["about"]
        yield Worker(about, process, log)
        _pipe(process.stdin).close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_ENDS_WITHIN_S)
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # what a killed one has not read
                _pipe(pipe).close()


@contextmanager
def _explained(log: Path) -> Iterator[None]:
    """Show what the worker said last."""
    try:
        yield
    except (OSError, WorkerFailed) as error:
        said = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise WorkerFailed(f"{log.parent.name}: {error}\n{said}") from error


def _answer(process: subprocess.Popen[str]) -> Mapping[str, Any]:
    stdout = _pipe(process.stdout)
    # A line is an answer, and no line comes unasked: nothing can be waiting in our buffer.
    readable, _, _ = select.select([stdout], [], [], _ANSWERS_WITHIN_S)
    if not readable:
        raise WorkerFailed(f"no answer within {_ANSWERS_WITHIN_S:.0f} s")
    line = stdout.readline()
    if not line:
        raise WorkerFailed("it ended")
    answer: Mapping[str, Any] = json.loads(line)
    return answer


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe
