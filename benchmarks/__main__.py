"""The speed of redisflow: `python -m benchmarks`, or `make bench`.

A row compares the library with a yardstick in the same run, because machines differ and this one may be shared; or
it is a figure by itself where the target is one. Each topic has a server started for it. A missed target is marked
and fails nothing.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import warnings
from collections.abc import Iterable

from rich.console import Console

from benchmarks.measure import Curve, Plan, Row
from benchmarks.report import RESULTS, Result, quote_in_readme, show
from benchmarks.server import serving

TOPICS = (
    "transition_cpu",
    "sync_rate",
    "asyncio_rate",
    "contention",
    "latency",
    "scale",
    "memory",
    "cluster",
    "beside_peers",
)
_LEAST_REPEATS = 5
_PROFILED_CALLS = 20_000


def main() -> None:
    """Measure what the arguments ask for and print it."""
    options = _parser().parse_args()
    # A benchmark that is terminated still ends its server.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    warnings.filterwarnings("ignore", message="the server keeps nothing")  # on purpose, unless --aof is given
    if options.command == "table":
        quote_in_readme()
    elif options.command == "profile":
        from benchmarks.sync_rate import profile

        with serving(options.engine, aof=options.aof) as server:
            profile(server, _PROFILED_CALLS)
    else:
        _measure(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="The speed of redisflow.")
    parser.add_argument(
        "command",
        nargs="?",
        choices=["profile", "table"],
        help="instead of measuring: profile sync calls; quote what was saved in the README",
    )
    parser.add_argument(
        "--only", action="append", choices=TOPICS, metavar="TOPIC", help=f"of {', '.join(TOPICS)}; may repeat"
    )
    parser.add_argument("--repeats", type=_repeats, help=f"of every row, at least {_LEAST_REPEATS}; 9 unless given")
    parser.add_argument("--quick", action="store_true", help="a tenth of the sizes, fewer repeats: to see that it runs")
    parser.add_argument("--engine", default="valkey", help="valkey, redis, or the path of a server program")
    parser.add_argument(
        "--aof", action="store_true", help="have the server keep an append-only file, fsync every second"
    )
    parser.add_argument(
        "--save",
        nargs="?",
        const="",
        metavar="NAME",
        help="write NAME.json and pictures to benchmarks/results; the server's name unless given",
    )
    return parser


def _repeats(text: str) -> int:
    if (repeats := int(text)) < _LEAST_REPEATS:
        raise argparse.ArgumentTypeError(f"at least {_LEAST_REPEATS}")
    return repeats


def _measure(options: argparse.Namespace) -> None:
    if options.save is not None:
        importlib.import_module("benchmarks.plots")  # tells before the work when the extra `bench` is not installed
    console = Console()
    if not console.is_terminal:
        console.width = 150  # a file or a pipe has room
    plan = Plan(options.repeats or (_LEAST_REPEATS if options.quick else 9), options.quick)
    result = _measured(console, options, plan, options.only or TOPICS)
    show(console, result)
    if options.save is not None:
        _save(result, options.save or result.server)


def _save(result: Result, name: str) -> None:
    from benchmarks import plots

    path = RESULTS / f"{name}.json"
    result.save(path)
    for written in (path, *plots.draw(result, RESULTS, name)):
        print(f"written: {written}")


def _measured(console: Console, options: argparse.Namespace, plan: Plan, topics: Iterable[str]) -> Result:
    rows: list[Row] = []
    curves: list[Curve] = []
    name = ""
    for topic in topics:
        with serving(options.engine, aof=options.aof) as server:
            name = server.name
            with console.status(f"{name}: {topic} …"):
                for found in importlib.import_module(f"benchmarks.{topic}").run(server, plan):
                    rows += [found] if isinstance(found, Row) else []
                    curves += [found] if isinstance(found, Curve) else []
    return Result.of(name, plan, rows, curves)


if __name__ == "__main__":
    main()
