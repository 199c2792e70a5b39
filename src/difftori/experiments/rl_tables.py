"""Numbers of learning curves: by task, next to published ones; over tasks; and paired differences between methods."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from difftori.experiments.rl_study import Curves, at_steps, common_steps, full_return, num_steps, observation
from difftori.experiments.statistics import (
    Estimate,
    interquartile_mean,
    mean_of_means,
    spread,
    stratified_interval,
    student_interval,
)
from difftori.experiments.study import Result
from difftori.experiments.tables import Difference
from difftori.paper.curves import PublishedCurve, printed_points, published_curves

OURS = "these runs"
ALL_TASKS = "all tasks"
BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class SeedResult:
    """One row of `seeds.csv`: a run, finished or not. `steps` are the environment steps done, of `budget`.

    `final` is the return of the last evaluation, `area` the mean of all; `seconds` is the training time without evaluation.
    """

    task: str
    method: str
    seed: int
    label: str
    observation: str
    preset: str
    budget: int
    steps: int
    finished: bool
    final: float
    area: float
    updates: int
    seconds: float
    hardware: str
    command: str


@dataclass(frozen=True)
class Point:
    """One row of `curves.csv`: one evaluation of one run."""

    task: str
    method: str
    seed: int
    steps: int
    mean_return: float
    updates: int
    seconds: float


@dataclass(frozen=True)
class Summary:
    """One row of `summary.csv`: a method on a task after `steps` environment steps, ours or published.

    `mean` has Student's 95 % interval over seeds, `std` is their standard deviation; empty for a single seed.
    For printed numbers, only the mean is known. `measure` is `evaluation` or `training episodes`.
    """

    task: str
    observation: str
    steps: int
    method: str
    origin: str
    measure: str
    seeds: int | None
    mean: Estimate
    std: float | None
    label: str


@dataclass(frozen=True)
class Aggregate:
    """One row of `aggregate.csv`: normalised returns over tasks and seeds, with stratified bootstrap intervals (95 %)."""

    steps: int
    method: str
    origin: str
    tasks: int
    runs: int
    mean: Estimate
    iqm: Estimate
    label: str


def seed_results(curves: Curves) -> list[SeedResult]:
    """Return one row per run."""
    return [
        SeedResult(
            task=result.run.task,
            method=result.run.method.label,
            seed=result.seed,
            label=curves.label,
            observation=observation(curves.options),
            preset=result.run.config.settings.preset,
            budget=result.run.config.steps,
            steps=int(result.steps[-1]),
            finished=result.finished,
            final=float(result.returns[-1]),
            area=result.area,
            updates=int(result.updates[-1]),
            seconds=float(result.seconds[-1]),
            hardware=result.record.hardware,
            command=result.record.command,
        )
        for result in curves.runs
    ]


def points(curves: Curves) -> list[Point]:
    """Return one row per evaluation."""
    return [
        Point(r.run.task, r.run.method.label, r.seed, int(step), float(value), int(updates), float(spent))
        for r in curves.runs
        for step, value, updates, spent in zip(r.steps, r.returns, r.updates, r.seconds, strict=True)
    ]


def summarise(curves: Curves) -> list[Summary]:
    """Summarise each task at the last steps that every method has reached, with published results at the same steps.

    A published curve without a point there adds a row at the largest number of steps that both have.
    """
    rows: list[Summary] = []
    for task in curves.tasks:
        published = [curve for curve in published_curves(observation(curves.options)) if curve.task == task]
        for steps in compared_steps(curves, task, published):
            for method in curves.methods:
                found = curves.of(task, method.label).values()
                values = [value for result in found if (value := result.at(steps)) is not None]
                rows += _summary(curves, task, steps, method.label, OURS, "evaluation", np.array(values))
            for curve in published:
                values = curve.at(steps)
                rows += _summary(curves, task, steps, curve.method, curve.origin, curve.measure, values)
            rows += _printed(curves, task, steps)
    return rows


def compared_steps(curves: Curves, task: str, published: Sequence[PublishedCurve]) -> list[int]:
    """Return the numbers of environment steps at which a task's methods are compared, ascending, without 0."""
    runs = [found.values() for method in curves.methods if (found := curves.of(task, method.label))]
    shared = [set().union(*(result.steps.tolist() for result in results)) for results in runs]
    ours = sorted(set.intersection(*shared) - {0}) if shared else []
    if not ours:
        return []
    wanted = {ours[-1]}
    for curve in published:
        both = [step for step in ours if len(curve.at(step))]
        wanted |= {both[-1]} if both else set()
    return sorted(wanted)


