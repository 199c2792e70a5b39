"""Runs a sweep on Slurm through submitit, one job per run, in arrays. Requires `difftori[slurm]`.

Jobs do not depend on the process that submitted them. Re-running the command finds waiting and running jobs, and submits only
missing ones. A job that is preempted or reaches its time limit is requeued, and resumes from its last checkpoint.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from difftori.errors import ConfigError, MissingExtraError
from difftori.experiments.plan import RunSpec, beside
from difftori.experiments.pool import Failure, RunsFailedError, run_one
from difftori.experiments.sweep import Engine, report_result, split_ready
from difftori.runs.checkpoint import replace_file
from difftori.runs.process import StopSignal

_LOGGING = "SUBMITIT_LOG_LEVEL"
_LOOK = 5.0
_ARRAY = 1000
"""Largest number of jobs in an array. Slurm's default limit is 1001."""
_TIMEOUTS = 100
"""Largest number of times that a job is requeued at its time limit. The run resumes each time."""
_DEFAULTS = {"timeout_min": 240}
_KNOWN_BY = 600.0
"""Seconds after which a submitted job must be listed by Slurm. A job in state UNKNOWN after that no longer exists."""
_OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "FINISHED", "INTERRUPTED")


@dataclass(frozen=True)
class SlurmRun:
    """The callable of a job. submitit calls `checkpoint` when the job is requeued."""

    run: RunSpec
    retries: int

    def __call__(self) -> Failure | None:
        """Run the run to its end."""
        return run_one(self.run, retries=self.retries)

    def checkpoint(self) -> Any:
        """Return the same job for resubmission. The run resumes from its own checkpoints."""
        return _submitit().helpers.DelayedSubmission(self)


def on_slurm(
    folder: Path,
    *,
    cpus: float,
    gpus: float,
    retries: int,
    parameters: Mapping[str, Any],
    cluster: Literal["slurm", "local"] = "slurm",
) -> Engine:
    """Return an engine that submits Slurm jobs. Their scripts and logs are in `folder`; `parameters` are submitit's, such as `timeout_min`.

    Cores and GPUs are rounded up, because Slurm does not assign fractions. `cluster="local"` runs the jobs as local processes,
    for testing. Raises MissingExtraError without submitit, and ConfigError without Slurm or for an unknown parameter.
    """
    submitit = _submitit()
    try:
        executor = submitit.AutoExecutor(folder, cluster=cluster, slurm_max_num_timeout=_TIMEOUTS)
        places = {"cpus_per_task": math.ceil(cpus), "gpus_per_node": math.ceil(gpus)}
        executor.update_parameters(**{**_DEFAULTS, **places, **parameters})
    except (RuntimeError, NameError, ValueError, TypeError) as error:
        raise ConfigError(
            [
                f"--slurm: {error}. Fix: run the command where `sbatch` is available, and check the key `slurm` of the file "
                "against submitit's parameters"
            ]
        ) from error
    jobs_of = {"slurm": submitit.SlurmJob, "local": submitit.LocalJob}[cluster]

    def engine(
        runs: Sequence[RunSpec], *, say: Callable[[str], None], done: Callable[[RunSpec], None]
    ) -> list[Failure]:
        jobs: dict[Any, RunSpec] = {}

        def submit(ready: Sequence[RunSpec]) -> None:
            """Submit the runs that have no job."""
            missing: list[RunSpec] = []
            for run in ready:
                job = _submitted(run, lambda number: jobs_of(folder, number))
                if job is None:
                    missing.append(run)
                else:
                    say(f"{run.name}: already submitted as job {job.job_id}, {job.state}")
                    jobs[job] = run
            for begin in range(0, len(missing), _ARRAY):
                part = missing[begin : begin + _ARRAY]
                submitted = _submit(submitit, executor, part, retries, f"{begin} of {len(missing)}")
                for job, run in zip(submitted, part, strict=True):
                    _note(run, job.job_id)
                    say(f"{run.name}: submitted as job {job.job_id}")
                    jobs[job] = run

        waiting = list(runs)
        failures: list[Failure] = []
        succeeded = set[Path]()
        with StopSignal() as stop:
            while not stop.requested:
                if not jobs:  # refiners wait for all bases, to be one array, whose size Slurm limits
                    ready, waiting = split_ready(waiting, succeeded)
                    submit(ready)
                    if not jobs:
                        break
                for job in [job for job in jobs if job.done()]:
                    run = jobs.pop(job)
                    failures += report_result(run, _outcome(submitit, job, run), say, done, succeeded)
                time.sleep(_LOOK if jobs else 0)
            if stop.requested:
                say(f"stopped waiting: {len(jobs)} jobs continue. Re-run the same command to wait for them")
                stop.leave()
        return failures

    return engine


def _submit(submitit: ModuleType, executor: Any, runs: Sequence[RunSpec], retries: int, taken: str) -> list[Any]:
    """Submit the runs as one array of jobs. Raises RunsFailedError if Slurm rejects them."""
    try:
        with executor.batch():
            submitted = [executor.submit(SlurmRun(run, retries)) for run in runs]
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise RunsFailedError(
            f"Slurm accepted {taken} runs and rejected the next ({str(error).strip()}). "
            "Fix: if this is a limit on the number of jobs, wait until some have ended and re-run the same command, which "
            "submits the missing ones, or split the sweep's file"
        ) from error
    return submitted


def _submitit() -> ModuleType:
    """Import submitit without its logging setup, which closes the handlers of other packages."""
    before = os.environ.get(_LOGGING)
    os.environ[_LOGGING] = "NOCONFIG"
    try:
        import submitit
    except ImportError as error:
        raise MissingExtraError("--slurm: submitit is not installed. Fix: pip install 'difftori[slurm]'") from error
    finally:
        if before is None:
            del os.environ[_LOGGING]
        else:
            os.environ[_LOGGING] = before
    return submitit


def _submitted(run: RunSpec, find: Callable[[str], Any]) -> Any:
    """Return the waiting or running job of a run; None if there is none."""
    note = beside(run.folder, ".job.json")
    try:
        number = json.loads(note.read_bytes())["job"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    job = find(str(number))
    forgotten = str(job.state) == "UNKNOWN" and not run.locked and time.time() - note.stat().st_mtime > _KNOWN_BY
    return None if forgotten or job.done() or str(job.state).split()[0] in _OVER else job


def _note(run: RunSpec, number: str) -> None:
    note = beside(run.folder, ".job.json")
    note.parent.mkdir(parents=True, exist_ok=True)
    replace_file(note, (json.dumps({"job": number}) + "\n").encode())


def _outcome(submitit: ModuleType, job: Any, run: RunSpec) -> Failure | None:
    """Return the result of a job. If the job has no result, the run's folder determines whether it finished."""
    try:
        return job.result()
    except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as error:
        return None if run.finished else Failure(run, -1, f"job {job.job_id}: {str(error).splitlines()[0]}")
