"""Runs a sweep on a Ray cluster, which assigns runs to the cores and GPUs of its machines. Requires `difftori[ray]`.

All machines must see the runs' folder under the same path, and have difftori installed. A run is a process started by a Ray
worker. If the worker or its machine crashes, Ray restarts the run on another one, which resumes from the last checkpoint.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from difftori.errors import ConfigError, MissingExtraError
from difftori.experiments.plan import RunSpec
from difftori.experiments.pool import Failure, run_one
from difftori.experiments.sweep import Engine, report_result, split_ready
from difftori.runs.process import StopSignal

_LOOK = 1.0
_TO_SAVE = 60.0


def on_ray(address: str, *, cpus: float, gpus: float, retries: int) -> Engine:
    """Return an engine that runs on Ray. `address`: a running cluster (`auto` finds this machine's), or `local` to start one here.

    A run uses `cpus` cores and `gpus` GPUs, or a fraction of one. `retries`: number of restarts of a run whose worker
    crashed, and of a run that crashed itself. Raises MissingExtraError without Ray, and ConfigError if there is no cluster at
    the address.
    """
    if gpus > 1 and gpus != round(gpus):
        raise ConfigError([f"gpus: {gpus:g} for each run. Fix: give a fraction, such as 0.25, or a whole number"])
    ray = _ray()
    try:
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, logging_level="warning")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            [f"--ray {address}: no cluster found ({error}). Fix: start one, or give --ray local"]
        ) from error
    here = Path.cwd()

    @ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=retries)
    def carry_out(run: RunSpec) -> Failure | None:
        os.chdir(here)
        return run_one(run, retries=retries)

    def engine(
        runs: Sequence[RunSpec], *, say: Callable[[str], None], done: Callable[[RunSpec], None]
    ) -> list[Failure]:
        if (missing := _missing_machine(ray.nodes(), cpus, gpus)) is not None:
            if address == "local":
                raise ConfigError([missing])
            say(missing)
        tasks: dict[object, RunSpec] = {}
        waiting = list(runs)
        failures: list[Failure] = []
        succeeded = set[Path]()
        with StopSignal() as stop:
            while not stop.requested:
                ready, waiting = split_ready(waiting, succeeded)
                if ready:
                    tasks |= {carry_out.remote(run): run for run in ready}
                    say(f"{len(ready)} runs submitted to Ray, {cpus:g} cores and {gpus:g} GPUs each")
                if not tasks:
                    break
                ended, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=_LOOK)
                for task in ended:
                    run = tasks.pop(task)
                    failures += report_result(run, _outcome(ray, task, run), say, done, succeeded)
            if stop.requested:
                for task in tasks:
                    ray.cancel(task, force=False)
                _wait_until_saved(list(tasks.values()))
                say(f"stopped: {len(tasks)} not finished. Re-run the same command to resume")
                stop.leave()
        return failures

    return engine


def _ray() -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("--ray: Ray is not installed. Fix: pip install 'difftori[ray]'") from error
    return ray


def _missing_machine(nodes: Sequence[Mapping[str, Any]], cpus: float, gpus: float) -> str | None:
    """Return a message if no machine of the cluster is large enough for a run."""
    machines = [node["Resources"] for node in nodes if node["Alive"]]
    if any(there.get("CPU", 0) >= cpus and there.get("GPU", 0) >= gpus for there in machines):
        return None
    sizes = ", ".join(f"{there.get('CPU', 0):g} cores and {there.get('GPU', 0):g} GPUs" for there in machines[:4])
    return (
        f"cpus, gpus: a run has {cpus:g} cores and {gpus:g} GPUs, and no machine of the Ray cluster has as many ({sizes}). "
        "Fix: give fewer, or add a machine; until then, runs wait"
    )


def _outcome(ray: ModuleType, task: object, run: RunSpec) -> Failure | None:
    """Return the result of a task. A task that Ray gave up is a failure."""
    try:
        return ray.get(task)
    except ray.exceptions.RayError as error:
        return Failure(run, -1, f"Ray gave up: {str(error).splitlines()[0]}")


def _wait_until_saved(runs: Sequence[RunSpec]) -> None:
    """Wait until no process works in the folders, at most one minute."""
    until = time.monotonic() + _TO_SAVE
    while time.monotonic() < until and any(run.locked for run in runs):
        time.sleep(_LOOK)
