"""A sweep on a Ray cluster, which places runs on its machines' processors and GPUs; needs `difftori[ray]`.

All machines see the runs' folder under the same path, and have difftori installed. A run is a process that a Ray worker
watches: when the worker or its machine dies, Ray hands the run to another, and it goes on from its last checkpoint.
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from difftori.errors import ConfigError, MissingExtraError
from difftori.experiments.pool import Failure, Work, run_one
from difftori.experiments.sweep import Engine, tell
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
    def carry_out(work: Work) -> Failure | None:
        os.chdir(here)
        return run_one(work, retries=retries)

    def engine(works: Sequence[Work], *, say: Callable[[str], None], done: Callable[[Work], None]) -> list[Failure]:
        tasks = {carry_out.remote(work): work for work in works}
        say(f"{len(tasks)} runs handed to Ray, {cpus:g} cores and {gpus:g} GPUs each")
        failures: list[Failure] = []
        with StopSignal() as stop:
            while tasks and not stop.requested:
                ended, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=_LOOK)
                for task in ended:
                    work = tasks.pop(task)
                    failures += tell(work, _outcome(ray, task, work), say, done)
            if stop.requested:
                for task in tasks:
                    ray.cancel(task, force=False)
                _wait_until_saved(list(tasks.values()))
                say(f"stopped: {len(tasks)} not finished; the same command goes on")
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


def _outcome(ray: ModuleType, task: object, work: Work) -> Failure | None:
    """What came of a task; one that Ray gave up on is a failure too."""
    try:
        return ray.get(task)
    except ray.exceptions.RayError as error:
        return Failure(work, -1, f"Ray gave up: {str(error).splitlines()[0]}")


def _wait_until_saved(works: Sequence[Work]) -> None:
    """Wait, a minute at most, until nobody works in the folders any more."""
    until = time.monotonic() + _TO_SAVE
    while time.monotonic() < until and any(work.elsewhere for work in works):
        time.sleep(_LOOK)
