"""Numbers of learning curves: per task beside published ones, over tasks, and arms against each other by pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from difftori.experiments.curves import Curves, Record, at_steps, common_steps
from difftori.experiments.runs import Arm, full_return, num_steps, observation
from difftori.experiments.statistics import (
    Estimate,
    interquartile_mean,
    mean_of_means,
    spread,
    stratified_interval,
    student_interval,
)
from difftori.paper.curves import PublishedCurve, printed_points, published_curves

OURS = "these runs"
ALL_TASKS = "all tasks"
BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class SeedResult:
    """One line of `seeds.csv`: a run, finished or not. `steps` is what it came to, `budget` what it was to come to.

    `final` is the last evaluation's return, `area` the mean of all; `seconds` is training without evaluation.
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
    """One line of `curves.csv`: one evaluation of one run."""

    task: str
    method: str
    seed: int
    steps: int
    mean_return: float
    updates: int
    seconds: float


@dataclass(frozen=True)
class Summary:
    """One line of `summary.csv`: a method on a task after `steps` environment steps, ours or published.

    `low` and `high` are Student's 95 % interval over seeds, `std` their standard deviation; empty for a single seed. Of
    printed numbers only the mean is known. `measure` is `evaluation` or `training episodes`.
    """

    task: str
    observation: str
    steps: int
    method: str
    origin: str
    measure: str
    seeds: int | None
    mean: float
    low: float | None
    high: float | None
    std: float | None
    label: str


@dataclass(frozen=True)
class Aggregate:
    """One line of `aggregate.csv`: normalised returns over tasks and seeds, with stratified bootstrap intervals (95 %)."""

    steps: int
    method: str
    origin: str
    tasks: int
    runs: int
    mean: float
    mean_low: float | None
    mean_high: float | None
    iqm: float
    iqm_low: float | None
    iqm_high: float | None
    label: str


@dataclass(frozen=True)
class Difference:
    """One line of `differences.csv`: method − reference over pairs of runs with the same task and seed, in returns.

    `measure`: `final` or `area`. Per task Student's interval over seeds; over all tasks the mean of the tasks' means with
    its stratified bootstrap interval.
    """

    task: str
    method: str
    reference: str
    measure: str
    pairs: int
    value: float
    low: float | None
    high: float | None
    label: str


def seed_results(curves: Curves) -> list[SeedResult]:
    """One line per run."""
    return [
        SeedResult(
            task=record.job.task,
            method=record.job.arm.label,
            seed=record.job.seed,
            label=curves.label,
            observation=observation(curves.config),
            preset=record.job.config.settings.preset,
            budget=record.job.config.steps,
            steps=int(record.steps[-1]),
            finished=record.summary is not None,
            final=float(record.returns[-1]),
            area=record.area,
            updates=int(record.updates[-1]),
            seconds=float(record.seconds[-1]),
            hardware=record.hardware,
            command=record.command,
        )
        for record in curves.records
    ]


def points(curves: Curves) -> list[Point]:
    """One line per evaluation."""
    return [
        Point(
            record.job.task, record.job.arm.label, record.job.seed, int(step), float(value), int(updates), float(spent)
        )
        for record in curves.records
        for step, value, updates, spent in zip(
            record.steps, record.returns, record.updates, record.seconds, strict=True
        )
    ]


def summarise(curves: Curves) -> list[Summary]:
    """Per task: ours at the last steps that every method has a run of, and published ones at the same steps.

    A published curve without a point there is compared at the largest number of steps that both have, and so are ours.
    """
    rows: list[Summary] = []
    for task in curves.tasks:
        published = [curve for curve in published_curves(observation(curves.config)) if curve.task == task]
        for steps in compared_steps(curves, task, published):
            for arm in curves.arms:
                values = [value for record in curves.of(task, arm) if (value := record.at(steps)) is not None]
                rows += _summary(curves, task, steps, arm.label, OURS, "evaluation", np.array(values))
            for curve in published:
                values = curve.at(steps)
                rows += _summary(curves, task, steps, curve.method, curve.origin, curve.measure, values)
            rows += _printed(curves, task, steps)
    return rows


def compared_steps(curves: Curves, task: str, published: Sequence[PublishedCurve]) -> list[int]:
    """The numbers of environment steps that a task's methods are compared at, ascending; never 0."""
    runs = [records for arm in curves.arms if (records := curves.of(task, arm))]
    shared = [set().union(*(record.steps.tolist() for record in records)) for records in runs]
    ours = sorted(set.intersection(*shared) - {0}) if shared else []
    if not ours:
        return []
    wanted = {ours[-1]}
    for curve in published:
        both = [step for step in ours if len(curve.at(step))]
        wanted |= {both[-1]} if both else set()
    return sorted(wanted)


