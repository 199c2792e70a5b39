"""Bring a sweep's runs to an end, those first that others refine, by whichever engine."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from difftori.experiments.plan import RunSpec
from difftori.experiments.pool import Failure, run_all


@runtime_checkable
class Engine(Protocol):
    """Where runs are carried out: returns those that failed, when the others are finished."""

    def __call__(
        self, runs: Sequence[RunSpec], *, say: Callable[[str], None], done: Callable[[RunSpec], None]
    ) -> list[Failure]:
        """Run all of `runs`, telling `say` what happens and `done` of each that has ended well."""
        ...


def run_sweep(
    runs: Sequence[RunSpec], engine: Engine, *, say: Callable[[str], None], done: Callable[[RunSpec], None]
) -> list[Failure]:
    """Run what is not finished, bases before what refines them, and return what failed.

    What refines a run that failed is not started.
    """
    failures: list[Failure] = []
    for depth in range(1 + max((run.depth for run in runs), default=-1)):
        wave = [run for run in runs if run.depth == depth and not run.finished]
        ready = [run for run in wave if run.base is None or run.base.finished]
        if ready:
            failures += engine(ready, say=say, done=done)
    return failures


def report_result(
    run: RunSpec, failure: Failure | None, say: Callable[[str], None], done: Callable[[RunSpec], None]
) -> list[Failure]:
    """Say what came of a run; the failure, if it is one, to add to others."""
    if failure is None:
        say(f"{run.name}: done")
        done(run)
        return []
    say(f"{run.name}: FAILED with status {failure.status}: {failure.reason}")
    return [failure]


def local(jobs: int, retries: int = 0, seconds: float | None = None) -> Engine:
    """Processes of this machine, `jobs` at once; `seconds` from now on none is started any more."""
    until = None if seconds is None else time.monotonic() + seconds

    def engine(
        runs: Sequence[RunSpec], *, say: Callable[[str], None], done: Callable[[RunSpec], None]
    ) -> list[Failure]:
        left = None if until is None else max(0.0, until - time.monotonic())
        failures, _ = run_all(runs, jobs=jobs, seconds=left, say=say, done=done, retries=retries)
        return failures

    return engine
