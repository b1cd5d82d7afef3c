"""The speed ratios of redisflow: `python -m benchmarks`, or `make bench`.

Every row compares the library with a yardstick in the same run, on a server started for it; a ratio says more than a
rate, because machines differ and this one may be shared. A missed target is marked and fails nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import signal
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import attrs
import hiredis
import redis
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Plan, Row
from benchmarks.server import Server, serving

TOPICS = ("transition_cpu", "sync_rate", "asyncio_rate", "contention", "scale")
_LEAST_REPEATS = 5
_RESULTS = Path(__file__).parent / "results"
_PROFILED_CALLS = 20_000


def main() -> None:
    """Measure what the arguments ask for and print it."""
    options = _parser().parse_args()
    # A benchmark that is terminated still ends its server.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    warnings.filterwarnings("ignore", message="the server keeps nothing")  # on purpose, unless --aof is given
    with serving(options.engine, aof=options.aof) as server:
        if options.command == "profile":
            from benchmarks.sync_rate import profile

            profile(server, _PROFILED_CALLS)
            return
        plan = Plan(options.repeats or (_LEAST_REPEATS if options.quick else 9), options.quick)
        rows = _measured(server, plan, options.only or TOPICS)
        if options.save is not None:
            _save(options.save or server.name, server, plan, rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="The speed ratios of redisflow.")
    parser.add_argument("command", nargs="?", choices=["profile"], help="profile sync calls instead of measuring rows")
    parser.add_argument(
        "--only", action="append", choices=TOPICS, metavar="ROW", help=f"of {', '.join(TOPICS)}; may repeat"
    )
    parser.add_argument("--repeats", type=_repeats, help=f"of every row, at least {_LEAST_REPEATS}; 9 unless given")
    parser.add_argument("--quick", action="store_true", help="a tenth of the sizes, fewer repeats: to see that it runs")
    parser.add_argument("--engine", default="valkey", help="valkey, redis, or the path of a server program")
    parser.add_argument(
        "--aof", action="store_true", help="have the server keep an append-only file, fsync every second"
    )
    parser.add_argument("--save", nargs="?", const="", metavar="NAME", help="write benchmarks/results/NAME.json")
    return parser


def _repeats(text: str) -> int:
    if (repeats := int(text)) < _LEAST_REPEATS:
        raise argparse.ArgumentTypeError(f"at least {_LEAST_REPEATS}")
    return repeats


def _measured(server: Server, plan: Plan, topics: Iterable[str]) -> list[Row]:
    console = Console()
    if not console.is_terminal:
        console.width = 130  # a file or a pipe has room
    rows: list[Row] = []
    for topic in topics:
        with console.status(f"{server.name}: {topic} …"):
            rows += importlib.import_module(f"benchmarks.{topic}").run(server, plan)
    console.print(_table(server, plan, rows))
    return rows


def _table(server: Server, plan: Plan, rows: Iterable[Row]) -> Table:
    shortened = " (quick: sizes too small to judge by)" if plan.quick else ""
    table = Table(title=f"redisflow on {server.name}, medians of {plan.repeats} or more repeats{shortened}")
    for heading in ("row", "beside"):
        table.add_column(heading)
    for heading in ("it", "yardstick", "unit", "ratio", "middle half", "target"):
        table.add_column(heading, justify="right")
    table.add_column("met?")
    verdicts = {True: "[green]yes[/]", False: "[bold red]MISSED[/]", None: ""}
    for row in rows:
        low, high = row.middle_half
        table.add_row(
            row.name,
            row.yardstick_name,
            _number(row.subject),
            _number(row.yardstick),
            row.unit,
            f"{row.ratio:.2f}",
            f"{low:.2f} – {high:.2f}",
            row.target,
            verdicts[row.met],
        )
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _save(name: str, server: Server, plan: Plan, rows: Iterable[Row]) -> None:
    result = {
        "command": ["python", "-m", "benchmarks", *sys.argv[1:]],
        "server": server.name,
        "python": platform.python_version(),
        "redis-py": redis.__version__,
        "hiredis": hiredis.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "plan": attrs.asdict(plan),
        "rows": [attrs.asdict(row) | {"ratio": row.ratio, "met": row.met} for row in rows],
    }
    _RESULTS.mkdir(exist_ok=True)
    path = _RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
