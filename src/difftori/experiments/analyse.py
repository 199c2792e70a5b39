"""Statistics of runs by measure: by task, over tasks, and for pairs of methods."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from difftori.errors import ConfigError
from difftori.experiments.gather import Measure, RunResult
from difftori.experiments.statistics import (
    Estimate,
    improvement_interval,
    interquartile_mean,
    mean_of_means,
    median_of_means,
    optimality_gap,
    paired_rates,
    spread,
    stratified_interval,
    student_interval,
)
from difftori.rollout import wilson_interval

SEED = 0
OVER = {
    "mean": mean_of_means,
    "median": median_of_means,
    "iqm": interquartile_mean,
    "optimality gap": optimality_gap,
}
"""Statistics over tasks, of values normalised to 1. rliable recommends the interquartile mean (`iqm`)."""


@dataclass(frozen=True)
class Cell:
    """A method on a task: the mean over seeds with Student's 95 % interval, and for success the rate over all episodes with Wilson's."""

    task: str
    method: str
    seeds: int
    episodes: int | None
    mean: Estimate
    std: float | None
    pooled: Estimate | None


@dataclass(frozen=True)
class Over:
    """A method over the tasks that all methods have: normalised statistics with their stratified bootstrap intervals."""

    method: str
    tasks: int
    runs: int
    statistics: dict[str, Estimate]


@dataclass(frozen=True)
class Pair:
    """A method compared with a reference. `difference` is over runs of the same task, seed and episodes; `better` is the probability
    that a run of the method is better than one of the reference. `task` None: over all tasks that both have.

    With one pair of runs on each task, `difference` is over their `episodes` common episodes, paired, and `better` is None.
    Its interval then excludes the variation between trainings.
    """

    task: str | None
    method: str
    reference: str
    runs: int
    difference: Estimate
    better: Estimate | None
    episodes: int | None = None


@dataclass(frozen=True)
class Section:
    """The statistics of one measure. `scaled` are the normalised values by method and common task; empty if tasks cannot be averaged."""

    measure: Measure
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    common: tuple[str, ...]
    cells: tuple[Cell, ...]
    over: tuple[Over, ...]
    pairs: tuple[Pair, ...]
    scaled: dict[str, list[np.ndarray]]


def sections(runs: Sequence[RunResult], reference: str | None = None) -> list[Section]:
    """Return one section for each measure of the finished runs. `score` is omitted if it equals success.

    `reference`: the method to compare the others with (default: compare every pair). Raises ConfigError if it is unknown.
    """
    methods = sorted({run.method for run in runs})
    if reference is not None and reference not in methods:
        raise ConfigError([f"reference: no method is named {reference!r}. Fix: choose one of: {'; '.join(methods)}"])
    found = []
    for measure in sorted({m for run in runs for m in run.outcomes}, key=lambda m: m.name):
        own = [run for run in runs if measure in run.outcomes]
        if measure.name == "score" and not any(_says_more(run, measure) for run in own):
            continue
        found.append(_section(measure, own, reference))
    return sorted(found, key=lambda section: section.measure.name != "success")


def _says_more(run: RunResult, score: Measure) -> bool:
    success = next((value for m, value in run.outcomes.items() if m.name == "success"), None)
    return success is None or success != run.outcomes[score]


def _section(measure: Measure, runs: Sequence[RunResult], reference: str | None) -> Section:
    tasks, methods = (tuple(sorted({getattr(run, name) for run in runs})) for name in ("task", "method"))
    by_cell = {
        (t, m): sorted((r for r in runs if r.task == t and r.method == m), key=lambda r: r.seed)
        for t in tasks
        for m in methods
    }
    common = tuple(task for task in tasks if all(by_cell[task, method] for method in methods))
    full = measure.full
    scaled = {}
    if full is not None and common:
        scaled = {m: [_values(by_cell[t, m], measure) / full for t in common] for m in methods}
    others = [(b, a) if _refines(b, a) else (a, b) for a, b in combinations(methods, 2)]
    if reference is not None and reference in methods:
        others = [(method, reference) for method in methods if method != reference]
    pairs = [pair for a, b in others for pair in _pairs(measure, tasks, by_cell, a, b)]
    cells = tuple(_cell(measure, t, m, found) for (t, m), found in by_cell.items() if found)
    over = tuple(_over(m, strata) for m, strata in scaled.items())
    return Section(measure, tasks, methods, common, cells, over, tuple(pairs), scaled)


def _refines(method: str, base: str) -> bool:
    """Return whether one method refines the other, whatever their settings: then the difference is refiner − base."""
    policy = method.partition(" on ")[2].partition(" (")[0].partition(",")[0]
    return policy == base.partition(",")[0]


def _values(runs: Sequence[RunResult], measure: Measure) -> np.ndarray:
    return np.array([run.outcomes[measure] for run in runs])


def _cell(measure: Measure, task: str, method: str, runs: Sequence[RunResult]) -> Cell:
    values = _values(runs, measure)
    episodes = [run.episodes[measure] for run in runs if measure in run.episodes]
    pooled = None
    if measure.name == "success" and len(episodes) == len(runs):
        every = np.concatenate(episodes)
        pooled = Estimate(float(every.mean()), *wilson_interval(int(every.sum()), len(every)))
    count = sum(map(len, episodes)) if len(episodes) == len(runs) else None
    return Cell(task, method, len(runs), count, student_interval(values), spread(values), pooled)


def _over(method: str, strata: list[np.ndarray]) -> Over:
    found = {
        name: stratified_interval(strata, statistic, np.random.default_rng(SEED)) for name, statistic in OVER.items()
    }
    return Over(method, len(strata), sum(map(len, strata)), found)


def _pairs(
    measure: Measure,
    tasks: Sequence[str],
    by_cell: dict[tuple[str, str], list[RunResult]],
    method: str,
    reference: str,
) -> list[Pair]:
    """Compare on each task with at least two pairs of runs, and over all tasks with a pair if they have a common scale.

    If no task has more than one pair, compare their common episodes.
    """
    sign = 1.0 if measure.higher_is_better else -1.0
    rows, gaps, ours, theirs = [], [], [], []
    for task in tasks:
        found = _matched(by_cell[task, method], by_cell[task, reference])
        if not found:
            continue
        gaps.append(np.array([a.outcomes[measure] - b.outcomes[measure] for a, b in found]))
        ours.append(sign * _values(by_cell[task, method], measure))
        theirs.append(sign * _values(by_cell[task, reference], measure))
        if len(found) > 1:
            better = improvement_interval(ours[-1:], theirs[-1:], np.random.default_rng(SEED))
            rows.append(Pair(task, method, reference, len(found), student_interval(gaps[-1]), better))
    if not rows and (single := _single_pairs(measure, tasks, by_cell, method, reference)):
        return single
    if len(gaps) > 1 and measure.full is not None:
        generator = np.random.default_rng(SEED)
        difference = stratified_interval(gaps, mean_of_means, generator)
        better = improvement_interval(ours, theirs, generator)
        rows.append(Pair(None, method, reference, sum(map(len, gaps)), difference, better))
    return rows


def _single_pairs(
    measure: Measure, tasks: Sequence[str], by_cell: dict[tuple[str, str], list[RunResult]], method: str, reference: str
) -> list[Pair]:
    """Compare two methods on the tasks with one pair of runs of the same seed, over the episodes that both runs have."""
    gaps, estimates = dict[str, np.ndarray](), dict[str, Estimate]()
    for task in tasks:
        theirs = {(run.seed, run.config.get("eval_seed")): run.by_episode(measure) for run in by_cell[task, reference]}
        ours = {(run.seed, run.config.get("eval_seed")): run.by_episode(measure) for run in by_cell[task, method]}
        pairs = [(episodes, theirs[key]) for key, episodes in ours.items() if key in theirs]
        found = [(a, b, common) for a, b in pairs if len(common := sorted(a.keys() & b.keys())) > 1]
        if len(found) == 1:
            ((a, b, common),) = found
            values = np.array([[run[episode] for episode in common] for run in (a, b)])
            gaps[task] = values[0] - values[1]
            binary = bool(np.isin(values, (0, 1)).all())
            estimates[task] = paired_rates(values[0], values[1]) if binary else student_interval(gaps[task])
    rows = [Pair(task, method, reference, 1, estimates[task], None, len(gap)) for task, gap in gaps.items()]
    if len(gaps) > 1 and measure.full is not None:
        every = stratified_interval(list(gaps.values()), mean_of_means, np.random.default_rng(SEED))
        rows.append(Pair(None, method, reference, len(gaps), every, None, sum(map(len, gaps.values()))))
    return rows


def _matched(ours: Sequence[RunResult], theirs: Sequence[RunResult]) -> list[tuple[RunResult, RunResult]]:
    """Return pairs of runs with the same seed and evaluation episodes. For agents, number and seed of the episodes must be equal."""
    by_seed = {run.seed: run for run in theirs}
    pairs = [(run, by_seed[run.seed]) for run in ours if run.seed in by_seed]

    def episodes(run: RunResult) -> object:
        return run.episode_seeds or (run.config.get("eval_episodes"), run.config.get("eval_seed"))

    return [(a, b) for a, b in pairs if episodes(a) == episodes(b)]
