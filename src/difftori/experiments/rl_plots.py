"""Figures of agents' learning curves: a panel for each task, normalised returns over tasks, differences between methods."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from difftori.experiments.plots import (
    Trace,
    difference_bars,
    draw_traces,
    footnote,
    look,
    shared_legend,
    style,
    task_panels,
)
from difftori.experiments.rl_study import Curves, full_return, num_steps, observation
from difftori.experiments.rl_tables import OURS, Aggregate
from difftori.experiments.statistics import Estimate
from difftori.experiments.tables import Difference
from difftori.paper.curves import PublishedCurve, published_curves
from difftori.runs.figures import thousands


def return_panels(curves: Curves, *, published: Sequence[PublishedCurve], clock: bool = False) -> Figure:
    """Plot the return over environment steps, one panel for each task with runs. Published means are thin lines with markers.

    `clock`: over training seconds, without evaluation, instead.
    """
    names = _names(curves, published)

    def draw(axis: Axes, task: str) -> None:
        for method in curves.methods:
            results = curves.of(task, method.label).values()
            traces = [Trace(r.steps, r.seconds if clock else r.steps, r.returns) for r in results]
            draw_traces(axis, traces, names.index(method.label), method.label)
        for curve in published:
            shown = (curve.steps <= num_steps(curves.options)) & np.isfinite(curve.returns).any(axis=0)
            if curve.task == task and shown.any():
                means = np.nanmean(curve.returns[:, shown], axis=0)
                name = _published(curve.method)
                _draw_published(axis, curve.steps[shown], means, names.index(name), name)

    note = f"{_partial(curves)}evaluation returns; thin: seeds; bold: their mean over the steps that all have reached"
    return task_panels(
        [task for task in curves.tasks if any(result.run.task == task for result in curves.runs)],
        names,
        draw,
        xlabel="training seconds, without evaluation" if clock else "environment steps",
        ylabel="return",
        note=f"{note}; small markers: published means of other methods" if published else note,
    )


def over_tasks(curves: Curves, rows: Sequence[Aggregate]) -> Figure | None:
    """Plot the normalised mean and interquartile mean over tasks, with 95 % stratified bootstrap intervals as bands; None without rows."""
    if not rows:
        return None
    published = published_curves(observation(curves.options))
    methods = _names(curves, published)
    with style():
        figure = Figure(figsize=(9.4, 4.0), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for axis, name in zip(axes, ("mean", "iqm"), strict=True):
            for index, method in enumerate(methods):
                shown = [row for row in rows if _name(row) == method]
                if shown:
                    _draw_aggregate(axis, shown, name, index)
            axis.set_xlabel("environment steps")
            axis.xaxis.set_major_formatter(FuncFormatter(thousands))
        axes[0].set(title="mean of task means", ylabel=f"return / {full_return(curves.options):g}")
        axes[1].set_title("interquartile mean")
        shared_legend(figure, methods, columns=4)
        ours = next(row for row in rows if row.origin == OURS)
        footnote(figure, f"{_partial(curves)}{ours.tasks} task(s), {ours.runs} finished runs per method; bands: 95 %")
    return figure


def final_differences(curves: Curves, rows: Sequence[Difference]) -> Figure | None:
    """Plot the paired differences of the final return from the reference; None without rows."""
    if not rows:
        return None
    note = f"{_partial(curves)}bars: 95 % (a task: Student over seeds; all tasks: stratified bootstrap)"
    shown = [row for row in rows if row.measure == "final"]
    return difference_bars(
        shown, "difference of the final return, paired by task and seed", note, limit=full_return(curves.options)
    )


def _draw_published(axis: Axes, steps: np.ndarray, means: np.ndarray, index: int, label: str) -> None:
    drawn = look(index)
    (line,) = axis.plot(steps, means, color=drawn.color, linewidth=1.0, linestyle=drawn.dashes, label=label)
    line.set(marker=drawn.marker, markersize=4, markevery=max(len(steps) // 5, 1))


def _draw_aggregate(axis: Axes, rows: Sequence[Aggregate], name: str, index: int) -> None:
    steps = np.array([row.steps for row in rows])
    estimates: list[Estimate] = [getattr(row, name) for row in rows]
    values, low, high = (np.array([getattr(e, end) for e in estimates]) for end in ("value", "low", "high"))
    drawn, ours = look(index), rows[0].origin == OURS
    (line,) = axis.plot(steps, values, color=drawn.color, linestyle=drawn.dashes, label=_name(rows[0]))
    line.set(linewidth=2.0 if ours else 1.0, marker="" if ours else drawn.marker)
    line.set(markersize=4, markevery=max(len(steps) // 5, 1))
    if np.isfinite(low).all():
        axis.fill_between(steps, low, high, color=drawn.color, alpha=0.18 if ours else 0.08, linewidth=0)


def _names(curves: Curves, published: Sequence[PublishedCurve]) -> list[str]:
    """Return the names of all methods, in the order of their colours. It is the same in all figures of a study."""
    return [method.label for method in curves.methods] + list(
        dict.fromkeys(_published(curve.method) for curve in published)
    )


def _published(method: str) -> str:
    return f"{method}, published"


def _name(row: Aggregate) -> str:
    return row.method if row.origin == OURS else _published(row.method)


def _partial(curves: Curves) -> str:
    return "partial study · " if curves.reasons else ""
