"""Figures of a report: learning curves, results over tasks, performance profiles, pairs of methods."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from difftori.experiments.analyse import OVER, SEED, Section
from difftori.experiments.gather import RunResult
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
from difftori.experiments.records import RETURN, VALIDATION_ERROR, due_steps
from difftori.experiments.statistics import performance_profile, stratified_band

_READABLE = 24
_THRESHOLDS = np.linspace(0.0, 1.0, 101)


def learning_curves(runs: Sequence[RunResult], name: str, methods: Sequence[str]) -> Figure | None:
    """Plot evaluations over steps, one panel for each task, and training episodes of runs with fewer than two evaluations.

    None if there is nothing to plot.
    """
    drawn = [run for run in runs if run.curve_name == name and len(run.curve[0]) + len(run.training[0])]
    tasks = sorted({run.task for run in drawn})
    if not tasks:
        return None

    def draw(axis: Axes, task: str) -> None:
        for index, method in enumerate(methods):
            own = [run for run in drawn if run.task == task and run.method == method]
            for steps, values in (run.training for run in own):
                axis.plot(steps, values, ":", color=look(index).color, linewidth=0.8, label=method)
            draw_traces(axis, [Trace(_due(run), *run.curve) for run in own], index, method)
        if name == VALIDATION_ERROR:
            axis.set_yscale("log")

    xlabel = "environment steps" if name == RETURN else "updates"
    note = "thin: seeds; bold: their mean over the steps that all have reached; points: single evaluations"
    if any(len(run.training[0]) for run in drawn):
        note += "; dotted: training episodes, of runs with fewer than two evaluations"
    return task_panels(tasks, methods, draw, xlabel=xlabel, ylabel=name.partition("/")[2], note=note)


def _due(run: RunResult) -> np.ndarray:
    """Return the steps (k) at which the evaluations of a run were due. Those of policies are as they are."""
    every, last = run.config.get("eval_every"), run.config.get("steps")
    return due_steps(run.curve[0], every, last) if every and last else run.curve[0]


def over_tasks(section: Section) -> Figure:
    """Plot mean, median, interquartile mean and optimality gap with their intervals, one line for each method."""
    with style():
        names = 0.075 * max(len(row.method) for row in section.over)
        figure = Figure(figsize=(8.0 + names, 0.34 * len(section.over) + 1.5), layout="constrained")
        axes = figure.subplots(1, len(OVER), sharey=True, squeeze=False)[0]
        for axis, name in zip(axes, OVER, strict=True):
            for index, row in enumerate(section.over):
                estimate = row.statistics[name]
                drawn = look(section.methods.index(row.method))
                if estimate.bounded:
                    axis.plot([estimate.low, estimate.high], [index, index], linewidth=5, alpha=0.35, color=drawn.color)
                axis.plot([estimate.value], [index], marker=MARKERS[index % len(MARKERS)], color=drawn.color)
            axis.set_title(
                {"iqm": "interquartile mean", "optimality gap": "optimality gap\n(lower is better)"}.get(name, name)
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
    tasks, references = {row.task for row in rows}, {row.reference for row in rows}
    names = [
        (f"{row.task}: " if len(tasks) > 1 else "")
        + row.method
        + (f" − {row.reference}" if len(references) > 1 else "")
        for row in rows
    ]
    of = section.measure.name + (f" to {rows[0].reference}" if len(references) == 1 else "")
    better = [row.better for row in rows if row.better is not None]
    over = (
        "over runs" if better else "over the common episodes of one run each, without the variation between trainings"
    )
    with style():
        letters = max(*map(len, names), len(of) if not better else 0)
        figure = Figure(figsize=(6.5 + 0.075 * letters, 0.3 * len(rows) + 1.4), layout="constrained")
        left, *right = figure.subplots(1, 2 if better else 1, sharey=True, squeeze=False)[0]
        draw_intervals(left, names, [row.difference for row in rows])
        left.set_xlabel(f"difference of {of}, paired")
        for axis in right:
            draw_intervals(axis, names, better, 0.5)
            axis.set(xlim=(-0.02, 1.02), xlabel="probability of improvement")
        footnote(figure, f"bars: 95 %, {over}")
    return figure
