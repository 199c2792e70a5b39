"""Studies of refinement: success of each arm by task, and paired differences, in tables and a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from difftori.experiments.imitation import Arm, Case, ImitationConfig, Result, Results, make_results
from difftori.experiments.plots import MARKERS, PALETTE, footnote, save_svg, shared_legend, style
from difftori.experiments.pool import report_failures
from difftori.experiments.reporting import Column, interval, markdown_table, number, screen_table, write_csv
from difftori.experiments.statistics import Estimate, mean_interval, student_interval
from difftori.rollout import wilson_interval

ALL = "all tasks"
NOTES = """\
`success`: share of evaluation episodes that succeeded at any step, over all seeds, with Wilson's 95 % interval as if episodes
were independent; `score`: the mean of the environment's own measure. Every policy plays the same episodes, from the seeds 100000,
100001, …, which neither data nor choice of weights have seen; the last weights count (their average, where `ema` is set).
Differences are of runs from the same seed, that is the same demonstrations, base and episodes; their interval is Student's over runs (a
run's rate is one number), so it contains what training varies. Of a single pair of runs the interval is over its episodes, and leaves
that out. `seconds` of training on the hardware named in the kept files."""


@dataclass(frozen=True)
class Row:
    """One arm on one task, over its finished seeds."""

    task: str
    arm: str
    seeds: int
    episodes: int
    success: float
    low: float
    high: float
    score: float
    validation_error: float | None
    seconds: float
    paper: float | None
    paper_std: float | None


@dataclass(frozen=True)
class Pairs:
    """The difference of two arms' measure over runs of the same seed, on one task or all."""

    task: str
    arm: str
    reference: str
    measure: str
    runs: int
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Published:
    """A number of the paper, as a share from 0 to 1 of successes or of the score."""

    task: str
    arm: str
    mean: float
    std: float | None


def run_refinement(
    config: ImitationConfig,
    cases: Sequence[Case],
    arms: Sequence[Arm],
    compared: Sequence[tuple[str, str]],
    *,
    study: str,
    title: str,
    reasons: Sequence[str],
    budget: str,
    published: Sequence[Published] = (),
    measure: str = "success",
    runs: str | None = None,
) -> Results:
    """Run what is missing, and write `out/<study>`. RunsFailedError, after everything is drawn, if runs failed.

    `compared` are pairs of arms' labels; `budget` names the folder of a partial study; `runs` the folder of runs, where studies
    share them.
    """
    console = Console()
    results = make_results(
        config,
        cases,
        arms,
        study=f"{runs or study}/{budget}",
        reasons=reasons,
        say=lambda text: console.print(text, highlight=False, soft_wrap=True),
    )
    out = config.out / study / "partial" / budget if results.reasons else config.out / study
    rows = summaries(results, published)
    pairs = [found for arm, reference in compared for found in differences(results, arm, reference, measure)]
    write_csv(out / "summary.csv", rows)
    if pairs:
        write_csv(out / "differences.csv", pairs)
        save_svg(difference_bars(pairs, results.label), out / "differences.svg")
    save_svg(success_points(rows, results, measure), out / "tasks.svg")
    parts = [f"# {title}", f"{results.label}.", markdown_table(table(rows))]
    parts += [markdown_table(pair_table(pairs)), NOTES] if pairs else [NOTES]
    _write(out / "summary.md", "\n\n".join(parts) + "\n")
    console.print(screen_table(title, table(rows)))
    if pairs:
        console.print(screen_table("paired differences", pair_table(pairs)))
    console.print(f"Tables and pictures are in {out} ({results.label}).", soft_wrap=True)
    report_failures(results.failures)
    return results


def summaries(results: Results, published: Sequence[Published]) -> list[Row]:
    """Every arm on every task, and on all together, where only tasks and seeds count that every arm has finished."""
    rows = []
    shared = {one.name: _shared_seeds(results, one) for one in results.cases}
    for case in (*results.cases, None):
        for arm in results.arms:
            if case is None:
                found = [(one, results.of(one, arm.label)) for one in results.cases]
                runs = [run for one, by_seed in found for seed, run in by_seed.items() if seed in shared[one.name]]
            else:
                runs = list(results.of(case, arm.label).values())
            if runs and not (case is None and len(results.cases) == 1):
                rows.append(_row(ALL if case is None else case.name, arm, runs, published))
    return rows


def _shared_seeds(results: Results, case: Case) -> set[int]:
    """The seeds that every arm has finished on a task."""
    return set.intersection(*(set(results.of(case, arm.label)) for arm in results.arms))


def _row(task: str, arm: Arm, runs: Sequence[Result], published: Sequence[Published]) -> Row:
    success = np.concatenate([run.success for run in runs])
    low, high = wilson_interval(int(success.sum()), len(success))
    errors = [run.summary.get("last/validation_error") for run in runs]
    known = [error for error in errors if error is not None]
    theirs = next((p for p in published if p.task == task and p.arm == arm.label), None)
    return Row(
        task=task,
        arm=arm.label,
        seeds=len({run.job.seed for run in runs}),
        episodes=len(success),
        success=float(success.mean()),
        low=low,
        high=high,
        score=float(np.concatenate([run.score for run in runs]).mean()),
        validation_error=float(np.mean(known)) if known else None,
        seconds=float(np.mean([run.summary["seconds"] for run in runs])),
        paper=None if theirs is None else theirs.mean,
        paper_std=None if theirs is None else theirs.std,
    )


