"""Flows, steps and events as JSON documents for programs and as text for people."""

from __future__ import annotations

import base64
import json
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import attrs
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from redisflow.waits import to_rfc3339

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from redisflow.diagnosis import Diagnosis, Finding, KeyUsage
    from redisflow.flow import Flow, FlowEvent, FlowStatus, FlowStep

# Wide enough for any row: where no terminal shows it, nothing is wrapped or cut.
_UNBOUNDED = 100_000
_NARROWEST, _ROOMY = 60, 110
_STATUS_STYLES = {
    "created": "white",
    "running": "cyan",
    "waiting": "yellow",
    "finished": "green",
    "failed": "red",
    "cancelled": "magenta",
}
_SEVERITY_STYLES = {"ok": "green", "info": "cyan", "warning": "yellow", "error": "red", "mended": "green"}
_FIGURES = {"age", "flows", "keys", "bytes"}
_FIRM = {"id", "status", "longest unchanged", "severity", "kind", *_FIGURES}
_FINDINGS_SHOWN = 20  # of a kind; what was mended is shown whole
_UNITS = ((86_400, "d"), (3_600, "h"), (60, "m"))


def console(*, stderr: bool = False) -> Console:
    """A console that knows colours and width on a terminal; plain unbroken text elsewhere and where no id fits."""
    stream = sys.stderr if stderr else sys.stdout
    if stream.isatty():
        terminal = Console(stderr=stderr)
        if terminal.width >= _NARROWEST:
            return terminal
    return Console(stderr=stderr, force_terminal=False, color_system=None, width=_UNBOUNDED)


def inert(text: str) -> str:
    """Escape what could drive a terminal or break a line: names and payloads are anybody's."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


# --- for programs --------------------------------------------------------------------------------------


def to_json(document: object, *, indent: int | None = None) -> str:
    """JSON in ASCII: datetimes as RFC 3339 text, bytes as base64 text."""
    return json.dumps(document, default=_as_text, indent=indent)


def _as_text(value: object) -> str:
    match value:
        case datetime():
            return to_rfc3339(value)
        case bytes():
            return base64.b64encode(value).decode()
        case _:
            return str(value)


def flow_document(flow: Flow) -> dict[str, Any]:
    """Every attribute of a flow."""
    return {
        "id": flow.id,
        "controller_id": flow.controller_id,
        "goal": flow.goal,
        "owner_session_key": flow.owner_session_key,
        "requester_origin": flow.requester_origin,
        "status": flow.status,
        "cancel_requested": flow.cancel_requested,
        "current_step": flow.current_step,
        "revision": flow.revision,
        "etag": flow.etag,
        "created_at": flow.created_at,
        "updated_at": flow.updated_at,
        "wait": flow.wait,
        "state": flow.state,
    }


def event_document(event: FlowEvent) -> dict[str, Any]:
    """Every attribute of an audit event."""
    return {
        "id": event.id,
        "flow_id": event.flow_id,
        "revision": event.revision,
        "kind": event.kind,
        "at": event.at,
        "op_id": event.op_id,
        "payload": event.payload,
    }


def step_document(step: FlowStep) -> dict[str, Any]:
    """Every attribute of a step."""
    return {
        "id": step.id,
        "flow_id": step.flow_id,
        "runtime": step.runtime,
        "child_session_key": step.child_session_key,
        "run_id": step.run_id,
        "task": step.task,
        "status": step.status,
        "result": step.result,
        "created_at": step.created_at,
        "updated_at": step.updated_at,
    }


def diagnosis_document(diagnosis: Diagnosis) -> dict[str, Any]:
    """What a health check came to."""
    return {
        "prefix": diagnosis.prefix,
        "severity": diagnosis.severity,
        "findings": [attrs.asdict(finding) for finding in diagnosis.findings],
        "left": diagnosis.left,
        "mended": diagnosis.mended,
        "flows": diagnosis.flows,
        "memory": [attrs.asdict(usage) for usage in diagnosis.memory],
    }


# --- for people ----------------------------------------------------------------------------------------


def show(table: Table) -> None:
    """Print a table to standard output."""
    target = console()
    if target.is_terminal:
        target.print(table)
        return
    table.box = None
    with target.capture() as captured:
        target.print(table)
    sys.stdout.writelines(line.rstrip() + "\n" for line in captured.get().splitlines() if line.strip())


def compact(value: object) -> str:
    """A value as JSON on one line, readable as far as a terminal can be trusted with it."""
    return inert(json.dumps(value, default=_as_text, ensure_ascii=False))


def age(moment: datetime) -> str:
    """How long ago a moment was, in its largest unit."""
    seconds = max(0, int((datetime.now(UTC) - moment).total_seconds()))
    for size, unit in _UNITS:
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _status(status: str, *, cancel_requested: bool = False) -> Text:
    text = Text(status, style=_STATUS_STYLES.get(status, ""))
    return text.append(" (cancel)", style="magenta") if cancel_requested else text


def _table(*columns: str) -> Table:
    """A table whose texts give way to its figures and ids where a terminal is narrow."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, no_wrap=name in _FIRM, justify="right" if name in _FIGURES else "left")
    return table


def _line(text: str) -> Text:
    """Anybody's text, on one line and cut where it does not fit."""
    return Text(inert(text), no_wrap=True, overflow="ellipsis")


