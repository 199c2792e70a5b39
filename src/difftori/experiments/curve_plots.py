"""Pictures of learning curves: a panel for each task, normalised returns over tasks, differences between arms."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from difftori.experiments.curve_tables import ALL_TASKS, OURS, Aggregate, Difference
from difftori.experiments.curves import Curves, Record, common_steps
from difftori.experiments.plots import DASHES, MARKERS, PALETTE, footnote, shared_legend, style, thousands
from difftori.experiments.runs import full_return, num_steps, observation
from difftori.paper.curves import PublishedCurve, published_curves

_ACROSS = 5
_SEEDS = "thin: seeds; bold: their mean as far as all have come"


def task_panels(curves: Curves, *, title: str, beside: bool) -> Figure:
    """Return over environment steps, a panel for each task with runs; `beside`: published means too, thin with marks."""
    published = published_curves(observation(curves.config)) if beside else ()
    names = _names(curves, published)

    def draw(axis: Axes, task: str) -> None:
        for arm in curves.arms:
            _draw_runs(axis, curves.of(task, arm), lambda record: record.steps, names.index(arm.label), arm.label)
        for curve in published:
            shown = (curve.steps <= num_steps(curves.config)) & np.isfinite(curve.returns).any(axis=0)
            if curve.task == task and shown.any():
                means = np.nanmean(curve.returns[:, shown], axis=0)
                name = _published(curve.method)
                _draw_published(axis, curve.steps[shown], means, names.index(name), name)

    note = f"{_label(curves)}{title}; {_SEEDS}; published means of other methods with small marks"
    return _panels(curves, names, draw, xlabel="environment steps", note=note if published else _plain(curves, title))


def clock_panels(curves: Curves, *, title: str) -> Figure:
    """Return over seconds of training without evaluation, a panel for each task with runs. Published times are of other machines."""
    names = [arm.label for arm in curves.arms]

    def draw(axis: Axes, task: str) -> None:
        for arm in curves.arms:
            _draw_runs(axis, curves.of(task, arm), lambda record: record.seconds, names.index(arm.label), arm.label)

    return _panels(curves, names, draw, xlabel="training seconds, without evaluation", note=_plain(curves, title))


def over_tasks(curves: Curves, rows: Sequence[Aggregate]) -> Figure:
    """Normalised mean and interquartile mean over tasks, with 95 % stratified bootstrap intervals as bands."""
    published = published_curves(observation(curves.config))
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
        axes[0].set(title="mean of task means", ylabel=f"return / {full_return(curves.config):g}")
        axes[1].set_title("interquartile mean")
        shared_legend(figure, methods, columns=4)
        ours = next(row for row in rows if row.origin == OURS)
        footnote(figure, f"{_label(curves)}{ours.tasks} task(s), {ours.runs} finished runs a method; bands: 95 %")
    return figure


def difference_bars(curves: Curves, rows: Sequence[Difference], *, reference: str) -> Figure:
    """Final return − the reference's by task and seed, with 95 % intervals; a point without one is a single pair."""
    shown = [row for row in rows if row.measure == "final"]
    tasks = [task for task in (*curves.tasks, ALL_TASKS) if any(row.task == task for row in shown)]
    methods = [arm.label for arm in curves.arms]
    compared = [method for method in methods if method != reference]
    with style():
        figure = Figure(figsize=(7.0, 0.32 * len(tasks) * max(len(compared), 1) + 1.6), layout="constrained")
        axis = figure.subplots()
        for row in shown:
            place = tasks.index(row.task) + 0.7 * (compared.index(row.method) + 0.5) / len(compared) - 0.35
            ends = None if row.low is None or row.high is None else [[row.value - row.low], [row.high - row.value]]
            index = methods.index(row.method) % len(PALETTE)
            axis.errorbar(
                [row.value],
                [place],
                xerr=ends,
                color=PALETTE[index],
                marker=MARKERS[index],
                label=row.method,
                linestyle="none",
            )
        axis.axvline(0, color="#666666", linewidth=1.0)
        axis.set_yticks(range(len(tasks)), tasks)
        axis.invert_yaxis()
        low, high = axis.get_xlim()  # intervals from two pairs reach beyond what returns can differ by
        reach = full_return(curves.config)
        axis.set_xlim(max(low, -reach), min(high, reach))
        axis.set_xlabel(f"final return − that of {reference}, paired by task and seed")
        shared_legend(figure, compared)
        footnote(figure, f"{_label(curves)}bars: 95 % (a task: Student over seeds; all tasks: stratified bootstrap)")
    return figure


