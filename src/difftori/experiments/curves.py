"""Learning curves of runs: made where they are missing, read from their logs, and brought to common steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from difftori.errors import ConfigError
from difftori.experiments.pool import Failure, Work, run_all, training
from difftori.experiments.records import Record, contradictions, keep, read_record
from difftori.experiments.runs import Arm, StudyConfig, budget_name, partial_reasons, plan_jobs, strange_settings


@dataclass(frozen=True)
class Curves:
    """A study's runs that exist, of those that it wants; `reasons` says why it is less than the full study."""

    config: StudyConfig
    arms: tuple[Arm, ...]
    tasks: tuple[str, ...]
    records: tuple[Record, ...]
    reasons: tuple[str, ...]
    failures: tuple[Failure, ...]

    @property
    def label(self) -> str:
        """`full`, or `partial (…)` with all reasons."""
        return f"partial ({', '.join(self.reasons)})" if self.reasons else "full"

    def of(self, task: str, arm: Arm) -> list[Record]:
        """The runs of an arm on a task, by seed."""
        return [record for record in self.records if record.job.task == task and record.job.arm.label == arm.label]

    def pairs(self, task: str, arm: Arm, reference: Arm, steps: int) -> list[tuple[Record, Record]]:
        """Runs of both arms from the same seed that have both come to `steps`."""
        others = {record.job.seed: record for record in self.of(task, reference)}
        found = [(record, others.get(record.job.seed)) for record in self.of(task, arm)]
        return [(a, b) for a, b in found if b is not None and a.at(steps) is not None and b.at(steps) is not None]


def make_curves(
    config: StudyConfig, arms: Sequence[Arm], *, further: Sequence[str] = (), say: Callable[[str], None]
) -> Curves:
    """Run what is missing, as far as the budget goes, and read what exists.

    `further` are reasons of the study's own that make it partial. A folder whose run has other settings is neither
    touched nor drawn: ConfigError with the differences. ConfigError too if nothing exists at all.
    """
    jobs = plan_jobs(config, arms)
    faults = [fault for job in jobs for fault in (*strange_settings(job), *contradictions(job))]
    if faults:
        more = f" (and {len(faults) - 8} more)" if len(faults) > 8 else ""
        raise ConfigError([*faults[:8], f"runs: {config.runs} holds runs with other settings{more}; choose another"])
    missing = [job for job in jobs if not job.finished]
    say(f"{len(jobs) - len(missing)} of {len(jobs)} runs are finished")
    if not config.quick:
        for job in jobs:
            keep(job)
    works = {training(job.name, job.words, job.folder): job for job in missing}
    seconds = None if config.budget is None else 60 * config.budget

    def done(work: Work) -> None:
        if not config.quick:
            keep(works[work])

    failures, _ = run_all(list(works), jobs=config.jobs, seconds=seconds, say=say, done=done)
    records = tuple(record for job in jobs if (record := read_record(job)) is not None)
    if not records:
        said = [f"{failure.work.name}: {failure.reason} (all of it: {failure.work.log})" for failure in failures]
        raise ConfigError([*said, f"runs: nothing to draw in {config.runs}; give a larger --budget"])
    ended = sum(record.summary is not None for record in records)
    state = [] if ended == len(jobs) else [f"{ended} of {len(jobs)} runs finished"]
    reasons = (*partial_reasons(config), *further, *state)
    tasks = tuple(dict.fromkeys(job.task for job in jobs))
    return Curves(config, tuple(arms), tasks, records, reasons, tuple(failures))


def output_folder(curves: Curves, study: str) -> Path:
    """Where a study's tables and pictures go: `out/study`, or within it a folder of the partial study's budget."""
    folder = curves.config.out / study
    return folder / "partial" / budget_name(curves.config) if curves.reasons else folder


def common_steps(records: Sequence[Record]) -> np.ndarray:
    """The environment steps that all of the runs have come to, ascending."""
    if not records:
        return np.zeros(0, dtype=int)
    common = records[0].steps
    for record in records[1:]:
        common = np.intersect1d(common, record.steps)
    return common


def at_steps(records: Sequence[Record], steps: np.ndarray) -> np.ndarray:
    """Returns (runs k) at `steps` (k), each of which every run has."""
    return np.array([record.returns[np.searchsorted(record.steps, steps)] for record in records])