def flows_table(flows: Iterable[Flow], *, width: int) -> Table:
    """One line per flow; on a narrow terminal without its step and owner."""
    roomy = width >= _ROOMY
    table = _table("id", "status", "age", *(("step", "owner") if roomy else ()), "goal")
    for flow in flows:
        pending = flow.cancel_requested and not flow.status.is_terminal
        table.add_row(
            Text(str(flow.id)),
            _status(flow.status, cancel_requested=pending),
            age(flow.updated_at),
            *((_line(flow.current_step), _line(flow.owner_session_key)) if roomy else ()),
            _line(flow.goal),
        )
    return table


def flow_table(flow: Flow) -> Table:
    """One flow, attribute by attribute."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    document = flow_document(flow)
    state = document.pop("state")
    for name, value in document.items():
        match name, value:
            case ("status", _):
                table.add_row(name, _status(value))
            case (_, None):
                table.add_row(name, Text("–"))
            case ("wait", _) | (_, bool()):
                table.add_row(name, Text(compact(value)))
            case _:
                table.add_row(name, Text(inert(_as_text(value))))
    keyed = state if isinstance(state, dict) and state else {"": state}
    for key, value in keyed.items():
        table.add_row("state" + (f".{inert(key)}" if key else ""), Text(compact(value)))
    return table


def steps_table(steps: Sequence[FlowStep]) -> Table:
    """One line per step."""
    table = _table("run", "status", "age", "task", "child session", "result")
    for step in steps:
        table.add_row(
            _line(step.run_id),
            _status(step.status),
            age(step.updated_at),
            _line(step.task),
            _line(step.child_session_key or "–"),
            _line(compact(step.result)),
        )
    return table


def event_line(event: FlowEvent) -> Text:
    """One audit event on one line."""
    line = Text(f"{to_rfc3339(event.at)[:-4]}Z  {event.revision:>4}  ", style="dim")
    line.append(f"{inert(event.kind):<17}", style="bold not dim")
    return line.append(f"  {compact(event.payload)}", style="not dim")


def stats_table(counts: Mapping[FlowStatus, int], oldest: Mapping[FlowStatus, Flow | None]) -> Table:
    """One line per status."""
    table = _table("status", "flows", "longest unchanged", "since")
    for status, count in counts.items():
        flow = oldest[status]
        since = "–" if flow is None else f"{age(flow.updated_at)} ago"
        table.add_row(_status(status), f"{count:,}", "–" if flow is None else str(flow.id), since)
    table.add_section()
    table.add_row("total", f"{sum(counts.values()):,}", "", "")
    return table


def counts_table(counts: Mapping[FlowStatus, int]) -> Table:
    """One line per status, without the flows."""
    table = _table("status", "flows")
    for status, count in counts.items():
        table.add_row(_status(status), f"{count:,}")
    table.add_section()
    table.add_row("total", f"{sum(counts.values()):,}")
    return table


def memory_table(memory: Sequence[KeyUsage]) -> Table:
    """One line per kind of key."""
    table = _table("kind", "keys", "bytes")
    for usage in memory:
        table.add_row(usage.kind, f"{usage.keys:,}", _size(usage.bytes, estimated=usage.estimated))
    known = [usage.bytes for usage in memory if usage.bytes is not None]
    total = sum(known) if len(known) == len(memory) else None
    estimated = any(usage.estimated for usage in memory)
    table.add_section()
    table.add_row("total", f"{sum(usage.keys for usage in memory):,}", _size(total, estimated=estimated))
    return table


def _size(size: int | None, *, estimated: bool) -> str:
    return "–" if size is None else f"{'about ' if estimated else ''}{size:,}"


def findings_table(diagnosis: Diagnosis) -> Table:
    """One line per finding, the worst last: where a terminal ends up. What to do is said once for all of a kind."""
    table = _table("severity", "kind", "finding")
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in sorted(diagnosis.findings, key=lambda finding: finding.severity.rank):
        label = "mended" if finding.mended else finding.severity
        groups.setdefault((label, finding.kind, finding.advice), []).append(finding)
    for (label, kind, advice), findings in groups.items():
        shown = findings if label == "mended" else findings[:_FINDINGS_SHOWN]
        more = (diagnosis.mended if label == "mended" else diagnosis.left).get(kind, 0) - len(shown)
        for finding in shown:
            table.add_row(Text(label, style=_SEVERITY_STYLES[label]), kind, _finding(finding))
        for text in _footer(more, advice):
            table.add_row("", "", text)
    return table


def _finding(finding: Finding) -> Text:
    subject = finding.key if finding.flow_id is None else str(finding.flow_id)
    return Text(inert(finding.what if subject is None else f"{subject}  {finding.what}"), overflow="fold")


def _footer(more: int, advice: str) -> Iterator[Text]:
    if more > 0:
        yield Text(f"… and {more:,} more", style="dim")
    if advice:
        yield Text(f"→ {advice}", style="dim")


def verdict(diagnosis: Diagnosis) -> str:
    """What was found and what was mended, kind by kind, in a line."""
    mended = _tally("mended", diagnosis.mended)
    found = _tally("left" if mended else "found", diagnosis.left)
    return "; ".join(filter(None, (mended, found))) or "nothing found"


def _tally(what: str, counts: Mapping[str, int]) -> str:
    return f"{what} {', '.join(f'{kind} {count:,}' for kind, count in counts.items())}" if counts else ""