def _panels(
    curves: Curves, names: Sequence[str], draw: Callable[[Axes, str], None], *, xlabel: str, note: str
) -> Figure:
    tasks = [task for task in curves.tasks if any(record.job.task == task for record in curves.records)]
    across = min(_ACROSS, len(tasks))
    down = -(-len(tasks) // across)
    with style():
        figure = Figure(figsize=(3.0 * across + 1.0, 2.3 * down + 1.3), layout="constrained")
        axes = figure.subplots(down, across, squeeze=False, sharex=False)
        for axis, task in zip(axes.flat, tasks, strict=False):
            draw(axis, task)
            axis.set_title(task)
            axis.xaxis.set_major_formatter(FuncFormatter(thousands))
        for axis in axes.flat[len(tasks) :]:
            axis.set_axis_off()
        for row in axes:
            row[0].set_ylabel("return")
        for axis in axes.flat[max(len(tasks) - across, 0) : len(tasks)]:
            axis.set_xlabel(xlabel)
        shared_legend(figure, names, columns=max(int(figure.get_figwidth() // 2.4), 2))
        footnote(figure, note)
    return figure


def _draw_runs(
    axis: Axes, records: Sequence[Record], across: Callable[[Record], np.ndarray], index: int, label: str
) -> None:
    if not records:
        return
    colour, dashes = PALETTE[index % len(PALETTE)], DASHES[index % len(DASHES)]
    for record in records:
        axis.plot(across(record), record.returns, color=colour, linewidth=0.6, alpha=0.45)
    steps = common_steps(records)
    places = [np.searchsorted(record.steps, steps) for record in records]
    middle = np.mean([across(record)[place] for record, place in zip(records, places, strict=True)], axis=0)
    values = np.mean([record.returns[place] for record, place in zip(records, places, strict=True)], axis=0)
    axis.plot(middle, values, color=colour, linestyle=dashes, linewidth=2.0, label=label)


def _draw_published(axis: Axes, steps: np.ndarray, means: np.ndarray, index: int, label: str) -> None:
    colour, marker = PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)]
    every = max(len(steps) // 5, 1)
    (line,) = axis.plot(steps, means, color=colour, linewidth=1.0, linestyle=DASHES[index % len(DASHES)], label=label)
    line.set(marker=marker, markersize=4, markevery=every)


def _draw_aggregate(axis: Axes, rows: Sequence[Aggregate], name: str, index: int) -> None:
    steps = np.array([row.steps for row in rows])
    values, low, high = (
        np.array([getattr(row, field) for row in rows], dtype=float) for field in (name, f"{name}_low", f"{name}_high")
    )
    colour, ours = PALETTE[index % len(PALETTE)], rows[0].origin == OURS
    label = _name(rows[0])
    (line,) = axis.plot(steps, values, color=colour, linestyle=DASHES[index % len(DASHES)], label=label)
    line.set(linewidth=2.0 if ours else 1.0, marker="" if ours else MARKERS[index % len(MARKERS)])
    line.set(markersize=4, markevery=max(len(steps) // 5, 1))
    if np.isfinite(low).all():
        axis.fill_between(steps, low, high, color=colour, alpha=0.18 if ours else 0.08, linewidth=0)


def _names(curves: Curves, published: Sequence[PublishedCurve]) -> list[str]:
    """All that may be drawn, in the order that fixes colours: the same in each picture of a study."""
    return [arm.label for arm in curves.arms] + list(dict.fromkeys(_published(curve.method) for curve in published))


def _published(method: str) -> str:
    return f"{method}, published"


def _name(row: Aggregate) -> str:
    return row.method if row.origin == OURS else _published(row.method)


def _label(curves: Curves) -> str:
    return "partial study · " if curves.reasons else ""


def _plain(curves: Curves, title: str) -> str:
    return f"{_label(curves)}{title}; {_SEEDS}"
