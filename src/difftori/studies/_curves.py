"""Learning curves of runs: made where they are missing, read from their logs, and brought to common steps."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from difftori.errors import ConfigError, DataError
from difftori.studies._pool import Failure, Work, run_all
from difftori.studies._runs import Arm, Job, StudyConfig, budget_name, partial_reasons, plan_jobs, strange_settings
from difftori.training.records import read_metrics, read_summary
from difftori.types import Metrics

RETURN = "eval/return"


@dataclass(frozen=True)
class Record:
    """What a run left, finished or not: returns (k) at environment `steps` (k), the training seconds spent until then (k),
    without evaluation, and the updates made (k). `summary` is None until the run is finished.
    """

    job: Job
    steps: np.ndarray
    returns: np.ndarray
    seconds: np.ndarray
    updates: np.ndarray
    summary: Metrics | None
    hardware: str

    def at(self, steps: int) -> float | None:
        """The return at exactly so many environment steps."""
        found = self.returns[self.steps == steps]
        return float(found[0]) if len(found) else None

    @property
    def area(self) -> float:
        """The mean of all evaluations, which is the area under the curve over its width."""
        return float(self.returns.mean())


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
    faults = [fault for job in jobs for fault in strange_settings(job)]
    if faults:
        more = f" (and {len(faults) - 8} more)" if len(faults) > 8 else ""
        raise ConfigError([*faults[:8], f"runs: {config.runs} holds runs with other settings{more}; choose another"])
    missing = [job for job in jobs if not job.finished]
    say(f"{len(jobs) - len(missing)} of {len(jobs)} runs are finished")
    works = [Work(job.name, job.words, job.folder.with_name(f"{job.folder.name}.log")) for job in missing]
    seconds = None if config.budget is None else 60 * config.budget
    failures, _ = run_all(works, jobs=config.jobs, seconds=seconds, say=say)
    records = tuple(record for job in jobs if (record := read_record(job)) is not None)
    if not records:
        said = [f"{failure.work.name}: {failure.reason} (all of it: {failure.work.log})" for failure in failures]
        raise ConfigError([*said, f"runs: nothing to draw in {config.runs}; give a larger --budget"])
    ended = sum(record.summary is not None for record in records)
    state = [] if ended == len(jobs) else [f"{ended} of {len(jobs)} runs finished"]
    reasons = (*partial_reasons(config), *further, *state)
    tasks = tuple(dict.fromkeys(job.task for job in jobs))
    return Curves(config, tuple(arms), tasks, records, reasons, tuple(failures))


def read_record(job: Job) -> Record | None:
    """What the job's run left; None if it has no evaluation yet. DataError if a return is not a number."""
    rows = [row for row in read_metrics(job.folder) if RETURN in row]
    if not rows:
        return None
    broken = [row["step"] for row in rows if row[RETURN] is None]
    if broken:
        raise DataError(
            f"{job.folder}: the return at step {broken[0]} is not a number; remove the folder and run again"
        )
    total = np.array([row["seconds/total"] - row["seconds/evaluation"] for row in rows])
    return Record(
        job=job,
        steps=np.array([_on_grid(row["step"], job) for row in rows]),
        returns=np.array([row[RETURN] for row in rows], dtype=np.float64),
        seconds=total,
        updates=np.array([row["updates"] for row in rows]),
        summary=read_summary(job.folder) if job.finished else None,
        hardware=_hardware(job.folder),
    )


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


def _on_grid(step: int, job: Job) -> int:
    """The multiple of `eval_every` that the evaluation stands for: it waits for the end of an episode."""
    every, last = job.config.eval_every, job.config.steps
    return last if step >= last else step // every * every


def _hardware(folder: Path) -> str:
    source = folder / "versions.json"
    try:
        versions = json.loads(source.read_bytes())
        device = versions.get("device_name") or versions["cpu"]
        return f"{device}, {versions['threads']} thread(s), {versions['platform']}"
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{source}: unreadable ({error}); it is written when a run starts") from error