def block(curves: Curves) -> tuple[list[str], dict[str, list[int]]]:
    """Return the methods with finished runs, and by task the seeds that all of them have finished. These are averaged over tasks."""
    have = {(r.run.task, r.run.method.label, r.seed) for r in curves.runs if r.finished}
    labels = [method.label for method in curves.methods if any(method.label == label for _, label, _ in have)]
    seeds = {
        task: sorted({seed for _, _, seed in have if all((task, label, seed) in have for label in labels)})
        for task in curves.tasks
    }
    return labels, {task: found for task, found in seeds.items() if found}


def aggregates(curves: Curves) -> list[Aggregate]:
    """Return the normalised mean and interquartile mean at every evaluation, for our methods and those published on all of these tasks."""
    labels, seeds = block(curves)
    rows: list[Aggregate] = []
    if not seeds:
        return rows
    scale = full_return(curves.options)
    for label in labels:
        by_task = [[curves.of(task, label)[seed] for seed in found] for task, found in seeds.items()]
        steps = common_steps([result for results in by_task for result in results])
        values = [at_steps(results, steps) / scale for results in by_task]
        for index, step in enumerate(steps):
            rows.append(_aggregate(int(step), label, OURS, [part[:, index] for part in values], curves.label))
    by_method: dict[str, list[PublishedCurve]] = {}
    for curve in published_curves(observation(curves.options)):
        if curve.task in seeds:
            by_method.setdefault(curve.method, []).append(curve)
    for method, found in by_method.items():
        if len(found) == len(seeds):
            for step in found[0].steps[found[0].steps <= num_steps(curves.options)]:
                strata = [curve.at(int(step)) / scale for curve in found]
                if all(len(stratum) for stratum in strata):
                    rows.append(_aggregate(int(step), method, found[0].origin, strata, curves.label))
    return rows


def differences(curves: Curves, reference: str) -> list[Difference]:
    """Return the differences of every other method from `reference`, by task and over all tasks, from pairs of finished runs.

    The measures are the returns `final` and `area`. A task has Student's interval over seeds; all tasks together have the mean of
    the tasks' means with its stratified bootstrap interval.
    """
    end = num_steps(curves.options)
    measures: dict[str, Callable[[Result], float]] = {
        "final": lambda result: float(result.returns[-1]),
        "area": lambda result: result.area,
    }
    rows: list[Difference] = []
    for label in [method.label for method in curves.methods if method.label != reference]:
        for measure, take in measures.items():
            strata = []
            for task in curves.tasks:
                if pairs := pairs_at(curves, task, label, reference, end):
                    gaps = np.array([take(a) - take(b) for a, b in pairs])
                    strata.append(gaps)
                    estimate = student_interval(gaps)
                    rows.append(Difference(task, label, reference, measure, len(gaps), estimate, curves.label))
            if len(strata) > 1:
                estimate = stratified_interval(strata, mean_of_means, np.random.default_rng(BOOTSTRAP_SEED))
                count = sum(map(len, strata))
                rows.append(Difference(ALL_TASKS, label, reference, measure, count, estimate, curves.label))
    return rows


def pairs_at(curves: Curves, task: str, label: str, reference: str, steps: int) -> list[tuple[Result, Result]]:
    """Return the pairs of runs of both methods with the same seed that have both reached `steps`."""
    ours, theirs = curves.of(task, label), curves.of(task, reference)
    found = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    return [(a, b) for a, b in found if a.at(steps) is not None and b.at(steps) is not None]


def _summary(
    curves: Curves, task: str, steps: int, method: str, origin: str, measure: str, values: np.ndarray
) -> list[Summary]:
    if not len(values):
        return []
    return [
        Summary(
            task=task,
            observation=observation(curves.options),
            steps=steps,
            method=method,
            origin=origin,
            measure=measure,
            seeds=len(values),
            mean=student_interval(values),
            std=spread(values),
            label=curves.label if origin == OURS else "published",
        )
    ]


def _printed(curves: Curves, task: str, steps: int) -> list[Summary]:
    return [
        Summary(
            task=task,
            observation=point.observation,
            steps=steps,
            method=point.method,
            origin=point.source,
            measure="evaluation",
            seeds=None,
            mean=Estimate(point.mean, -math.inf, math.inf),
            std=None,
            label="published",
        )
        for point in printed_points(observation(curves.options))
        if point.task == task and point.steps == steps
    ]


def _aggregate(step: int, method: str, origin: str, strata: list[np.ndarray], label: str) -> Aggregate:
    mean, iqm = (
        stratified_interval(strata, statistic, np.random.default_rng(BOOTSTRAP_SEED))
        for statistic in (mean_of_means, interquartile_mean)
    )
    return Aggregate(
        steps=step,
        method=method,
        origin=origin,
        tasks=len(strata),
        runs=sum(map(len, strata)),
        mean=mean,
        iqm=iqm,
        label=label if origin == OURS else "published",
    )
