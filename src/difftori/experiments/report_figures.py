"""Figures of a report: learning curves, results over tasks, performance profiles, pairs of methods."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from difftori.experiments.analyse import OVER, SEED, Section
from difftori.experiments.gather import Run
from difftori.experiments.plots import (
    MARKERS,
    Trace,
    draw_intervals,
    draw_traces,
    footnote,
    look,
    shared_legend,
    style,
    task_panels,
)
from difftori.experiments.records import RETURN, VALIDATION_ERROR
from difftori.experiments.statistics import performance_profile, stratified_band

_READABLE = 24
_THRESHOLDS = np.linspace(0.0, 1.0, 101)


def learning_curves(runs: Sequence[Run], name: str, methods: Sequence[str]) -> Figure | None:
    """Plot evaluations over steps, one panel for each task; None without evaluations."""
    drawn = [run for run in runs if run.curve_name == name and len(run.curve[0])]
    tasks = sorted({run.task for run in drawn})
    if not tasks:
        return None

    def draw(axis: Axes, task: str) -> None:
        for index, method in enumerate(methods):
            own = [run.curve for run in drawn if run.task == task and run.method == method]
            draw_traces(axis, [Trace(steps, steps, values) for steps, values in own], index, method)
        if name == VALIDATION_ERROR:
            axis.set_yscale("log")

    xlabel = "environment steps" if name == RETURN else "updates"
    note = "thin: seeds; bold: their mean over the steps that all have reached"
    return task_panels(tasks, methods, draw, xlabel=xlabel, ylabel=name.partition("/")[2], note=note)


def over_tasks(section: Section) -> Figure:
    """Plot mean, median, interquartile mean and optimality gap with their intervals, one line for each method."""
    with style():
        figure = Figure(figsize=(11.0, 0.34 * len(section.over) + 1.3), layout="constrained")
        axes = figure.subplots(1, len(OVER), sharey=True, squeeze=False)[0]
        for axis, name in zip(axes, OVER, strict=True):
            for index, row in enumerate(section.over):
                estimate = row.statistics[name]
                drawn = look(section.methods.index(row.method))
                if estimate.bounded:
                    axis.plot([estimate.low, estimate.high], [index, index], linewidth=5, alpha=0.35, color=drawn.color)
                axis.plot([estimate.value], [index], marker=MARKERS[index % len(MARKERS)], color=drawn.color)
            axis.set_title(
                {"iqm": "interquartile mean", "optimality gap": "optimality gap (lower is better)"}.get(name, name)
            )
        axes[0].set_yticks(range(len(section.over)), [row.method for row in section.over])
        axes[0].invert_yaxis()
        runs = ", ".join(sorted({str(row.runs) for row in section.over}))
        footnote(
            figure, f"{len(section.common)} task(s), {runs} runs per method; bars: 95 % stratified bootstrap over seeds"
        )
    return figure


def profiles(section: Section) -> Figure:
    """Plot performance profiles: the share of runs above each value, with bootstrap bands."""
    with style():
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axis = figure.subplots()
        for method, strata in section.scaled.items():
            drawn = look(section.methods.index(method))
            share, low, high = stratified_band(
                strata, lambda s: performance_profile(s, _THRESHOLDS), np.random.default_rng(SEED)
            )
            axis.step(
                _THRESHOLDS, share, where="post", label=method, linewidth=1.6, color=drawn.color, linestyle=drawn.dashes
            )
            if min(map(len, strata)) > 1:
                axis.fill_between(_THRESHOLDS, low, high, color=drawn.color, alpha=0.12, linewidth=0, step="post")
        scale = section.measure.full
        axis.set(xlabel=section.measure.name + ("" if scale == 1 else f" / {scale:g}"), ylabel="share of runs above")
        shared_legend(figure, section.methods, columns=2)
        footnote(
            figure,
            f"performance profile over {len(section.common)} task(s); bands: 95 %, for methods with two seeds or more",
        )
    return figure


def against(section: Section) -> Figure | None:
    """Plot differences and probabilities of improvement over all tasks, or on a single one. None without pairs, or with too many to
    be readable; `--reference` reduces their number.
    """
    rows = [pair for pair in section.pairs if pair.task is None] or list(section.pairs)
    if not 0 < len(rows) <= _READABLE:
        return None
    with style():
        figure = Figure(figsize=(10.0, 0.3 * len(rows) + 1.4), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        names = [(f"{r.task}: " if r.task else "") + f"{r.method} − {r.reference}" for r in rows]
        for axis, name, zero in ((left, "difference", 0.0), (right, "better", 0.5)):
            estimates = [getattr(row, name) for row in rows]
            draw_intervals(axis, names, estimates, zero)
        right.set_xlim(-0.02, 1.02)
        left.set_xlabel(f"difference of {section.measure.name}, paired")
        right.set_xlabel("probability of improvement")
        footnote(figure, "bars: 95 %")
    return figure
