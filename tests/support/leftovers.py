"""What servers leave behind: nothing, if all is well."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.waiting import wait_until


@contextmanager
def nothing_left() -> Iterator[Path]:
    """Have every server's folder made in one of its own; demand that it is empty at the end, and no process in it."""
    with tempfile.TemporaryDirectory(prefix="rf-") as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        patch.setattr(tempfile, "tempdir", name)
        yield folder
        assert not list(folder.iterdir())
        wait_until(lambda: not processes_in(folder), description="no process is left")


def processes_in(folder: Path) -> list[int]:
    """Return who works in a folder, removed or not; the dead do not."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended meanwhile
            if (process / "cwd").readlink().is_relative_to(folder):
                found.append(int(process.name))
    return found
