"""Pictures of the studies: vector graphics, readable without colour vision and in print.

Every method has its own colour of the Okabe–Ito palette AND its own line style, so that colour alone carries nothing.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator

PALETTE = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colours, those with contrast on white first."""
DASHES = ("solid", "dashed", "dashdot", "dotted", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 1)), (0, (1, 1)))
MARKERS = ("x", "o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class Curve:
    """One run's learning curve: errors `values` at `epochs`, (k) each, the epochs above 0 and ascending."""

    epochs: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Swing:
    """Trajectories of one method: `angles` (B H) in rad, unwrapped, and `velocities` (B H) in rad/s; 0 is upright."""

    angles: np.ndarray
    velocities: np.ndarray
    caption: str


def learning_curves(
    panels: Mapping[str, Mapping[str, Sequence[Curve]]], methods: Sequence[str], *, ylabel: str, caption: str
) -> Figure:
    """The least error so far, one panel per setting: thin lines for seeds, bold for their median. Logarithmic axes.

    The least so far is what the selected checkpoint has, and stays readable over thousands of epochs.

    `panels` maps setting → method → one curve per seed; `methods` fixes colours and the order of the legend.
    """
    with style():
        figure = Figure(figsize=(4.4 * len(panels) + 0.6, 3.9), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        plain = FuncFormatter(lambda value, _: f"{value:g}")
        for axis, (setting, by_method) in zip(axes, panels.items(), strict=True):
            for method, curves in by_method.items():
                _draw_curves(axis, curves, methods.index(method), method)
            axis.set(title=setting, xlabel="epoch", yscale="log", xscale="log")
            axis.xaxis.set_major_formatter(plain)
            axis.yaxis.set_major_formatter(plain)
        axes[0].set_ylabel(ylabel)
        shared_legend(figure, methods)
        footnote(figure, caption)
    return figure


def phase_plane(
    panels: Mapping[str, Mapping[str, Swing]], methods: Sequence[str], *, reference: str, caption: str
) -> Figure:
    """A grid of phase planes, settings down and methods across, all from the same starts.

    Grey lines repeat the method `reference` behind each of the others. A ring marks a start, a dot an end. `methods`
    fixes the colours and the order of the columns; those that no panel holds are left out.
    """
    shown = [method for method in methods if any(method in by_method for by_method in panels.values())]
    with style():
        rows, columns = len(panels), len(shown)
        figure = Figure(figsize=(2.5 * columns + 0.6, 2.6 * rows + 0.5), layout="constrained")
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for row, (setting, by_method) in zip(axes, panels.items(), strict=True):
            for axis, method in zip(row, shown, strict=True):
                _draw_swings(axis, by_method, method, reference, PALETTE[methods.index(method)])
            row[0].set_ylabel(f"{setting}\nangular velocity (rad/s)")
        for axis in axes[-1]:
            axis.set_xlabel("angle (°), 0 = upright")
        footnote(figure, caption)
    return figure


def save_svg(figure: Figure, path: Path) -> None:
    """Writes the same bytes for the same picture: no date, fixed identifiers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "difftori"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def style() -> AbstractContextManager[None]:
    """The look of all pictures, as a context to draw in."""
    return mpl.rc_context(
        {
            "font.size": 9,
            "text.parse_math": False,  # names are text, whatever they hold
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


def _draw_curves(axis: Axes, curves: Sequence[Curve], index: int, label: str) -> None:
    colour = PALETTE[index]
    least = [np.minimum.accumulate(curve.values) for curve in curves]
    shared = curves[0].epochs
    for curve, values in zip(curves, least, strict=True):
        axis.plot(curve.epochs, values, color=colour, linewidth=0.6, alpha=0.5)
        shared = np.intersect1d(shared, curve.epochs)
    if len(shared):
        stacked = [values[np.isin(curve.epochs, shared)] for curve, values in zip(curves, least, strict=True)]
        marked = np.unique(np.searchsorted(shared, np.geomspace(shared[0], shared[-1], 6)[1:]))
        middle = np.median(stacked, axis=0)
        (line,) = axis.plot(shared, middle, color=colour, linestyle=DASHES[index], linewidth=2.0, label=label)
        line.set(marker=MARKERS[index], markevery=marked.tolist())


def _draw_swings(axis: Axes, by_method: Mapping[str, Swing], method: str, reference: str, colour: str) -> None:
    axis.xaxis.set_major_locator(MultipleLocator(180))
    axis.xaxis.set_minor_locator(MultipleLocator(90))
    axis.axvline(0, color="#999999", linewidth=0.8)
    axis.axhline(0, color="#999999", linewidth=0.8)
    if method not in by_method:
        axis.set_title(f"{method} (not run)")
        return
    swing = by_method[method]
    if method != reference and reference in by_method:
        behind = by_method[reference]
        axis.plot(np.degrees(behind.angles.T), behind.velocities.T, color="#AAAAAA", linewidth=1.6)
    degrees = np.degrees(swing.angles)
    axis.plot(degrees.T, swing.velocities.T, color=colour, linewidth=1.1)
    axis.plot(degrees[:, 0], swing.velocities[:, 0], "o", color=colour, markersize=4, markerfacecolor="white")
    axis.plot(degrees[:, -1], swing.velocities[:, -1], "o", color=colour, markersize=3)
    axis.set_title(f"{method}\n{swing.caption}")


def shared_legend(figure: Figure, methods: Sequence[str], *, columns: int = 8) -> None:
    """One legend above all panels, with those of `methods` that are drawn, in their order, so many to a line."""
    handles = {}
    for axis in figure.axes:
        drawn, labels = axis.get_legend_handles_labels()
        handles.update(zip(labels, drawn, strict=True))
    names = [method for method in methods if method in handles]
    figure.legend(
        [handles[name] for name in names], names, loc="outside upper center", ncols=max(min(len(names), columns), 1)
    )


def thousands(value: float, _: int) -> str:
    """A tick's words: 20000 is `20k`."""
    return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}"


def footnote(figure: Figure, text: str) -> None:
    """What must be known to read the picture, small below it."""
    figure.supxlabel(text, fontsize=7.5, color="#444444")
