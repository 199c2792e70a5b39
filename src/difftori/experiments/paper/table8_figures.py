"""Figures of the Table 8 study: learning curves of control errors, and phase planes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator

from difftori.experiments.plots import DASHES, MARKERS, PALETTE, footnote, shared_legend, style


@dataclass(frozen=True)
class Curve:
    """One run's learning curve: errors `values` (k) at `epochs` (k), which are positive and ascending."""

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
    """Plot the least error so far, one panel per setting: thin lines for seeds, bold for their median. Logarithmic axes.

    The least error so far is that of the selected weights, and its curve is readable over thousands of epochs.

    `panels` maps setting → method → one curve per seed. `methods` determines the colours and the order of the legend.
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
    """Plot a grid of phase planes, with settings as rows and methods as columns, all from the same starts.

    Grey lines show the method `reference` behind each of the others. A ring marks a start, a dot an end. `methods` determines
    the colours and the order of the columns; methods that are in no panel are omitted.
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
