"""Where a run takes place: a server of its own or the one given, left as it was found."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import attrs

from redisflow.demo.coordinator import run
from redisflow.demo.crew import Server
from redisflow.demo.plan import OWNER

if TYPE_CHECKING:
    from redisflow.demo.coordinator import Report, Screen
    from redisflow.demo.plan import Plan

_REMOVED_WITHIN_S = 5.0


class NotEmpty(Exception):
    """The namespace has flows already, so nothing could be verified there."""


@attrs.frozen
class Performance:
    """A run that took place.

    Attributes:
        kept_at: where its flows still are, if they were kept.
    """

    report: Report
    kept_at: Server | None


def perform(url: str | None, prefix: str, plan: Plan, screen: Screen, *, keep: bool) -> Performance:
    """Run the plan on the server at `url`, or on an embedded one; what it leaves is removed.

    The flows are kept if asked to, and if the verification finds a problem: somebody will want to look.

    Raises:
        NotEmpty: `prefix` has flows already.
        CrewFailed: a process ended early, or nothing moves any more.
    """
    folder = None
    if url in {None, "", "embedded://"}:  # a folder all processes can name
        folder = Path(tempfile.mkdtemp(prefix="redisflow-demo-"))
        url = f"embedded://{quote(str(folder))}"
    server = Server(str(url), prefix)
    kept = False
    try:
        with server.connect() as flows:
            if any(flows.count_by_status().values()):
                raise NotEmpty(f"namespace {prefix!r} has flows already; give the demo another --prefix")
            try:
                report = run(server, plan, screen)
                kept = keep or bool(report.problems)
            finally:
                if folder is None and not kept:
                    for flow in flows.iter_by_owner(OWNER):
                        flows.delete(flow.id)
    finally:
        if folder is not None and not kept:
            _remove(folder)
    return Performance(report, server if kept else None)


def _remove(folder: Path) -> None:
    """Remove the folder of a server that is about to stop: again, while it still writes."""
    patient_until = time.monotonic() + _REMOVED_WITHIN_S
    while folder.exists() and time.monotonic() < patient_until:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.02)
