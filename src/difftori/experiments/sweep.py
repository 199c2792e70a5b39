"""Bring a sweep's runs to an end, those first that others refine, by whichever engine."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from difftori.experiments.plan import Planned
from difftori.experiments.pool import Failure, Work, run_all


@runtime_checkable
class Engine(Protocol):
    """Where runs are carried out: returns those that failed, when the others are finished."""

    def __call__(
        self, works: Sequence[Work], *, say: Callable[[str], None], done: Callable[[Work], None]
    ) -> list[Failure]:
        """Run all of `works`, telling `say` what happens and `done` of each that has ended well."""
        ...


def drive(
    runs: Sequence[Planned], engine: Engine, *, say: Callable[[str], None], done: Callable[[Work], None]
) -> list[Failure]:
    """Run what is not finished, and return what failed. What refines a run that failed is not started."""
    failures: list[Failure] = []
    for depth in range(1 + max((run.depth for run in runs), default=-1)):
        wave = [run for run in runs if run.depth == depth and not run.work.finished]
        ready = [run.work for run in wave if run.base is None or run.base.work.finished]
        if ready:
            failures += engine(ready, say=say, done=done)
    return failures


def tell(
    work: Work, failure: Failure | None, say: Callable[[str], None], done: Callable[[Work], None]
) -> list[Failure]:
    """Say what came of a run; the failure, if it is one, to add to others."""
    if failure is None:
        say(f"{work.name}: done")
        done(work)
        return []
    say(f"{work.name}: FAILED with status {failure.status}: {failure.reason}")
    return [failure]


def local(jobs: int, retries: int) -> Engine:
    """Processes of this machine, `jobs` at once."""

    def engine(works: Sequence[Work], *, say: Callable[[str], None], done: Callable[[Work], None]) -> list[Failure]:
        failures, _ = run_all(works, jobs=jobs, seconds=None, say=say, done=done, retries=retries)
        return failures

    return engine
