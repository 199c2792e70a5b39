"""A sweep on a Ray cluster, which places runs on its machines' processors and GPUs; needs `difftori[ray]`.

All machines see the runs' folder under the same path, and have difftori installed. A run is a process that a Ray worker
watches: when the worker or its machine dies, Ray hands the run to another, which resumes it from its last checkpoint.
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from difftori.errors import ConfigError, MissingExtraError
from difftori.experiments.plan import RunSpec
from difftori.experiments.pool import Failure, run_one
from difftori.experiments.sweep import Engine, report_result
from difftori.runs.signals import StopSignal

_LOOK = 1.0
_TO_SAVE = 60.0


def on_ray(address: str, *, cpus: float, gpus: float, retries: int) -> Engine:
    """The engine. `address`: of a running cluster (`auto` finds this machine's), or `local` to start one here.

    A run takes `cpus` cores and `gpus` GPUs, or a fraction of one. `retries`: how often Ray starts a run again whose worker
    died, and its watcher a run that died itself. MissingExtraError without Ray, ConfigError if no cluster answers.
    """
    ray = _ray()
    try:
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, logging_level="warning")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError([f"--ray {address}: no cluster answers ({error}); start one, or give --ray local"]) from error
    here = Path.cwd()

    @ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=retries)
    def carry_out(run: RunSpec) -> Failure | None:
        os.chdir(here)
        return run_one(run, retries=retries)

    def engine(
        runs: Sequence[RunSpec], *, say: Callable[[str], None], done: Callable[[RunSpec], None]
    ) -> list[Failure]:
        tasks = {carry_out.remote(run): run for run in runs}
        say(f"{len(tasks)} runs handed to Ray, {cpus:g} cores and {gpus:g} GPUs each")
        failures: list[Failure] = []
        with StopSignal() as stop:
            while tasks and not stop.requested:
                ended, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=_LOOK)
                for task in ended:
                    run = tasks.pop(task)
                    failures += report_result(run, _outcome(ray, task, run), say, done)
            if stop.requested:
                for task in tasks:
                    ray.cancel(task, force=False)
                _wait_until_saved(list(tasks.values()))
                say(f"stopped: {len(tasks)} not finished; re-run the same command to resume")
                stop.leave()
        return failures

    return engine


def _ray() -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("--ray needs Ray: pip install 'difftori[ray]'") from error
    return ray


def _outcome(ray: ModuleType, task: object, run: RunSpec) -> Failure | None:
    """What came of a task; one that Ray gave up on is a failure too."""
    try:
        return ray.get(task)
    except ray.exceptions.RayError as error:
        return Failure(run, -1, f"Ray gave up: {str(error).splitlines()[0]}")


def _wait_until_saved(runs: Sequence[RunSpec]) -> None:
    """Wait, a minute at most, until no process works in the folders any more."""
    until = time.monotonic() + _TO_SAVE
    while time.monotonic() < until and any(run.locked for run in runs):
        time.sleep(_LOOK)
