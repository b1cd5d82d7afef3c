"""Pictures of curves, one per figure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.measure import Curve
from benchmarks.report import Result, figures_of

# Okabe and Ito's, told apart by colour-blind readers too; markers tell them apart in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# An axis whose largest number is this many times its smallest is drawn logarithmic.
_WIDE = 20


def draw(result: Result, folder: Path, name: str, suffix: str = ".svg") -> Iterator[Path]:
    """Draw each figure of a result. Yields the files, `<name>-<figure><suffix>`."""
    folder.mkdir(exist_ok=True)
    for title, curves in figures_of(result.curves).items():
        path = folder / f"{name}-{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}{suffix}"
        subtitle = f"redisflow {result.versions['redisflow']} on {result.server}, {result.machine['cores']} cores"
        # The same curves make the same file, byte for byte: no date, no random ids.
        with mpl.rc_context({"svg.hashsalt": title, "font.size": 10}):
            metadata = {"Date": None} if suffix == ".svg" else None
            _picture(title, subtitle, curves).savefig(path, dpi=150, metadata=metadata)
        yield path


def _picture(title: str, subtitle: str, curves: Sequence[Curve]) -> Figure:
    figure = Figure(figsize=(8, 4.5), layout="constrained")  # without pyplot: no display, no state kept between them
    axes = figure.add_subplot()
    looks = zip(cycle(_COLOURS), cycle(_MARKERS), strict=False)
    for curve, (colour, marker) in zip(curves, looks, strict=False):
        x, y = zip(*curve.points, strict=True)
        axes.plot(x, y, label=curve.label, color=colour, marker=marker, markersize=5, linewidth=1.6)
    axes.set_xlabel(curves[0].x_name)
    axes.set_ylabel(curves[0].y_name)
    _scale_x(axes, [x for curve in curves for x, _ in curve.points])
    _scale_y(axes, [y for curve in curves for _, y in curve.points])
    axes.set_title(f"{title}\n", fontweight="bold", loc="left", fontsize=12)
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, color="#555555", fontsize=9)
    axes.grid(visible=True, color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def _is_wide(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= _WIDE


def _scale_x(axes: Any, values: Sequence[float | str]) -> None:
    """Ticks where there are points; texts are an axis of even steps."""
    numbers = [value for value in values if not isinstance(value, str)]
    if numbers and _is_wide(numbers):
        axes.set_xscale("log")
    if numbers:
        axes.set_xticks(sorted(set(numbers)))
        axes.xaxis.set_major_formatter(FuncFormatter(_plain))
        axes.xaxis.set_minor_locator(NullLocator())


def _scale_y(axes: Any, values: Sequence[float]) -> None:
    """From zero, so that flat looks flat; or logarithmic."""
    if _is_wide(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=0, top=1.1 * max(values))
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))


def _plain(value: float, _: object) -> str:
    """A tick in plain digits: 0.5, 20, 10,000."""
    return f"{value:,.10g}"
