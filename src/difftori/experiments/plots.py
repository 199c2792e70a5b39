"""Elements of all figures: the look of each method, panels of learning curves, paired differences. Readable without colour and in print.

Every method has its own colour of the Okabe–Ito palette AND its own line style and marker, so that no information depends on
colour alone.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from difftori.experiments.statistics import Estimate
from difftori.experiments.tables import Difference
from difftori.runs.figures import thousands

PALETTE = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""The Okabe–Ito palette, colours with high contrast on white first."""
DASHES = ("solid", "dashed", "dashdot", "dotted", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 1)), (0, (1, 1)))
MARKERS = ("x", "o", "s", "^", "D", "v", "P")
_ACROSS = 5
_HANDLE, _LETTER, _LINE, _NOTE_LETTERS = 0.8, 0.07, 0.18, 17
"""In inches: the line and gaps of a legend entry, a letter, a line of text; letters of a footnote per inch."""
_DODGE = 0.12
"""Distance of two series at the same place."""
_ROWS = 3
"""Rows of a legend for which a figure has room."""


@dataclass(frozen=True)
class Look:
    """Colour, line style and marker of a method."""

    color: str
    dashes: Any
    marker: str


def look(index: int) -> Look:
    """Return the look of a method by its index in the legend. When colours repeat, line styles and markers differ."""
    turn, place = divmod(index, len(PALETTE))
    return Look(PALETTE[place], DASHES[(place + turn) % len(DASHES)], MARKERS[(place + turn) % len(MARKERS)])


@dataclass(frozen=True)
class Trace:
    """One run's curve: values `y` (k) at `steps` (k), plotted over `x` (k), which is steps or time."""

    steps: np.ndarray
    x: np.ndarray
    y: np.ndarray


def draw_traces(axis: Axes, traces: Sequence[Trace], index: int, label: str) -> None:
    """Plot thin lines for runs, and a bold one for their mean over the steps that all of them have."""
    if not traces:
        return
    drawn = look(index)
    shared = traces[0].steps
    for trace in traces:
        axis.plot(
            trace.x, trace.y, color=drawn.color, linewidth=0.6, alpha=0.45, marker="." if len(trace.x) == 1 else ""
        )
        shared = np.intersect1d(shared, trace.steps)
    rows = [np.isin(trace.steps, shared) for trace in traces]
    x, y = (np.mean([getattr(t, n)[row] for t, row in zip(traces, rows, strict=True)], axis=0) for n in ("x", "y"))
    if len(x):
        marker = drawn.marker if len(x) == 1 else ""
        axis.plot(x, y, color=drawn.color, linestyle=drawn.dashes, linewidth=2.0, marker=marker, label=label)


