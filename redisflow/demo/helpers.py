"""The other roles of a run: who reviews, who resumes, who counts again."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

from redisflow.demo.plan import REVIEW_TOPIC
from redisflow.demo.sources import Unreadable, count_file, read_source
from redisflow.engine import WaitEngine
from redisflow.flow import FlowStatus, FlowStepStatus, StepObservation
from redisflow.waits import ExternalEvent

if TYPE_CHECKING:
    from threading import Event

    from redisflow.demo.crew import Server
    from redisflow.flow import Flow
    from redisflow.manager import FlowManager

_LOOK_EVERY_S = 0.1
_TICK_EVERY_S = 0.2
_LONG_LINE = 100


def drive_waits(stop: Event, server: Server) -> None:
    """Run a wait engine until stopped: timers and cancels of waiting flows."""
    with server.connect() as flows:
        WaitEngine(flows).run(_TICK_EVERY_S, stop)


def review(stop: Event, server: Server, root: str) -> None:
    """Answer every flow that waits for a review until stopped."""
    with server.connect() as flows:
        while not stop.wait(_LOOK_EVERY_S):
            for flow in flows.iter_by_status(FlowStatus.WAITING):
                condition = flow.condition
                if isinstance(condition, ExternalEvent) and condition.topic == REVIEW_TOPIC:
                    outcome = _review_one(flows, flow, condition, Path(root))
                    # None if the flow was cancelled meanwhile, or resumed: nothing to do then.
                    WaitEngine(flows).try_resume_external(flow.id, REVIEW_TOPIC, condition.correlation_id, outcome)


def _review_one(flows: FlowManager, flow: Flow, condition: ExternalEvent, root: Path) -> dict[str, object]:
    """Review a file; the review is on record as a mirrored step of its flow."""
    path = flow.state["path"]
    run_id = f"review:{condition.correlation_id}"

    def observe(status: FlowStepStatus, result: dict[str, object] | None = None) -> None:
        reviewer = f"reviewer:{os.getpid()}"
        flows.record_step_observation(StepObservation(flow.id, run_id, f"review {path}", status, reviewer, result))

    observe(FlowStepStatus.RUNNING)
    try:
        lines = read_source(root, path).splitlines()
    except Unreadable:
        lines = []  # the worker will say so when it parses the file
    outcome: dict[str, object] = {"approved": True, "long_lines": sum(len(line) > _LONG_LINE for line in lines)}
    observe(FlowStepStatus.SUCCEEDED, outcome)
    return outcome


def recount(stop: Event, root: str, paths: list[str]) -> dict[str, dict[str, int] | str]:
    """Count every file again, without flows: its counts, or why it cannot be counted."""
    gc.set_threshold(100_000, 20, 20)  # a syntax tree is many objects and no cycle
    counted: dict[str, dict[str, int] | str] = {}
    for path in paths:
        if stop.is_set():
            break
        try:
            counted[path] = count_file(Path(root), path)
        except Unreadable as reason:
            counted[path] = str(reason)
    return counted
