"""A worker: claims flows, takes each as far as it goes, and takes over the flows of workers gone quiet.

Every change carries `expected_revision`, so a worker that lost its flow, to a takeover or to a cancel, learns it
from the next change it tries and nothing it did is counted twice.
"""

from __future__ import annotations

import gc
import random
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from redisflow.demo.plan import REVIEW_TOPIC, Route
from redisflow.demo.sources import Unreadable, count_lines, count_statements, parse_source, read_source
from redisflow.errors import AlreadyTerminal, CancelPending, IllegalTransition, RevisionMismatch
from redisflow.flow import FlowStatus
from redisflow.waits import ExternalEvent, Manual, Timer

if TYPE_CHECKING:
    import ast
    from threading import Event

    from redisflow.demo.crew import Server
    from redisflow.flow import Flow
    from redisflow.manager import FlowManager

BATCH = 4  # flows a worker holds at once
LOOK_AT = 16  # flows it chooses them from
QUIET = timedelta(seconds=3)  # a running flow unchanged for so long has lost its worker
PAUSE = timedelta(milliseconds=500)
_IDLE_S = 0.05
_QUIET_LOOKS_EVERY_S = 0.5
# Where a flow stands that was resumed from a wait and that no worker has yet.
_AFTER_A_WAIT = {Route.REVIEW, Route.PAUSE}
_LOST = (RevisionMismatch, IllegalTransition, AlreadyTerminal)


def work(stop: Event, server: Server, root: str, name: str, pace_s: float) -> None:
    """Work until stopped."""
    gc.set_threshold(100_000, 20, 20)  # a syntax tree is many objects and no cycle
    with server.connect() as flows:
        worker = Worker(flows, Path(root), name)
        while not stop.is_set():
            batch = worker.claim()
            for flow in batch:
                stop.wait(pace_s)
                worker.advance(flow)
            if not batch:
                stop.wait(_IDLE_S)


class Worker:
    """One worker's view of the shared flows."""

    def __init__(self, flows: FlowManager, root: Path, name: str) -> None:
        self.flows = flows
        self.root = root
        self.name = name
        self._trees: dict[str, ast.Module] = {}
        self._clock_ahead = timedelta()
        self._next_quiet_look = 0.0

    def claim(self) -> list[Flow]:
        """Make up to BATCH flows this worker's: quiet ones, then resumed ones, then new ones."""
        mine: list[Flow] = []
        for flow in [*self._quiet(), *self._resumed(), *self._new()]:
            if len(mine) == BATCH:
                break
            claimed = self._try_claim(flow)
            if claimed is not None:
                mine.append(claimed)
        return mine

    def advance(self, flow: Flow) -> None:
        """Take a flow of this worker's through its steps until it ends, waits, or is lost."""
        held = flow
        try:
            while (after := self._step(held)) is not None:
                held = after
        except Unreadable as reason:
            self._fail(held, str(reason))
        except (CancelPending, *_LOST):
            self._give_up(held)
        self._trees.clear()

    def _quiet(self) -> list[Flow]:
        """Running flows nobody has changed for QUIET, by the server's clock."""
        if time.monotonic() < self._next_quiet_look:
            return []
        self._next_quiet_look = time.monotonic() + _QUIET_LOOKS_EVERY_S
        before = datetime.now(UTC) + self._clock_ahead - QUIET
        return self.flows.list_by_status(FlowStatus.RUNNING, limit=LOOK_AT, updated_before=before)

    def _resumed(self) -> list[Flow]:
        running = self.flows.list_by_status(FlowStatus.RUNNING, limit=LOOK_AT)
        return [flow for flow in running if flow.state["worker"] is None and flow.current_step in _AFTER_A_WAIT]

    def _new(self) -> list[Flow]:
        """Created flows in an order of this worker's own, so that workers seldom try the same one."""
        created = self.flows.list_by_status(FlowStatus.CREATED, limit=LOOK_AT)
        random.shuffle(created)
        return created

    def _try_claim(self, flow: Flow) -> Flow | None:
        """Write this worker's name into a flow; `None` if another worker was first, or a cancel is pending."""
        holder = flow.state["worker"]
        patch = {"worker": self.name}
        if flow.status is FlowStatus.RUNNING and holder is not None:
            patch["taken_from"] = holder
        try:
            if flow.status is FlowStatus.CREATED:
                flow = self.flows.start_running(flow, expected_revision=flow.revision)
            claimed = self.flows.update_state(flow, patch, expected_revision=flow.revision)
        except (CancelPending, *_LOST):
            self._give_up(flow)
            return None
        self._clock_ahead = claimed.updated_at - datetime.now(UTC)
        return claimed

    def _give_up(self, flow: Flow) -> None:
        """Let go of a flow that cannot be changed as it is; if its cancel was requested, cancel it."""
        latest = self.flows.get(flow.id)
        if latest is not None and latest.cancel_requested and not latest.status.is_terminal:
            with suppress(AlreadyTerminal):  # another worker noticed the request as well
                self.flows.cancel(latest)

    def _fail(self, flow: Flow, reason: str) -> None:
        try:
            self.flows.fail(flow, reason, expected_revision=flow.revision)
        except (CancelPending, *_LOST):
            self._give_up(flow)

    # --- the steps: each returns the flow to go on with, `None` when there is nothing more to do now ------------

    def _step(self, flow: Flow) -> Flow | None:
        match flow.current_step:
            case "read":
                return self._read(flow)
            case Route.REVIEW | Route.PAUSE | Route.PARK:
                return self._go_on_or_wait(flow)
            case "parse":
                return self._parse(flow)
            case "count":
                return self._count(flow)
            case _:
                self.flows.finish(flow, {"finished_by": self.name}, expected_revision=flow.revision)
                return None

    def _read(self, flow: Flow) -> Flow:
        source = read_source(self.root, flow.state["path"])
        route = Route(flow.state["route"])
        return self.flows.update_state(
            flow,
            {"bytes": len(source)},
            next_step="parse" if route is Route.DIRECT else route,
            increment={"lines": count_lines(source)},
            expected_revision=flow.revision,
        )

    def _go_on_or_wait(self, flow: Flow) -> Flow | None:
        """Go on to `parse` if what the flow waited for has happened, else let go of it and set it waiting."""
        patch: dict[str, object] = {"worker": None}
        wait: ExternalEvent | Timer | Manual
        match Route(flow.current_step):
            case Route.REVIEW:
                over = "resume_event" in flow.state
                wait = ExternalEvent(REVIEW_TOPIC, str(flow.id))
            case Route.PAUSE:
                until = patch["pause_until"] = flow.state.get("pause_until", flow.updated_at + PAUSE)
                over = flow.updated_at >= until
                wait = Timer(until)
            case _:
                over, wait = False, Manual()
        if over:
            return self.flows.update_state(flow, next_step="parse", expected_revision=flow.revision)
        flow = self.flows.update_state(flow, patch, expected_revision=flow.revision)
        self.flows.set_waiting(flow, wait, expected_revision=flow.revision)
        return None

    def _parse(self, flow: Flow) -> Flow:
        path = flow.state["path"]
        self._trees[path] = parse_source(read_source(self.root, path))
        return self.flows.update_state(flow, next_step="count", expected_revision=flow.revision)

    def _count(self, flow: Flow) -> Flow:
        path = flow.state["path"]
        if path not in self._trees:  # the worker that parsed it is gone
            self._trees[path] = parse_source(read_source(self.root, path))
        return self.flows.update_state(
            flow,
            next_step="finish",
            increment=count_statements(self._trees.pop(path)),
            expected_revision=flow.revision,
        )
