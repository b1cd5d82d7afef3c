"""The command line: look at flows, move them by hand, run a wait engine, run the demo."""

from __future__ import annotations

import importlib.metadata
import io
import itertools
import json
import logging
import os
import re
import signal
import sys
import threading
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

import attrs
import click

from redisflow import render
from redisflow.diagnosis import Severity
from redisflow.engine import WaitEngine
from redisflow.errors import (
    AlreadyTerminal,
    CancelPending,
    FlowError,
    FlowNotFound,
    IllegalTransition,
    InvalidData,
    LayoutMismatch,
    PartialFailure,
    RevisionMismatch,
    StorageError,
)
from redisflow.flow import TERMINAL, FlowStatus
from redisflow.manager import FlowManager

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import FrameType

    from redisflow.flow import Flow, FlowEvent
    from redisflow.ops.waits import Tick

_REFUSED, _BAD_INPUT, _NOT_FOUND, _STORAGE, _OFF, _WARNINGS = 1, 2, 3, 4, 5, 6
_INTERRUPTED, _OUTPUT_CLOSED = 128 + signal.SIGINT, 128 + signal.SIGPIPE
_EXIT_CODES: dict[type[FlowError], int] = {
    AlreadyTerminal: _REFUSED,
    CancelPending: _REFUSED,
    IllegalTransition: _REFUSED,
    RevisionMismatch: _REFUSED,
    InvalidData: _BAD_INPUT,
    FlowNotFound: _NOT_FOUND,
    StorageError: _STORAGE,
    LayoutMismatch: _STORAGE,
}
_EPILOG = """\b
Exit codes:
    0  done
    1  refused: the flow has ended, has a cancel pending, or moved on
    2  wrong usage, or data that makes no sense
    3  there is no such flow
    4  storage: the server cannot be reached or refuses, or the output cannot be written
    5  something is off: an error the doctor found, or the demo's verification
    6  the doctor found warnings and no error
  130  interrupted
  141  nobody reads the output any more

--json prints one JSON document (events: one a line), times as RFC 3339 and bytes as base64 text.
"""
_CALL_DEADLINE_S = 5.0  # somebody is waiting at the prompt
_RECENT_EVENTS = 10
_PROBLEMS_SHOWN = 20
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code; whatever a user can get wrong is one line on standard error."""
    _prepare_output()
    try:
        outcome = redisflow.main(arguments, prog_name="redisflow", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except FlowError as error:
        return _complain(str(error), exit_code(error))
    except (KeyboardInterrupt, click.Abort):
        return _INTERRUPTED
    return outcome if isinstance(outcome, int) else 0


class _Commands(click.Group):
    """The commands; output that cannot be written ends each of them the same way."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            outcome = super().invoke(ctx)
            sys.stdout.flush()
        except OSError as error:
            # What is left in the buffer would be written, and complained about, once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _OUTPUT_CLOSED if isinstance(error, BrokenPipeError) else _complain(str(error), _STORAGE)
        return outcome


def _prepare_output() -> None:
    """Make what is printed safe to print, and warnings one line like errors."""
    if sys.stdout is None:  # closed by whoever started us
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - open to the end
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="Warning: %(message)s", level=logging.WARNING)
    warnings.showwarning = lambda message, *_args, **_options: click.echo(f"Warning: {message}", err=True)


def exit_code(error: FlowError) -> int:
    """Return the exit code that tells a script what kind of error it was: of several, that of the first."""
    if isinstance(error, PartialFailure):
        return exit_code(error.failed[0].error)
    return next((code for kind, code in _EXIT_CODES.items() if isinstance(error, kind)), _REFUSED)


def _complain(message: str, code: int) -> int:
    click.echo(f"Error: {render.inert(message)}", err=True)
    return code


# --- what is typed -------------------------------------------------------------------------------------


def _duration(context: click.Context, option: click.Parameter, text: str) -> timedelta:
    """Parse a span such as 30d, 12h, 5m, 90s or 1d12h."""
    parts = re.findall(r"(\d+)([smhdw])", text, re.ASCII)
    if not parts or "".join(map("".join, parts)) != text:
        raise click.BadParameter(f"{text!r} is not a duration such as 30d, 12h, 5m or 90s", context, option)
    try:
        span = timedelta(seconds=sum(int(count) * _UNIT_SECONDS[unit] for count, unit in parts))
        datetime.now(UTC) - span
    except (OverflowError, ValueError):
        raise click.BadParameter(f"{text!r} reaches back too far", context, option) from None
    return span


