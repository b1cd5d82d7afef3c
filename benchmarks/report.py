"""What a run came to: printed, saved as JSON, read again, and quoted in the README."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import attrs
from rich.table import Table

from benchmarks.measure import Curve, Plan, Row, number

if TYPE_CHECKING:
    from rich.console import Console

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
# What the README quotes stands between these.
_BEGIN, _END = "<!-- speed: by `python -m benchmarks table` -->", "<!-- /speed -->"
_PACKAGES = ("redisflow", "redis", "hiredis", "msgpack")
_VERDICTS = {True: "[green]yes[/]", False: "[bold red]MISSED[/]", None: ""}


@attrs.frozen
class Result:
    """A run: what was measured, and where.

    Attributes:
        command: what was typed.
        server: what it says it is: `valkey-9.1.0`.
        versions: of Python and of each package that takes part.
    """

    command: str
    date: str
    server: str
    versions: dict[str, str]
    machine: dict[str, Any]
    plan: Plan
    rows: Sequence[Row]
    curves: Sequence[Curve]

    @classmethod
    def of(cls, server: str, plan: Plan, rows: Sequence[Row], curves: Sequence[Curve]) -> Self:
        """Note where and how this process measured them."""
        return cls(
            command=shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
            date=datetime.now(UTC).date().isoformat(),
            server=server,
            versions={"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
            machine={"arch": platform.machine(), "cores": os.cpu_count(), "cpu": _cpu_name()},
            plan=plan,
            rows=rows,
            curves=curves,
        )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        saved = json.loads(path.read_text(encoding="utf-8"))
        plan = Plan(**saved.pop("plan"))
        names = [field.name for field in attrs.fields(Row)]
        rows = [Row(**{name: row[name] for name in names}) for row in saved.pop("rows")]
        curves = [Curve(**curve) for curve in saved.pop("curves")]
        return cls(**saved, plan=plan, rows=rows, curves=curves)

    def save(self, path: Path) -> None:
        """Write it as JSON, with what follows from each row."""
        derived = [{"result": row.result, "met": row.met} for row in self.rows]
        content = attrs.asdict(self)
        content["rows"] = [row | more for row, more in zip(content["rows"], derived, strict=True)]
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @property
    def where(self) -> str:
        """The machine and the versions, as one line."""
        versions = ", ".join(f"{name} {known}" for name, known in self.versions.items())
        return f"{self.machine['arch']}, {self.machine['cores']} cores of {self.machine['cpu']}; {versions}"


def _cpu_name() -> str:
    """The processor as Linux calls it; elsewhere as Python does."""
    about = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.+)$", about.read_text(), re.MULTILINE) if about.exists() else None
    return named[1] if named else platform.processor() or "unknown"


def figures_of(curves: Iterable[Curve]) -> dict[str, list[Curve]]:
    """Curves by the picture they belong to."""
    figures: dict[str, list[Curve]] = {}
    for curve in curves:
        figures.setdefault(curve.figure, []).append(curve)
    return figures


# --- printed ---------------------------------------------------------------------------------------------


def show(console: Console, result: Result) -> None:
    """Print the rows, then the curves."""
    console.print(_rows_table(result))
    for figure, curves in figures_of(result.curves).items():
        console.print(_curves_table(figure, curves))


def _rows_table(result: Result) -> Table:
    plan = result.plan
    shortened = " (quick: sizes too small to judge by)" if plan.quick else ""
    table = Table(title=f"redisflow on {result.server}, medians of {plan.repeats} or more repeats{shortened}")
    for heading in ("row", "beside"):
        table.add_column(heading)
    for heading in ("it", "yardstick", "unit", "ratio", "middle half", "target"):
        table.add_column(heading, justify="right")
    table.add_column("met?")
    for row in result.rows:
        low, high = row.middle_half
        table.add_row(
            row.name,
            row.yardstick_name,
            number(row.subject),
            "" if row.yardstick is None else number(row.yardstick),
            row.unit,
            "" if row.yardstick is None else f"{row.result:.2f}",
            f"{number(low)} – {number(high)}" if row.yardstick is None else f"{low:.2f} – {high:.2f}",
            row.target,
            _VERDICTS[row.met],
        )
    return table


def _curves_table(figure: str, curves: Sequence[Curve]) -> Table:
    table = Table(title=f"{figure}: {curves[0].y_name}")
    table.add_column(curves[0].x_name)
    steps = list(dict.fromkeys(x for curve in curves for x, _ in curve.points))
    for x in steps:
        table.add_column(x if isinstance(x, str) else number(x), justify="right")
    for curve in curves:
        values = dict(curve.points)
        table.add_row(curve.label, *(number(values[x]) if x in values else "" for x in steps))
    return table


# --- quoted in the README --------------------------------------------------------------------------------


def quote_in_readme(readme: Path = README, results: Path = RESULTS) -> None:
    """Replace what stands between the README's two markers by the saved results."""
    saved = [Result.load(path) for path in sorted(results.glob("*.json"))]
    if not saved:
        raise SystemExit(f"nothing saved in {results}: run `make bench` first")
    text = readme.read_text(encoding="utf-8")
    before, begun, rest = text.partition(_BEGIN)
    _, ended, after = rest.partition(_END)
    if not begun or not ended:
        raise SystemExit(f"{readme} lacks the lines {_BEGIN} and {_END}")
    readme.write_text(f"{before}{_BEGIN}\n{_quote(saved)}\n{_END}{after}", encoding="utf-8")


def _quote(saved: Sequence[Result]) -> str:
    """A table of the rows that have a target, a column for each server; then how each column came about."""
    rows = {(row.name, row.yardstick_name): row for result in saved for row in result.rows if row.target}
    lines = [
        "| " + " | ".join(["", "beside", *(result.server for result in saved), "target"]) + " |",
        "|---|---|" + "--:|" * (len(saved) + 1),
    ]
    for key, row in rows.items():
        cells = [_cell(next((r for r in result.rows if (r.name, r.yardstick_name) == key), None)) for result in saved]
        lines.append("| " + " | ".join([row.name, row.yardstick_name or "", *cells, row.target]) + " |")
    lines.append("")
    for result in saved:
        quick = ", of sizes too small to judge by" if result.plan.quick else ""
        how = f"{result.date}, `{result.command}`, medians of {result.plan.repeats} or more repeats{quick}"
        lines.append(f"- {result.server}: {how}; {result.where}.")
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    text = f"{row.result:.2f}" if row.yardstick_name else f"{number(row.result)} {row.unit}"
    return f"{text}, missed" if row.met is False else text
