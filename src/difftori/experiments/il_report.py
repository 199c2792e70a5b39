"""Tables and figures of imitation studies: success of each method by task, and paired differences."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from difftori.experiments.il_study import Case, ILStudy, run_imitation
from difftori.experiments.plots import difference_bars, footnote, look, save_svg, shared_legend, style
from difftori.experiments.pool import report_failures
from difftori.experiments.statistics import Estimate, mean_interval, student_interval
from difftori.experiments.study import Method, Result, Results
from difftori.experiments.tables import (
    Column,
    Difference,
    columns,
    difference_table,
    interval,
    markdown_table,
    number,
    plus_minus,
    screen_table,
    write_csv,
    write_page,
)
from difftori.rollout import wilson_interval

ALL = "all tasks"
NOTES = """\
`success`: share of evaluation episodes that succeed at any step, over all seeds, with Wilson's 95 % interval, which assumes independent
episodes. `score`: mean of the environment's own measure. Every policy is evaluated in the same episodes, with the seeds 100000, 100001, …, which
neither the data nor the selection of weights use. The last weights are evaluated (with `ema`, the EMA weights).
Differences are between runs of the same seed, with the same demonstrations, base and episodes. Their interval is Student's over runs (a
run's rate is one number), so it includes the variation of training. For a single pair of runs, the interval is over its episodes, and does
not include it. `seconds`: training time on the hardware named in the records."""


@dataclass(frozen=True)
class Row:
    """One row of `summary.csv`: a method on a task, over its finished seeds."""

    task: str
    method: str
    seeds: int
    episodes: int
    success: Estimate
    score: float
    validation_error: float | None
    seconds: float
    paper: float | None
    paper_std: float | None


@dataclass(frozen=True)
class Published:
    """A number of the paper: a success rate or score, from 0 to 1."""

    task: str
    method: str
    mean: float
    std: float | None


def run_refinement(
    config: ILStudy,
    cases: Sequence[Case],
    methods: Sequence[Method],
    compared: Sequence[tuple[str, str]],
    *,
    study: str,
    title: str,
    reasons: Sequence[str],
    budget: str,
    published: Sequence[Published] = (),
    measure: str = "success",
    runs: str | None = None,
) -> Results[ILStudy]:
    """Run the missing runs, and write `out/<study>`. Raises RunsFailedError at the end if runs failed.

    `compared` are pairs of methods' labels. `budget` names the folder of a partial study. `runs` names the folder of runs and
    their records (default: `<study>/<budget>`); several studies can share it.
    """
    console = Console()
    results = run_imitation(
        config,
        cases,
        methods,
        study=runs or f"{study}/{budget}",
        reasons=reasons,
        say=lambda text: console.print(text, highlight=False, soft_wrap=True),
    )
    out = results.folder(study, budget)
    rows = summaries(results, published)
    pairs = [found for label, reference in compared for found in differences(results, label, reference, measure)]
    write_csv(out / "summary.csv", rows)
    tables = {title: table(rows)}
    write_csv(out / "differences.csv", pairs)
    if pairs:
        note = f"{results.label}; bars: Student's 95 % over runs"
        figure = difference_bars(pairs, f"difference of the {measure}, paired by run", note)
        save_svg(figure, out / "differences.svg")
        tables["paired differences"] = difference_table(pairs, digits=2)
    save_svg(success_points(rows, results, measure), out / "tasks.svg")
    write_page(out, title, [f"{results.label}.", *map(markdown_table, tables.values()), NOTES])
    for heading, shown in tables.items():
        console.print(screen_table(heading, shown))
    console.print(f"Tables and figures are in {out} ({results.label}).", soft_wrap=True)
    report_failures(results.failures)
    return results


def summaries(results: Results, published: Sequence[Published]) -> list[Row]:
    """Summarise every method on every task, and over all tasks, from the tasks and seeds that every method has finished."""
    labels = [method.label for method in results.methods]
    rows = []
    for task in results.tasks:
        for label in labels:
            if runs := list(results.of(task, label).values()):
                rows.append(_row(task, label, runs, published))
    if len(results.tasks) > 1:
        shared = {task: set.intersection(*(set(results.of(task, label)) for label in labels)) for task in results.tasks}
        for label in labels:
            found = [
                results.of(task, label)[seed]
                for task in results.tasks
                for seed in results.of(task, label)
                if seed in shared[task]
            ]
            if found:
                rows.append(_row(ALL, label, found, published))
    return rows


def _row(task: str, label: str, runs: Sequence[Result], published: Sequence[Published]) -> Row:
    success = np.concatenate([run.episodes("success") for run in runs])
    errors = [run.summary.get("last/validation_error", math.nan) for run in runs]
    known = [error for error in errors if math.isfinite(error)]
    theirs = next((p for p in published if (p.task, p.method) == (task, label)), None)
    return Row(
        task=task,
        method=label,
        seeds=len({run.seed for run in runs}),
        episodes=len(success),
        success=Estimate(float(success.mean()), *wilson_interval(int(success.sum()), len(success))),
        score=float(np.concatenate([run.episodes("score") for run in runs]).mean()),
        validation_error=float(np.mean(known)) if known else None,
        seconds=float(np.mean([run.summary["seconds"] for run in runs])),
        paper=None if theirs is None else theirs.mean,
        paper_std=None if theirs is None else theirs.std,
    )


def differences(results: Results, label: str, reference: str, measure: str) -> list[Difference]:
    """Return method − reference on every task with at least two pairs, and over all pairs of runs with the same episodes.

    For a single pair, the interval is over its episodes.
    """

    def line(task: str, pairs: int, estimate: Estimate) -> Difference:
        return Difference(task, label, reference, measure, pairs, estimate, results.label)

    rows, every, episodes = [], [], []
    for task in results.tasks:
        ours, theirs = results.of(task, label), results.of(task, reference)
        shared = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
        pairs = [(a, b) for a, b in shared if np.array_equal(a.episodes("seed"), b.episodes("seed"))]
        episodes += [a.episodes(measure) - b.episodes(measure) for a, b in pairs]
        found = [float(gaps.mean()) for gaps in episodes[len(every) :]]
        every += found
        if len(found) > 1 and len(results.tasks) > 1:
            rows.append(line(task, len(found), student_interval(np.array(found))))
    if len(every) > 1:
        rows.append(line(ALL, len(every), student_interval(np.array(every))))
    elif every and len(episodes[0]) > 1:
        rows.append(line(ALL, 1, mean_interval(episodes[0])))
    return rows


def table(rows: Sequence[Row]) -> list[Column]:
    """Return the columns of the formatted table."""
    cells = {
        "task": [row.task for row in rows],
        "method": [row.method for row in rows],
        "seeds × episodes": [f"{row.seeds} × {row.episodes // max(row.seeds, 1)}" for row in rows],
        "success": [interval(row.success, 2) for row in rows],
        "score": [number(row.score, 2) for row in rows],
        "validation error": [number(row.validation_error, 4) for row in rows],
        "training s": [number(row.seconds, 0) for row in rows],
    }
    if any(row.paper is not None for row in rows):
        cells["paper"] = ["" if row.paper is None else plus_minus(row.paper, row.paper_std, 2) for row in rows]
    return columns(cells)


def success_points(rows: Sequence[Row], results: Results, measure: str) -> Figure:
    """Plot each method's measure by task, with Wilson intervals for success. Small crosses are the paper's numbers."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    labels = [method.label for method in results.methods]
    with style():
        figure = Figure(figsize=(1.6 + 1.3 * len(tasks) + 0.1 * len(labels), 3.9), layout="constrained")
        axis = figure.subplots()
        for index, label in enumerate(labels):
            own = [row for row in rows if row.method == label]
            places = np.array([tasks.index(row.task) for row in own])
            places = places + (index - (len(labels) - 1) / 2) * 0.8 / len(labels)
            values = np.array([row.success.value if measure == "success" else getattr(row, measure) for row in own])
            reach = [values - [row.success.low for row in own], [row.success.high for row in own] - values]
            bars = np.abs(reach) if measure == "success" else None
            drawn = look(index)
            shown = {"fmt": drawn.marker, "color": drawn.color, "markersize": 5, "linewidth": 1}
            axis.errorbar(places, values, bars, label=label, **shown)
            paper = [(place, row.paper) for place, row in zip(places, own, strict=True) if row.paper is not None]
            if paper:
                axis.plot(*zip(*paper, strict=True), "+", color=drawn.color, markersize=8)
        axis.set_xticks(range(len(tasks)), tasks, rotation=20, ha="right")
        axis.set(ylim=(-0.02, 1.02), ylabel=measure)
        shared_legend(figure, labels, columns=4)
        footnote(figure, f"{results.label}; bars: Wilson 95 %; crosses: the paper")
    return figure