def _json_value(context: click.Context, option: click.Parameter, text: str | None) -> Any:
    """Parse a JSON value."""
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"not JSON: {error}", context, option) from None


@attrs.frozen
class Server:
    """Where the flows are, as the options say."""

    url: str | None
    prefix: str

    def connect(self, *, allow_eviction: bool = False) -> FlowManager:
        """Return a manager; the connection is made when it is entered."""
        return FlowManager.from_url(
            self.url, prefix=self.prefix, deadline_s=_CALL_DEADLINE_S, allow_eviction=allow_eviction
        )


Command = TypeVar("Command", bound="Callable[..., Any]")


def _json_option(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(command)


def _expected_revision_option(command: Command) -> Command:
    return click.option(
        "--expected-revision",
        type=click.IntRange(min=0),
        metavar="N",
        help="Refuse unless the flow is at this revision.",
    )(command)


def _version() -> str:
    try:
        return importlib.metadata.version("redisflow")
    except importlib.metadata.PackageNotFoundError:
        return "from a source tree"


_flow_id = click.argument("flow_id", metavar="ID", type=click.UUID)


# --- the commands --------------------------------------------------------------------------------------


@click.group(
    cls=_Commands,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--url",
    metavar="URL",
    help="Where the flows are: redis://, rediss://, unix:// or embedded:///dir. "
    "Default: $REDISFLOW_URL, else redis://localhost:6379/0.",
)
@click.option("--prefix", default="redisflow", show_default=True, metavar="NAME", help="The namespace on it.")
@click.version_option(_version())
@click.pass_context
def redisflow(context: click.Context, url: str | None, prefix: str) -> None:
    """Look at flows, move them by hand, and run what drives them."""
    context.obj = Server(url, prefix)


@redisflow.command("list")
@click.option("--owner", metavar="NAME", help="Only flows of this owner, newest first.")
@click.option("--status", type=click.Choice([status.value for status in FlowStatus]), help="Only flows in this status.")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, metavar="N", help="At most N.")
@_json_option
@click.pass_obj
def list_flows(server: Server, owner: str | None, status: str | None, limit: int, *, as_json: bool) -> None:
    """List flows.

    Without --owner the longest unchanged come first, status by status, live ones before ended ones.
    """
    wanted = FlowStatus(status) if status is not None else None
    with server.connect() as flows:
        found = list(itertools.islice(_matching(flows, owner, wanted), limit + 1))
    shown = found[:limit]
    if as_json:
        click.echo(render.to_json([render.flow_document(flow) for flow in shown]))
    else:
        render.show(render.flows_table(shown, width=render.console().width))
    if len(found) > limit:
        click.echo(f"There are more than {limit}; --limit shows more.", err=True)


def _matching(flows: FlowManager, owner: str | None, status: FlowStatus | None) -> Iterator[Flow]:
    if owner is not None:
        yield from (flow for flow in flows.iter_by_owner(owner) if status in {None, flow.status})
        return
    for each in FlowStatus if status is None else (status,):
        yield from flows.iter_by_status(each)


@redisflow.command("show")
@_flow_id
@_json_option
@click.pass_obj
def show_flow(server: Server, flow_id: UUID, *, as_json: bool) -> None:
    """Show a flow, its steps and its latest events."""
    with server.connect() as flows:
        flow = _existing(flows, flow_id)
        steps = flows.list_steps(flow_id)
        events = flows.list_events(flow_id, limit=_RECENT_EVENTS)
    if as_json:
        document = {
            "flow": render.flow_document(flow),
            "steps": [render.step_document(step) for step in steps],
            "events": [render.event_document(event) for event in events],
        }
        click.echo(render.to_json(document))
        return
    render.show(render.flow_table(flow))
    if steps:
        click.echo("\nsteps")
        render.show(render.steps_table(steps))
    click.echo("\nlatest events")
    _print_events(events, as_json=False)


def _existing(flows: FlowManager, flow_id: UUID) -> Flow:
    flow = flows.get(flow_id)
    if flow is None:
        raise FlowNotFound(flow_id)
    return flow


@redisflow.command("events")
@_flow_id
@click.option("--follow", "-f", is_flag=True, help="Go on with events as they happen, until the flow has ended.")
@_json_option
@click.pass_obj
def list_flow_events(server: Server, flow_id: UUID, *, follow: bool, as_json: bool) -> None:
    """Print a flow's audit trail, oldest first."""
    with server.connect() as flows:
        _existing(flows, flow_id)
        trail = flows.watch(flow_id, after="0-0") if follow else flows.iter_events(flow_id)
        _print_events(trail, as_json=as_json)