def block(curves: Curves) -> tuple[list[Arm], dict[str, list[int]]]:
    """The arms with finished runs, and by task the seeds that all of these arms have finished: what is averaged over tasks."""
    finished = [record for record in curves.records if record.summary is not None]
    have = {(record.job.task, record.job.arm.label, record.job.seed) for record in finished}
    arms = [arm for arm in curves.arms if any(label == arm.label for _, label, _ in have)]
    seeds = {
        task: sorted(
            {seed for _, _, seed in have if all((task, arm.label, seed) in have for arm in arms)},
        )
        for task in curves.tasks
    }
    return arms, {task: found for task, found in seeds.items() if found}


def aggregates(curves: Curves) -> list[Aggregate]:
    """Normalised mean and interquartile mean at every evaluation, of ours and of methods published on all of these tasks."""
    arms, seeds = block(curves)
    rows: list[Aggregate] = []
    if not seeds:
        return rows
    scale = full_return(curves.config)
    for arm in arms:
        by_task = [[r for r in curves.of(task, arm) if r.job.seed in found] for task, found in seeds.items()]
        steps = common_steps([record for records in by_task for record in records])
        values = [at_steps(records, steps) / scale for records in by_task]
        for index, step in enumerate(steps):
            rows.append(_aggregate(int(step), arm.label, OURS, [part[:, index] for part in values], curves.label))
    by_method: dict[str, list[PublishedCurve]] = {}
    for curve in published_curves(observation(curves.config)):
        if curve.task in seeds:
            by_method.setdefault(curve.method, []).append(curve)
    for method, found in by_method.items():
        if len(found) == len(seeds):
            for step in found[0].steps[found[0].steps <= num_steps(curves.config)]:
                strata = [curve.at(int(step)) / scale for curve in found]
                if all(len(stratum) for stratum in strata):
                    rows.append(_aggregate(int(step), method, found[0].origin, strata, curves.label))
    return rows


def differences(curves: Curves, reference: Arm) -> list[Difference]:
    """Every other arm − `reference`, per task and over all tasks, from pairs that have both come to the end."""
    end = num_steps(curves.config)
    measures: dict[str, Callable[[Record], float]] = {
        "final": lambda record: float(record.returns[-1]),
        "area": lambda record: record.area,
    }
    rows: list[Difference] = []
    for arm in curves.arms:
        if arm.label == reference.label:
            continue
        for measure, take in measures.items():
            strata = []
            for task in curves.tasks:
                pairs = curves.pairs(task, arm, reference, end)
                if pairs:
                    strata.append(np.array([take(a) - take(b) for a, b in pairs]))
                    estimate = student_interval(strata[-1])
                    rows.append(_difference(curves, task, arm, reference, measure, len(pairs), estimate))
            if len(strata) > 1:
                generator = np.random.default_rng(BOOTSTRAP_SEED)
                estimate = stratified_interval(strata, mean_of_means, generator)
                count = sum(map(len, strata))
                rows.append(_difference(curves, ALL_TASKS, arm, reference, measure, count, estimate))
    return rows


def finite(value: float) -> float | None:
    """The value, or None for an end of an interval that is infinite because one value has no spread."""
    return float(value) if np.isfinite(value) else None


def _summary(
    curves: Curves, task: str, steps: int, method: str, origin: str, measure: str, values: np.ndarray
) -> list[Summary]:
    if not len(values):
        return []
    mean = student_interval(values)
    return [
        Summary(
            task=task,
            observation=observation(curves.config),
            steps=steps,
            method=method,
            origin=origin,
            measure=measure,
            seeds=len(values),
            mean=mean.value,
            low=finite(mean.low),
            high=finite(mean.high),
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
            mean=point.mean,
            low=None,
            high=None,
            std=None,
            label="published",
        )
        for point in printed_points(observation(curves.config))
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
        mean=mean.value,
        mean_low=finite(mean.low),
        mean_high=finite(mean.high),
        iqm=iqm.value,
        iqm_low=finite(iqm.low),
        iqm_high=finite(iqm.high),
        label=label if origin == OURS else "published",
    )


def _difference(
    curves: Curves, task: str, arm: Arm, reference: Arm, measure: str, pairs: int, estimate: Estimate
) -> Difference:
    return Difference(
        task=task,
        method=arm.label,
        reference=reference.label,
        measure=measure,
        pairs=pairs,
        value=estimate.value,
        low=finite(estimate.low),
        high=finite(estimate.high),
        label=curves.label,
    )