def task_panels(
    tasks: Sequence[str],
    methods: Sequence[str],
    draw: Callable[[Axes, str], None],
    *,
    xlabel: str,
    ylabel: str,
    note: str,
) -> Figure:
    """Create one panel for each task, filled by `draw`, with a common legend."""
    across = min(_ACROSS, len(tasks))
    down = -(-len(tasks) // across)
    with style():
        figure = Figure(figsize=(3.0 * across + 1.0, 2.3 * down + 1.3), layout="constrained")
        axes = figure.subplots(down, across, squeeze=False)
        for axis, task in zip(axes.flat, tasks, strict=False):
            draw(axis, task)
            axis.set_title(task)
            axis.xaxis.set_major_formatter(FuncFormatter(thousands))
        for axis in axes.flat[len(tasks) :]:
            axis.set_axis_off()
        for row in axes:
            row[0].set_ylabel(ylabel)
        for axis in axes.flat[max(len(tasks) - across, 0) : len(tasks)]:
            axis.set_xlabel(xlabel)
        shared_legend(figure, methods, columns=max(int(figure.get_figwidth() // 2.4), 2))
        footnote(figure, note)
    return figure


def difference_bars(rows: Sequence[Difference], xlabel: str, note: str, *, limit: float | None = None) -> Figure:
    """Plot differences with their intervals, one line each, within ±`limit`. A point without interval is a single pair."""
    with style():
        figure = Figure(figsize=(8.0, 0.26 * len(rows) + 1.3), layout="constrained")
        axis = figure.subplots()
        names = [f"{row.task}: {row.method} − {row.reference}" for row in rows]
        draw_intervals(axis, names, [row.value for row in rows])
        if limit is not None:  # intervals from two pairs may exceed the largest possible difference
            low, high = axis.get_xlim()
            axis.set_xlim(max(low, -limit), min(high, limit))
        axis.set_xlabel(xlabel)
        footnote(figure, note)
    return figure


def draw_intervals(axis: Axes, names: Sequence[str], estimates: Sequence[Estimate], zero: float = 0.0) -> None:
    """Plot values with their intervals, one line each from the top, and a vertical line at `zero`."""
    for index, estimate in enumerate(estimates):
        if estimate.bounded:
            axis.plot([estimate.low, estimate.high], [index, index], color=PALETTE[1], linewidth=1.2)
        axis.plot([estimate.value], [index], "o", color=PALETTE[1], markersize=4)
    axis.axvline(zero, color="grey", linewidth=0.8)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)


def draw_side_by_side(axis: Axes, series: Mapping[str, Mapping[int, Estimate]], ticks: Sequence[str]) -> None:
    """Plot named series of estimates over the places 0, 1, … of `ticks`, with intervals, beside each other at each place."""
    axis.axhline(0, color="grey", linewidth=0.8)
    for index, (name, estimates) in enumerate(series.items()):
        drawn = look(index + 1)
        x = np.array(list(estimates)) + _DODGE * (index - (len(series) - 1) / 2)
        for place, estimate in zip(x, estimates.values(), strict=True):
            if estimate.bounded:
                axis.plot([place, place], [estimate.low, estimate.high], color=drawn.color, linewidth=1.2)
        values = [estimate.value for estimate in estimates.values()]
        (line,) = axis.plot(x, values, color=drawn.color, linestyle=drawn.dashes, label=name)
        line.set(linewidth=0.8, marker=drawn.marker, markersize=4)
    axis.set_xticks(range(len(ticks)), list(ticks))


def save_svg(figure: Figure | None, path: Path) -> None:
    """Write a figure; the same figure gives the same bytes. None removes the file, which may exist from an earlier part of a study."""
    if figure is None:
        return path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "difftori"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
    return None


def style() -> AbstractContextManager[None]:
    """Return a context manager with the style of all figures."""
    return mpl.rc_context(
        {
            "font.size": 9,
            "text.parse_math": False,  # names may contain characters of formulas
            "axes.titlesize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#DDDDDD",
            "grid.linewidth": 0.6,
            "axes.axisbelow": True,
            "legend.frameon": False,
        }
    )


def shared_legend(figure: Figure, methods: Sequence[str], *, columns: int = 8) -> None:
    """Add one legend above all panels, with the plotted ones of `methods`, in their order, in at most `columns` columns.

    The figure is enlarged if a long name or many methods need it.
    """
    handles = {}
    for axis in figure.axes:
        drawn, labels = axis.get_legend_handles_labels()
        handles.update(zip(labels, drawn, strict=True))
    names = [method for method in methods if method in handles]
    entry = _HANDLE + _LETTER * max(map(len, names), default=0)
    figure.set_figwidth(max(figure.get_figwidth(), entry))
    fitting = max(min(len(names), columns, int(figure.get_figwidth() / entry)), 1)
    extra = -(-len(names) // fitting) - _ROWS
    figure.set_figheight(figure.get_figheight() + _LINE * max(extra, 0))
    figure.legend([handles[name] for name in names], names, loc="outside upper center", ncols=fitting)


def footnote(figure: Figure, text: str) -> None:
    """Add a note in small letters below the figure, in as many lines as its width needs."""
    text = textwrap.fill(text, int(_NOTE_LETTERS * figure.get_figwidth()))
    figure.supxlabel(text, fontsize=7.5, color="#444444")