def _print_events(events: Iterable[FlowEvent], *, as_json: bool) -> None:
    """Print each event as it comes."""
    output = render.console()
    for event in events:
        if as_json:
            click.echo(render.to_json(render.event_document(event)))
        else:
            output.print(render.event_line(event), no_wrap=True, overflow="ellipsis")


@redisflow.command("cancel")
@_flow_id
@click.option("--request", is_flag=True, help="Only request it: whoever works on the flow cancels it.")
@_expected_revision_option
@_json_option
@click.pass_obj
def cancel_flow(server: Server, flow_id: UUID, *, request: bool, expected_revision: int | None, as_json: bool) -> None:
    """Cancel a flow, whatever it is doing."""
    with server.connect() as flows:
        verb = flows.request_cancel if request else flows.cancel
        _print_changed(verb(flow_id, expected_revision=expected_revision), as_json=as_json)


@redisflow.command("resume")
@_flow_id
@click.option("--patch", callback=_json_value, metavar="JSON", help="Merge this into the flow's state.")
@_expected_revision_option
@_json_option
@click.pass_obj
def resume_flow(server: Server, flow_id: UUID, *, patch: Any, expected_revision: int | None, as_json: bool) -> None:
    """Resume a waiting flow."""
    with server.connect() as flows:
        _print_changed(flows.resume(flow_id, patch, expected_revision=expected_revision), as_json=as_json)


def _print_changed(flow: Flow, *, as_json: bool) -> None:
    if as_json:
        click.echo(render.to_json(render.flow_document(flow)))
    else:
        pending = ", cancel requested" if flow.cancel_requested and not flow.status.is_terminal else ""
        click.echo(f"flow {flow.id} is {flow.status}{pending}, at revision {flow.revision}")


@redisflow.command("stats")
@_json_option
@click.pass_obj
def print_stats(server: Server, *, as_json: bool) -> None:
    """Count the flows by status, with the one longest unchanged in each."""
    with server.connect() as flows:
        counts = flows.count_by_status()
        oldest = {status: next(iter(flows.list_by_status(status, limit=1)), None) for status in FlowStatus}
    if as_json:
        unchanged_since = {status: flow and flow.updated_at for status, flow in oldest.items()}
        document = {
            "prefix": server.prefix,
            "flows": counts,
            "total": sum(counts.values()),
            "unchanged_since": unchanged_since,
        }
        click.echo(render.to_json(document))
    else:
        render.show(render.stats_table(counts, oldest))


@redisflow.command("prune")
@click.option(
    "--older-than", required=True, callback=_duration, metavar="SPAN", help="Such as 30d, 12h, 5m, 90s or 1d12h."
)
@click.option("--dry-run", is_flag=True, help="Count them and delete nothing.")
@_json_option
@click.pass_obj
def prune_flows(server: Server, older_than: timedelta, *, dry_run: bool, as_json: bool) -> None:
    """Delete flows that ended long ago.

    Those that have not changed for SPAN, with their events and steps.
    """
    with server.connect() as flows:
        if dry_run:
            before = datetime.now(UTC) - older_than
            old = (flows.iter_by_status(status, updated_before=before) for status in TERMINAL)
            pruned = sum(1 for _ in itertools.chain.from_iterable(old))
        else:
            pruned = flows.prune_terminal_flows(older_than)
    if as_json:
        click.echo(render.to_json({"pruned": pruned, "dry_run": dry_run}))
    else:
        click.echo(f"{'would delete' if dry_run else 'deleted'} {pruned} flow{'' if pruned == 1 else 's'}")


@redisflow.command("doctor")
@click.option("--repair", is_flag=True, help="Mend what loses nothing by it: index entries, records of no flow.")
@click.option(
    "--quiet-after",
    default="1d",
    show_default=True,
    callback=_duration,
    metavar="SPAN",
    help="Mention running flows that have not changed for SPAN.",
)
@_json_option
@click.pass_obj
def examine(server: Server, quiet_after: timedelta, *, repair: bool, as_json: bool) -> int:
    """Examine the server and every flow, index and key.

    The flows may be in use meanwhile. Ends with 0 if all is well, 6 for warnings, 5 for errors; what --repair has
    mended does not count.
    """
    with server.connect(allow_eviction=True) as flows:  # which it reports
        diagnosis = flows.doctor(repair=repair, quiet_after=quiet_after)
    if as_json:
        click.echo(render.to_json(render.diagnosis_document(diagnosis)))
    else:
        for table in (render.counts_table(diagnosis.flows), render.memory_table(diagnosis.memory)):
            render.show(table)
        render.show(render.findings_table(diagnosis))
        click.echo(render.verdict(diagnosis))
    return {Severity.ERROR: _OFF, Severity.WARNING: _WARNINGS}.get(diagnosis.severity, 0)


