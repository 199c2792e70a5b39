"""Runs a sweep with any engine. Bases are run before their refiners."""

import time
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from difftori.experiments.gpus import GPUs
from difftori.experiments.plan import RunSpec
from difftori.experiments.pool import Failure, run_all


@runtime_checkable
class Engine(Protocol):
    """Executes runs: local processes, Ray or Slurm."""

    def __call__(
        self, runs: Sequence[RunSpec], *, say: Callable[[str], None], done: Callable[[RunSpec], None]
    ) -> list[Failure]:
        """Run all of `runs`, each after its base, and return the failures. The refiners of a run that fails are not started.

        Calls `say` with progress messages, and `done` with each finished run.
        """
        ...


def run_sweep(
    runs: Sequence[RunSpec], engine: Engine, *, say: Callable[[str], None], done: Callable[[RunSpec], None]
) -> list[Failure]:
    """Run all unfinished runs, bases before their refiners, and return the failures.

    The refiners of a failed run are not started.
    """
    missing = sorted((run for run in runs if not run.finished), key=lambda run: run.depth)
    return engine(missing, say=say, done=done) if missing else []


def split_ready(runs: Sequence[RunSpec], succeeded: Container[Path] = ()) -> tuple[list[RunSpec], list[RunSpec]]:
    """Split runs into those whose base is finished, or that have none, and the others.

    `succeeded`: folders of runs that other machines have finished, which this one may not see yet, as on a network file system.
    """
    ready = dict.fromkeys(run for run in runs if run.ready or (run.base and run.base.folder in succeeded))
    return list(ready), [run for run in runs if run not in ready]


def report_result(
    run: RunSpec,
    failure: Failure | None,
    say: Callable[[str], None],
    done: Callable[[RunSpec], None],
    succeeded: set[Path],
) -> list[Failure]:
    """Report the result of a run with `say` and `done`. Returns the failure in a list; if there is none, adds the run to `succeeded`."""
    if failure is None:
        say(f"{run.name}: done")
        succeeded.add(run.folder)
        done(run)
        return []
    say(f"{run.name}: FAILED with status {failure.status}: {failure.reason}")
    return [failure]


def local(jobs: int | None, retries: int = 0, seconds: float | None = None, gpus: float = 0.0) -> Engine:
    """Return an engine that runs `jobs` concurrent processes on this machine, each with `gpus` GPUs or a fraction of one.

    `jobs`: default, as many as there is room for on the GPUs, or 1 without GPUs. After `seconds` from now, no further run is
    started. Raises ConfigError if there are too few GPUs.
    """
    there = GPUs(gpus) if gpus else None
    room = 1 if there is None else there.slots
    at_once = room if jobs is None else jobs if there is None else min(jobs, room)
    until = None if seconds is None else time.monotonic() + seconds

    def engine(
        runs: Sequence[RunSpec], *, say: Callable[[str], None], done: Callable[[RunSpec], None]
    ) -> list[Failure]:
        left = None if until is None else max(0.0, until - time.monotonic())
        failures, _ = run_all(runs, jobs=at_once, seconds=left, say=say, done=done, retries=retries, gpus=there)
        return failures

    return engine
