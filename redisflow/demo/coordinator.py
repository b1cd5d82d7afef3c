"""The coordinator: creates the flows, disturbs the run, and reports what came of it."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Protocol

import attrs

from redisflow.demo import helpers
from redisflow.demo.crew import Crew, CrewFailed
from redisflow.demo.plan import OWNER, Plan, Route
from redisflow.demo.sources import COUNTERS
from redisflow.demo.verify import Outcome, verify
from redisflow.demo.worker import work
from redisflow.flow import FlowStatus

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    from redisflow.demo.crew import Server
    from redisflow.flow import Flow
    from redisflow.manager import FlowManager

_KILL_AT = 0.25  # of the flows ended
_CANCEL_AT = 0.1
_HOLDS_AT_LEAST = 2
_LOOK_AT = 100
_LOOK_EVERY_S = 0.1
_STUCK_AFTER_S = 60.0


class Screen(Protocol):
    """Shows a run while it goes on."""

    def say(self, line: str) -> None:
        """Tell of something that happened."""

    def update(self, counts: Mapping[FlowStatus, int]) -> None:
        """Show how many flows there are in each status."""


@attrs.frozen(kw_only=True)
class Report:
    """What came of a run.

    Attributes:
        totals: every counter, over the finished flows.
        victim: the worker that was killed.
        held: flows it had in its hands.
        seconds: how long each part of the run took.
        problems: what the verification found off.
    """

    files: int
    totals: dict[str, int]
    statuses: dict[FlowStatus, int]
    events: int
    changes: int
    victim: str | None
    held: int
    takeovers: int
    reviews: int
    timers: int
    cancels: int
    seconds: dict[str, float]
    problems: list[str]

    @property
    def flows_per_s(self) -> float:
        """Flows brought to their end, per second of the run proper."""
        return self.files / self.seconds["run"]


def run(server: Server, plan: Plan, screen: Screen, *, workers: int = 4) -> Report:
    """Run the plan and verify the outcome; the flows are still there afterwards.

    Raises:
        CrewFailed: a process ended early, or nothing moves any more.
    """
    started_at = time.monotonic()
    with server.connect() as flows, Crew() as crew:
        root, paths = str(plan.root), list(plan.routes)
        names = [f"worker-{number}" for number in range(1, workers + 1)]
        for name in names:
            crew.start(name, work, server, root, name, plan.pace_s)
        crew.start("engine", helpers.drive_waits, server)
        crew.start("reviewer", helpers.review, server, root)
        recount = crew.start("recount", helpers.recount, root, paths)
        coordinator = Coordinator(flows, crew, screen)
        ids = coordinator.create(plan)
        coordinator.watch_over()
        ran_at = time.monotonic()
        screen.say("all flows have ended; waiting for the recount")
        counted = recount.receive()
    screen.say("verifying")
    with server.connect() as flows:
        outcome = Outcome.read(flows, ids, counted)
        problems = verify(flows, ids, outcome, coordinator.victim)
    seconds = {"run": ran_at - started_at, "verify": time.monotonic() - ran_at}
    return _report(outcome, coordinator, seconds, problems)


class Coordinator:
    """Watches over the flows of one run and disturbs them."""

    def __init__(self, flows: FlowManager, crew: Crew, screen: Screen) -> None:
        self.flows = flows
        self.crew = crew
        self.screen = screen
        self.victim: str | None = None
        self.held = 0
        self._total = 0
        self._cancelled = False

    def create(self, plan: Plan) -> list[UUID]:
        """Create one flow per file."""
        ids = []
        self._total = len(plan.routes)
        for path, route in plan.routes.items():
            flow = self.flows.create_managed(
                controller_id="redisflow-demo/count",
                goal=f"count {path}"[:1000],
                owner_session_key=OWNER,
                requester_origin="redisflow demo",
                current_step="read",
                state={"path": path, "route": route, "worker": None, **dict.fromkeys(COUNTERS, 0)},
            )
            ids.append(flow.id)
            if len(ids) % 200 == 0:
                self.screen.update(self.flows.count_by_status())
        return ids

    def watch_over(self) -> None:
        """Stay until every flow has ended; meanwhile request cancels, and kill a worker.

        Raises:
            CrewFailed: a process ended early, or nothing moves any more.
        """
        moved_at, last_counts = time.monotonic(), None
        while True:
            self.crew.check()
            counts = self.flows.count_by_status()
            self.screen.update(counts)
            ended = sum(counts[status] for status in FlowStatus if status.is_terminal)
            if ended == self._total:
                return
            if counts != last_counts:
                moved_at, last_counts = time.monotonic(), counts
            elif time.monotonic() > moved_at + _STUCK_AFTER_S:
                raise CrewFailed(f"nothing has moved for {_STUCK_AFTER_S:.0f} s, {self._total - ended} flows to go")
            if ended >= _CANCEL_AT * self._total:
                self._cancel_some()
            if ended >= _KILL_AT * self._total and self.victim is None:
                self._try_to_kill()
            time.sleep(_LOOK_EVERY_S)

    def _cancel_some(self) -> None:
        """Request the cancel of every parked flow, and once of some that are being worked on or still to come."""
        for flow in self.flows.list_by_status(FlowStatus.WAITING):
            if flow.state["route"] == Route.PARK and not flow.cancel_requested:
                self.flows.request_cancel(flow)
        if not self._cancelled:
            self._cancelled = True
            some = max(1, self._total // 200)
            for status in (FlowStatus.RUNNING, FlowStatus.CREATED):
                found = self.flows.list_by_status(status, limit=_LOOK_AT)
                for flow in [flow for flow in found if flow.state["route"] == Route.DIRECT][:some]:
                    self.flows.request_cancel(flow)

    def _try_to_kill(self) -> None:
        """Kill the worker with the most flows in its hands: stop it, look again, kill it or let it go on."""
        patient_until = time.monotonic() + _LOOK_EVERY_S
        while self.victim is None and time.monotonic() < patient_until:
            worker, held = self._busiest_worker()
            if held < _HOLDS_AT_LEAST:
                time.sleep(0.005)
                continue
            self.crew.pause(worker)
            if len(self._in_the_hands_of(worker)) < _HOLDS_AT_LEAST:  # it was quicker than we
                self.crew.go_on(worker)
                continue
            self.crew.kill(worker)
            self.victim = worker
            self.held = len(self._in_the_hands_of(worker))
            self.screen.say(f"{worker} killed with SIGKILL, {self.held} flows in its hands")

    def _busiest_worker(self) -> tuple[str, int]:
        running = self.flows.list_by_status(FlowStatus.RUNNING)
        hands = Counter(flow.state["worker"] for flow in running if flow.state["worker"] is not None)
        return max(hands.items(), key=lambda item: item[1], default=("", 0))

    def _in_the_hands_of(self, worker: str) -> list[Flow]:
        return [flow for flow in self.flows.list_by_status(FlowStatus.RUNNING) if flow.state["worker"] == worker]


def _report(outcome: Outcome, coordinator: Coordinator, seconds: dict[str, float], problems: list[str]) -> Report:
    return Report(
        files=len(outcome.flows),
        totals=outcome.totals(),
        statuses={status: len(outcome.ended_as(status)) for status in FlowStatus if status.is_terminal},
        events=outcome.n_events,
        changes=sum(flow.revision + 1 for flow in outcome.flows.values()),
        victim=coordinator.victim,
        held=coordinator.held,
        takeovers=outcome.takeovers(),
        reviews=outcome.resumed(Route.REVIEW),
        timers=outcome.resumed(Route.PAUSE),
        cancels=sum(flow.cancel_requested for flow in outcome.flows.values()),
        seconds=seconds,
        problems=problems,
    )
