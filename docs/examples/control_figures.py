"""Draws the figures of docs/control.md; each example calls one of these functions and writes its SVG beside itself."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

plt.rcParams.update(
    {"svg.hashsalt": "difftori", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 1.5}
)


def save(figure, name):
    """Writes NAME.svg without a date, so that equal runs give equal files."""
    figure.savefig(Path(__file__).with_name(f"{name}.svg"), metadata={"Date": None}, facecolor="white")


def time_plot(name, time, rows, events=()):
    """One axis for each row (label of the axis, {label of the line: values}, limits or None)."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(6.4, 1.6 * len(rows) + 0.6), sharex=True, layout="constrained")
    for axis, (label, lines, limits) in zip(axes, rows, strict=True):
        for index, (line, values) in enumerate(lines.items()):
            axis.plot(time[: len(values)], values, "-" if index == 0 else "--", label=line)
        for limit in limits or ():
            axis.axhline(limit, color="0.5", linestyle=":", linewidth=1)
        for at, text in events:
            axis.axvline(at, color="tab:red", linewidth=1)
            if axis is axes[0]:
                axis.annotate(
                    text, (at, 0), xycoords=("data", "axes fraction"), xytext=(3, 5), textcoords="offset points"
                )
        axis.set_ylabel(label)
        if len(lines) > 1:
            axis.legend(fontsize=8)
    axes[-1].set_xlabel("time [s]")
    save(figure, name)


def path_plot(name, paths, centers, radius, goal):
    """Paths {label: (x, y)} in a plane with circles."""
    figure, axis = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    for x, y in centers:
        axis.add_patch(plt.Circle((x, y), radius, color="0.8"))
    for (label, (x, y)), style in zip(paths.items(), ("o-", "s--"), strict=False):
        axis.plot(x, y, style, markersize=3, label=label)
    axis.plot(*goal, "k*", markersize=10, label="goal")
    axis.set_aspect("equal")
    axis.set_xlabel("x [m]")
    axis.set_ylabel("y [m]")
    axis.legend(fontsize=8)
    save(figure, name)