@redisflow.command("engine")
@click.option(
    "--interval",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Look at least so often.",
)
@_json_option
@click.pass_obj
def run_engine(server: Server, interval: float, *, as_json: bool) -> None:
    """Run a wait engine until interrupted.

    It resumes flows whose wait is over, and cancels waiting flows whose cancel was requested. SIGINT or SIGTERM
    ends it with exit code 0. Any number may run at once.
    """
    with server.connect() as flows:
        stop = _stop_on_signal()
        engine = _TallyingEngine(flows)
        click.echo("running; Ctrl-C ends it", err=True)
        engine.run(interval, stop)
        tally = engine.tally
    if as_json:
        click.echo(render.to_json(tally))
    else:
        click.echo(", ".join(f"{what} {count}" for what, count in tally.items()))


def _stop_on_signal() -> threading.Event:
    """Return an event that the first SIGINT or SIGTERM sets; the second ends the process."""
    stop = threading.Event()

    def end(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        # Not set() here: the signal may have come while this very thread holds the event's lock.
        threading.Thread(target=stop.set).start()

    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)
    return stop


class _TallyingEngine(WaitEngine):
    """A wait engine that can say in the end what it did."""

    def __init__(self, flows: FlowManager) -> None:
        super().__init__(flows)
        self.tally = {"resumed": 0, "cancelled": 0, "errors": 0}

    def _tick(self, now: datetime | None = None) -> Tick:
        tick = super()._tick(now)
        for what in self.tally:
            self.tally[what] += getattr(tick.report, what)
        return tick


@redisflow.command("demo")
@click.argument("path", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--files",
    type=click.IntRange(min=8),
    default=2500,
    show_default=True,
    metavar="N",
    help="At most N, evenly spread.",
)
@click.option("--keep", is_flag=True, help="Keep the flows, to look at them afterwards.")
@_json_option
@click.pass_obj
def run_demo(server: Server, path: Path | None, files: int, *, keep: bool, as_json: bool) -> int:
    """Analyse Python files by processes that share flows.

    One flow per file under PATH, which is the running Python's standard library unless given. Four workers, a
    reviewer and a wait engine work on them; one worker is killed on the way; everything is verified at the end.
    The flows are on a server of the demo's own, whatever $REDISFLOW_URL says, unless --url names another.
    """
    # What only the demo needs.
    from redisflow.demo.crew import CrewFailed  # noqa: PLC0415 - only `demo` pays for it
    from redisflow.demo.plan import FEWEST_FILES, Plan  # noqa: PLC0415 - only `demo` pays for it
    from redisflow.demo.screen import report_document, report_table, screen_for  # noqa: PLC0415 - only `demo` pays for it
    from redisflow.demo.sources import standard_library  # noqa: PLC0415 - only `demo` pays for it
    from redisflow.demo.stage import NotEmpty, perform  # noqa: PLC0415 - only `demo` pays for it

    if server.url and server.url.startswith("memory://"):
        raise click.UsageError("memory:// is one process's own; the demo's processes need a server they can share")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing is left behind
    plan = Plan.of(path or standard_library(), files)
    if len(plan.routes) < FEWEST_FILES:
        raise click.UsageError(f"{plan.root} has {plan.found} Python files; the demo needs {FEWEST_FILES}")
    try:
        with screen_for(render.console(stderr=True), len(plan.routes)) as screen:
            screen.say(f"{len(plan.routes)} Python files of {plan.root}")
            performance = perform(server.url, f"{server.prefix}-demo", plan, screen, keep=keep)
    except NotEmpty as error:
        raise click.UsageError(str(error)) from None
    except CrewFailed as error:
        return _complain(str(error), _STORAGE)
    report = performance.report
    if as_json:
        click.echo(render.to_json(report_document(report, plan)))
    else:
        render.show(report_table(report, plan))
    if performance.kept_at is not None:
        where = performance.kept_at
        click.echo(f"flows kept: redisflow --url {where.url} --prefix {where.prefix} list", err=True)
    for problem in report.problems[:_PROBLEMS_SHOWN]:
        _complain(problem, _OFF)
    if len(report.problems) > _PROBLEMS_SHOWN:
        _complain(f"... and {len(report.problems) - _PROBLEMS_SHOWN} more", _OFF)
    return _OFF if report.problems else 0
