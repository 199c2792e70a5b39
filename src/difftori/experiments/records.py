"""What runs left: read from their folders, or from the small files that `results/runs` keeps of finished ones.

Folders of runs stay on the machine that made them. A kept file holds a run's configuration, hardware, command, summary and
evaluations, so that a study goes on elsewhere, and can be drawn again from the repository alone.
"""

import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from difftori.errors import DataError
from difftori.experiments.runs import Job, read_kept
from difftori.runs.checkpoint import replace_file
from difftori.runs.records import read_config, read_metrics, read_summary
from difftori.types import Metrics

RETURN = "eval/return"
_SOFTWARE = ("git_commit", "difftori", "torch", "numpy", "python")


@dataclass(frozen=True)
class Record:
    """What a run left, finished or not: returns (k) at environment `steps` (k), the training seconds spent until then (k),
    without evaluation, and the updates made (k). `summary` is None until the run is finished; `rows` (k) are all that was
    logged at each evaluation, `versions` the software that computed it,
    `compiled` whether by torch.compile.
    """

    job: Job
    steps: np.ndarray
    returns: np.ndarray
    seconds: np.ndarray
    updates: np.ndarray
    summary: Metrics | None
    hardware: str
    command: str
    versions: dict[str, str | None]
    compiled: bool
    rows: tuple[dict[str, Any], ...]

    def at(self, steps: int) -> float | None:
        """The return at exactly so many environment steps."""
        found = self.returns[self.steps == steps]
        return float(found[0]) if len(found) else None

    @property
    def area(self) -> float:
        """The mean of all evaluations, which is the area under the curve over its width."""
        return float(self.returns.mean())


def read_record(job: Job) -> Record | None:
    """What the job's run left; None if it has no evaluation yet. DataError if a return is not a number."""
    if job.kept.exists() and not job.ended_here:
        return _record(job, read_kept(job.kept))
    rows = _evaluations(job)
    return _record(job, _plain(job, rows)) if rows else None


def keep(job: Job) -> None:
    """Write the finished run's kept file, unless it is there."""
    if job.ended_here and not job.kept.exists():
        job.kept.parent.mkdir(parents=True, exist_ok=True)
        replace_file(job.kept, (json.dumps(_plain(job, _evaluations(job)), indent=0) + "\n").encode())


def contradictions(job: Job) -> list[str]:
    """What to say if the folder holds another finished run than the kept file."""
    if not (job.ended_here and job.kept.exists()):
        return []
    here = [(row["step"], row[RETURN]) for row in _evaluations(job)]
    there = [(row["step"], row[RETURN]) for row in read_kept(job.kept)["evaluations"]]
    if here == there:
        return []
    return [f"{job.folder} and {job.kept} hold different runs of {job.name}: remove the one that is not to count"]


def _evaluations(job: Job) -> list[dict]:
    return [_short(row) for row in read_metrics(job.folder) if RETURN in row]


def _plain(job: Job, rows: list[dict]) -> dict:
    machine = _versions(job.folder)
    return {
        "config": read_config(job.folder),
        "hardware": _hardware(machine, job.folder),
        "versions": {name: machine.get(name) for name in _SOFTWARE},
        "command": shlex.join(["difftori", *job.words]),
        "summary": _short(read_summary(job.folder)) if job.ended_here else None,
        "evaluations": rows,
    }


def _short(values: dict) -> dict:
    """Numbers to six digits; NaN, which JSON lacks, as null."""
    return {
        name: (float(f"{value:.6g}") if math.isfinite(value) else None) if isinstance(value, float) else value
        for name, value in values.items()
    }


def _record(job: Job, plain: dict) -> Record:
    rows = plain["evaluations"]
    broken = [row["step"] for row in rows if row[RETURN] is None]
    if broken:
        raise DataError(
            f"{job.folder}: the return at step {broken[0]} is not a number; remove the folder and run again"
        )
    summary = plain["summary"]
    return Record(
        job=job,
        steps=np.array([_on_grid(row["step"], job) for row in rows]),
        returns=np.array([row[RETURN] for row in rows], dtype=np.float64),
        seconds=np.array([row["seconds/total"] - row["seconds/evaluation"] for row in rows]),
        updates=np.array([row["updates"] for row in rows]),
        summary=summary and {name: math.nan if value is None else float(value) for name, value in summary.items()},
        hardware=plain["hardware"],
        command=plain["command"],
        versions=plain["versions"],
        compiled=bool(plain["config"].get("compile", False)),
        rows=tuple(rows),
    )


def _on_grid(step: int, job: Job) -> int:
    """The multiple of `eval_every` that the evaluation stands for: it waits for the end of an episode."""
    every, last = job.config.eval_every, job.config.steps
    return last if step >= last else step // every * every


def _versions(folder: Path) -> dict:
    source = folder / "versions.json"
    try:
        found = json.loads(source.read_bytes())
        if not isinstance(found, dict):
            raise TypeError("no mapping")
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{source}: unreadable ({error}); it is written when a run starts") from error
    return found


def _hardware(machine: dict, folder: Path) -> str:
    try:
        device = machine.get("device_name") or machine["cpu"]
        return f"{device}, {machine['threads']} thread(s), {machine['platform']}"
    except KeyError as error:
        raise DataError(f"{folder / 'versions.json'}: lacks {error}; it is written when a run starts") from error
