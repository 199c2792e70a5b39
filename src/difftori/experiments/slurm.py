"""A sweep on Slurm, a job per run, in arrays, through submitit; needs `difftori[slurm]`.

Jobs do not depend on the process that submitted them: the same command later finds those that wait or run, and submits only what is
missing. A job that is preempted, or out of time, is queued again and resumed from its last checkpoint.
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
from difftori.experiments.sweep import Engine, report_result
from difftori.runs.checkpoint import replace_file
from difftori.runs.signals import StopSignal

_LOGGING = "SUBMITIT_LOG_LEVEL"
_LOOK = 5.0
_ARRAY = 1000
"""Jobs that are submitted at once; Slurm's own limit is 1001 unless a cluster sets another."""
_TIMEOUTS = 100
"""How often a run that is out of time is queued again: it is resumed each time."""
_DEFAULTS = {"timeout_min": 240}
_KNOWN_BY = 600.0
"""Seconds after which Slurm knows every job that it was given: one that it does not know then, it has forgotten."""
_OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "FINISHED", "INTERRUPTED")


@dataclass(frozen=True)
class SlurmRun:
    """What a job carries out; `checkpoint` is what submitit asks for when the job is to be queued again."""

    run: RunSpec
    retries: int

    def __call__(self) -> Failure | None:
        """Run it to its end."""
        return run_one(self.run, retries=self.retries)

    def checkpoint(self) -> Any:
        """The same again: the run's own checkpoints say where it was."""
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
    """The engine. Jobs' scripts and logs go to `folder`; `parameters` are submitit's own, such as `timeout_min`.

    Cores and GPUs are rounded up: Slurm gives none in parts. `cluster="local"` starts the jobs as processes here, to try it.
    MissingExtraError without submitit, ConfigError without Slurm or for a parameter that submitit does not know.
    """
    submitit = _submitit()
    try:
        executor = submitit.AutoExecutor(folder, cluster=cluster, slurm_max_num_timeout=_TIMEOUTS)
        places = {"cpus_per_task": math.ceil(cpus), "gpus_per_node": math.ceil(gpus)}
        executor.update_parameters(**{**_DEFAULTS, **places, **parameters})
    except (RuntimeError, NameError, ValueError, TypeError) as error:
        raise ConfigError(
            [f"--slurm: {error}; is `sbatch` here, and is `slurm` in the file as submitit wants it?"]
        ) from error
    jobs_of = {"slurm": submitit.SlurmJob, "local": submitit.LocalJob}[cluster]

    def engine(
        runs: Sequence[RunSpec], *, say: Callable[[str], None], done: Callable[[RunSpec], None]
    ) -> list[Failure]:
        jobs: dict[Any, RunSpec] = {}
        missing: list[RunSpec] = []
        for run in runs:
            job = _submitted(run, lambda number: jobs_of(folder, number))
            if job is None:
                missing.append(run)
            else:
                say(f"{run.name}: is job {job.job_id}, {job.state}")
                jobs[job] = run
        for begin in range(0, len(missing), _ARRAY):
            part = missing[begin : begin + _ARRAY]
            submitted = _submit(submitit, executor, part, retries, f"{begin} of {len(missing)}")
            for job, run in zip(submitted, part, strict=True):
                _note(run, job.job_id)
                say(f"{run.name}: submitted as job {job.job_id}")
                jobs[job] = run
        failures: list[Failure] = []
        with StopSignal() as stop:
            while jobs and not stop.requested:
                for job in [job for job in jobs if job.done()]:
                    run = jobs.pop(job)
                    failures += report_result(run, _outcome(submitit, job, run), say, done)
                time.sleep(_LOOK if jobs else 0)
            if stop.requested:
                say(f"stopped looking: {len(jobs)} jobs continue; re-run the same command to watch them")
                stop.leave()
        return failures

    return engine


def _submit(submitit: ModuleType, executor: Any, runs: Sequence[RunSpec], retries: int, taken: str) -> list[Any]:
    """Submit the runs as one array of jobs. RunsFailedError if Slurm refuses."""
    try:
        with executor.batch():
            submitted = [executor.submit(SlurmRun(run, retries)) for run in runs]
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise RunsFailedError(
            f"Slurm took {taken} runs and refused the next ({str(error).strip()}). Where that is a limit "
            "on waiting jobs, let these end, or split the sweep's file; re-run the same command to submit what is missing"
        ) from error
    return submitted


def _submitit() -> ModuleType:
    """The package, imported without its own logging, whose set-up closes the handlers that others have."""
    before = os.environ.get(_LOGGING)
    os.environ[_LOGGING] = "NOCONFIG"
    try:
        import submitit
    except ImportError as error:
        raise MissingExtraError("--slurm needs submitit: pip install 'difftori[slurm]'") from error
    finally:
        if before is None:
            del os.environ[_LOGGING]
        else:
            os.environ[_LOGGING] = before
    return submitit


def _submitted(run: RunSpec, find: Callable[[str], Any]) -> Any:
    """The job that carries the run out already, if it is not over."""
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
    """What came of a job; the folder is what counts where the job left no answer."""
    try:
        return job.result()
    except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as error:
        return None if run.finished else Failure(run, -1, f"job {job.job_id}: {str(error).splitlines()[0]}")