def differences(results: Results, arm: str, reference: str, measure: str) -> list[Pairs]:
    """Arm − reference on every task with two pairs or more, and over all pairs. Runs must have played the same episodes.

    Where there is one pair alone, over its episodes.
    """
    rows, every, episodes = [], [], []
    for case in results.cases:
        ours, theirs = results.of(case, arm), results.of(case, reference)
        shared = [seed for seed in sorted(ours.keys() & theirs.keys()) if ours[seed].seeds == theirs[seed].seeds]
        episodes += [getattr(ours[seed], measure) - getattr(theirs[seed], measure) for seed in shared]
        found = [float(gaps.mean()) for gaps in episodes[len(every) :]]
        every += found
        if len(found) > 1 and len(results.cases) > 1:
            rows.append(_pairs(case.name, arm, reference, measure, found))
    if len(every) > 1:
        rows.append(_pairs(ALL, arm, reference, measure, every))
    elif every and len(episodes[0]) > 1:
        only = mean_interval(episodes[0])
        rows.append(Pairs(ALL, arm, reference, measure, 1, only.value, only.low, only.high))
    return rows


def _pairs(task: str, arm: str, reference: str, measure: str, found: Sequence[float]) -> Pairs:
    estimate = student_interval(np.array(found))
    return Pairs(task, arm, reference, measure, len(found), estimate.value, estimate.low, estimate.high)


def table(rows: Sequence[Row]) -> list[Column]:
    """For people."""

    def paper(row: Row) -> str:
        return (
            ""
            if row.paper is None
            else f"{row.paper:.2f}" + ("" if row.paper_std is None else f" ± {row.paper_std:.2f}")
        )

    columns = [
        Column("task", tuple(row.task for row in rows), left=True),
        Column("arm", tuple(row.arm for row in rows), left=True),
        Column("seeds × episodes", tuple(f"{row.seeds} × {row.episodes // max(row.seeds, 1)}" for row in rows)),
        Column("success", tuple(interval(Estimate(row.success, row.low, row.high), 2) for row in rows)),
        Column("score", tuple(number(row.score, 2) for row in rows)),
        Column("validation error", tuple(number(row.validation_error, 4) for row in rows)),
        Column("training s", tuple(number(row.seconds, 0) for row in rows)),
    ]
    if any(row.paper is not None for row in rows):
        columns.append(Column("paper", tuple(paper(row) for row in rows)))
    return columns


def pair_table(rows: Sequence[Pairs]) -> list[Column]:
    """For people."""
    return [
        Column("task", tuple(row.task for row in rows), left=True),
        Column("difference", tuple(f"{row.arm} − {row.reference}" for row in rows), left=True),
        Column("pairs of runs", tuple(str(row.runs) for row in rows)),
        Column(
            f"of the {rows[0].measure}",
            tuple(interval(Estimate(row.difference, row.low, row.high), 2, signed=True) for row in rows),
        ),
    ]


def success_points(rows: Sequence[Row], results: Results, measure: str) -> Figure:
    """Each arm's measure by task, with Wilson intervals where it is success; the paper's numbers as small crosses."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    labels = [arm.label for arm in results.arms]
    with style():
        figure = Figure(figsize=(1.6 + 1.3 * len(tasks) + 0.1 * len(labels), 3.9), layout="constrained")
        axis = figure.subplots()
        for index, label in enumerate(labels):
            own = [row for row in rows if row.arm == label]
            places = np.array([tasks.index(row.task) for row in own]) + (index - (len(labels) - 1) / 2) * 0.8 / len(
                labels
            )
            values = np.array([getattr(row, measure) for row in own])
            reach = [values - [row.low for row in own], [row.high for row in own] - values]
            turn, place = divmod(index, len(PALETTE))  # the second time around, each colour gets another marker
            colour, marker = PALETTE[place], MARKERS[(place + turn) % len(MARKERS)]
            bars = np.abs(reach) if measure == "success" else None
            axis.errorbar(places, values, bars, fmt=marker, color=colour, label=label, markersize=5, linewidth=1)
            paper = [(place, row.paper) for place, row in zip(places, own, strict=True) if row.paper is not None]
            if paper:
                axis.plot(*zip(*paper, strict=True), "+", color=colour, markersize=8)
        axis.set_xticks(range(len(tasks)), tasks, rotation=20, ha="right")
        axis.set(ylim=(-0.02, 1.02), ylabel=measure)
        shared_legend(figure, labels, columns=4)
        footnote(figure, f"{results.label}; bars: Wilson 95 %; crosses: the paper")
    return figure


def difference_bars(rows: Sequence[Pairs], label: str) -> Figure:
    """Differences with their intervals, a line each."""
    names = [f"{row.task}: {row.arm} − {row.reference}" for row in rows]
    with style():
        figure = Figure(figsize=(8.0, 0.26 * len(rows) + 1.3), layout="constrained")
        axis = figure.subplots()
        values = np.array([row.difference for row in rows])
        reach = np.abs([values - [row.low for row in rows], [row.high for row in rows] - values])
        axis.errorbar(values, range(len(rows)), xerr=reach, fmt="o", color=PALETTE[1], markersize=4, linewidth=1)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_yticks(range(len(rows)), names)
        axis.invert_yaxis()
        axis.set_xlabel(f"difference of the {rows[0].measure}, paired by run")
        footnote(figure, f"{label}; bars: Student's 95 % over runs")
    return figure


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
