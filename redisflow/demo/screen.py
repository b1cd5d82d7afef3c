"""What the demo shows: bars while it runs on a terminal, else lines; a table at the end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Self

import attrs
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from redisflow.flow import FlowStatus

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from redisflow.demo.coordinator import Report
    from redisflow.demo.plan import Plan

_COLOURS = {
    FlowStatus.CREATED: "white",
    FlowStatus.RUNNING: "cyan",
    FlowStatus.WAITING: "yellow",
    FlowStatus.FINISHED: "green",
    FlowStatus.FAILED: "red",
    FlowStatus.CANCELLED: "magenta",
}
_LINE_EVERY_S = 1.0


class Bars:
    """Progress bars, one per status."""

    def __init__(self, console: Console, total: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description:>9}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._tasks: dict[FlowStatus, TaskID] = {
            status: self._progress.add_task(f"[{_COLOURS[status]}]{status}", total=total) for status in FlowStatus
        }

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(line, style="bold", highlight=False)

    def update(self, counts: Mapping[FlowStatus, int]) -> None:
        """Move the bars."""
        for status, task in self._tasks.items():
            self._progress.update(task, completed=counts[status])


class Lines:
    """A line now and then, where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started_at = time.monotonic()
        self._next_at = self._started_at

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, line: str) -> None:
        """Print a line with the time since the start."""
        elapsed_s = time.monotonic() - self._started_at
        self._console.print(f"{elapsed_s:6.1f} s  {line}", highlight=False, markup=False, soft_wrap=True)

    def update(self, counts: Mapping[FlowStatus, int]) -> None:
        """Print the counts, at most once a second."""
        if time.monotonic() >= self._next_at:
            self._next_at = time.monotonic() + _LINE_EVERY_S
            self.say("  ".join(f"{status} {counts[status]}" for status in FlowStatus))


def screen_for(console: Console, total: int) -> Bars | Lines:
    """Bars on a terminal, lines elsewhere."""
    return Bars(console, total) if console.is_terminal else Lines(console)


def report_table(report: Report, plan: Plan) -> Table:
    """Everything that came of a run."""
    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    for name, figure, remark in _rows(report, plan):
        table.add_row(name, figure if isinstance(figure, str) else f"{figure:,}", remark)
        if name in {"imports", "cancelled", "cancels"}:
            table.add_section()
    return table


def _rows(report: Report, plan: Plan) -> list[tuple[str, int | str, str]]:
    cut = f"of {plan.found:,}, evenly spread" if plan.found > report.files else ""
    run_s, verify_s = report.seconds["run"], report.seconds["verify"]
    return [
        ("files", report.files, cut),
        *((name, total, "in the finished flows" if name == "lines" else "") for name, total in report.totals.items()),
        *((f"{status}", count, "") for status, count in report.statuses.items()),
        ("takeovers", report.takeovers, f"{report.victim} was killed, {report.held} flows in its hands"),
        ("reviews", report.reviews, "external events from the reviewer"),
        ("timers", report.timers, "resumed by the engine"),
        ("cancels", report.cancels, "requested by the coordinator"),
        ("changes", report.changes, f"{report.changes / run_s:,.0f} per second"),
        ("audit events", report.events, ""),
        ("throughput", f"{report.flows_per_s:,.1f}", "flows per second"),
        ("run", f"{run_s:.1f} s", "start of the processes included"),
        (
            "verification",
            f"{verify_s:.1f} s",
            f"{len(report.problems)} problems" if report.problems else "nothing is off",
        ),
    ]


def report_document(report: Report, plan: Plan) -> dict[str, Any]:
    """The report for programs."""
    document = attrs.asdict(report, recurse=False)
    return {**document, "root": str(plan.root), "found": plan.found, "flows_per_s": round(report.flows_per_s, 1)}
