"""Pictures of a report: learning curves, results over tasks, performance profiles, method against method."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from difftori.experiments.analyse import OVER, SEED, Section
from difftori.experiments.gather import Run
from difftori.experiments.plots import DASHES, MARKERS, PALETTE, footnote, shared_legend, style, thousands
from difftori.experiments.statistics import performance_profile, stratified_band

_ACROSS = 4
_READABLE = 24
_THRESHOLDS = np.linspace(0.0, 1.0, 101)


def learning_curves(runs: Sequence[Run], name: str, methods: Sequence[str]) -> Figure | None:
    """Evaluations over steps, a panel for each task: seeds thin, their mean bold as far as all have come; None without any."""
    drawn = [run for run in runs if run.curve_name == name and len(run.curve[0])]
    tasks = sorted({run.task for run in drawn})
    if not tasks:
        return None
    across = min(_ACROSS, len(tasks))
    down = -(-len(tasks) // across)
    with style():
        figure = Figure(figsize=(3.1 * across + 0.8, 2.4 * down + 1.2), layout="constrained")
        axes = figure.subplots(down, across, squeeze=False)
        for axis, task in zip(axes.flat, tasks, strict=False):
            for method in methods:
                own = [run.curve for run in drawn if run.task == task and run.method == method]
                look = _look(methods.index(method))
                for steps, values in own:
                    axis.plot(steps, values, color=look["color"], linewidth=0.6, alpha=0.45)
                if own:
                    shared = sorted(set.intersection(*(set(steps.tolist()) for steps, _ in own)))
                    rows = [values[np.isin(steps, shared)] for steps, values in own]
                    axis.plot(shared, np.mean(rows, axis=0), linewidth=2.0, label=method, **look)
            axis.set_title(task)
            axis.xaxis.set_major_formatter(FuncFormatter(thousands))
            if name == "validation/error":
                axis.set_yscale("log")
        for axis in axes.flat[len(tasks) :]:
            axis.set_axis_off()
        for row in axes:
            row[0].set_ylabel(name.partition("/")[2])
        for axis in axes.flat[max(len(tasks) - across, 0) : len(tasks)]:
            axis.set_xlabel("environment steps" if name == "eval/return" else "updates")
        shared_legend(figure, methods, columns=max(across, 2))
        footnote(figure, "thin: seeds; bold: their mean, as far as all have come")
    return figure


def over_tasks(section: Section) -> Figure:
    """Mean, median, interquartile mean and optimality gap with their intervals, a line for each method."""
    with style():
        figure = Figure(figsize=(11.0, 0.34 * len(section.over) + 1.3), layout="constrained")
        axes = figure.subplots(1, len(OVER), sharey=True, squeeze=False)[0]
        for axis, name in zip(axes, OVER, strict=True):
            for index, row in enumerate(section.over):
                estimate = row.statistics[name]
                look = _look(section.methods.index(row.method))
                if np.isfinite(estimate.low):
                    axis.plot(
                        [estimate.low, estimate.high], [index, index], linewidth=5, alpha=0.35, color=look["color"]
                    )
                axis.plot([estimate.value], [index], marker=MARKERS[index % len(MARKERS)], color=look["color"])
            axis.set_title(
                {"iqm": "interquartile mean", "optimality gap": "optimality gap (less: better)"}.get(name, name)
            )
        axes[0].set_yticks(range(len(section.over)), [row.method for row in section.over])
        axes[0].invert_yaxis()
        runs = ", ".join(sorted({str(row.runs) for row in section.over}))
        footnote(
            figure, f"{len(section.common)} task(s), {runs} runs a method; bars: 95 % stratified bootstrap over seeds"
        )
    return figure


def profiles(section: Section) -> Figure:
    """The share of runs above each value, with bands from the bootstrap."""
    with style():
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axis = figure.subplots()
        for method, strata in section.scaled.items():
            look = _look(section.methods.index(method))
            share, low, high = stratified_band(
                strata, lambda s: performance_profile(s, _THRESHOLDS), np.random.default_rng(SEED)
            )
            axis.step(_THRESHOLDS, share, where="post", label=method, linewidth=1.6, **look)
            if min(map(len, strata)) > 1:
                axis.fill_between(_THRESHOLDS, low, high, color=look["color"], alpha=0.12, linewidth=0, step="post")
        scale = section.measure.full
        axis.set(xlabel=section.measure.name + ("" if scale == 1 else f" / {scale:g}"), ylabel="share of runs above")
        shared_legend(figure, section.methods, columns=2)
        footnote(
            figure, f"performance profile over {len(section.common)} task(s); bands: 95 %, where methods have two seeds"
        )
    return figure


def against(section: Section) -> Figure | None:
    """Differences and probabilities of improvement over all tasks, or on the only one; None without pairs, or with too many
    to be read: then a reference helps.
    """
    rows = [pair for pair in section.pairs if pair.task is None] or list(section.pairs)
    if not 0 < len(rows) <= _READABLE:
        return None
    with style():
        figure = Figure(figsize=(10.0, 0.3 * len(rows) + 1.4), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for axis, name in ((left, "difference"), (right, "better")):
            for index, row in enumerate(rows):
                estimate = getattr(row, name)
                if np.isfinite(estimate.low):
                    axis.plot([estimate.low, estimate.high], [index, index], color=PALETTE[1], linewidth=1.2)
                axis.plot([estimate.value], [index], "o", color=PALETTE[1], markersize=4)
        left.axvline(0, color="grey", linewidth=0.8)
        right.axvline(0.5, color="grey", linewidth=0.8)
        right.set_xlim(-0.02, 1.02)
        left.set_xlabel(f"difference of {section.measure.name}, paired")
        right.set_xlabel("probability that a run is better")
        shown = [(f"{r.task}: " if r.task else "") + f"{r.method} − {r.reference}" for r in rows]
        left.set_yticks(range(len(rows)), shown)
        left.invert_yaxis()
        footnote(figure, "bars: 95 %")
    return figure


def _look(index: int) -> dict:
    turn, place = divmod(index, len(PALETTE))
    return {"color": PALETTE[place], "linestyle": DASHES[(place + turn) % len(DASHES)]}
