"""Time and memory. Entries are timed interleaved: each repeat runs every entry once, in rotating order."""

import ctypes
import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measuring import interleaved
from benchmarks.solver_entries import Cell, Entry, Setup, build, find_entry
from benchmarks.solver_problems import Problem
from difftori.errors import DifftoriError

_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Sample:
    """One run of one entry: milliseconds forward and backward (NaN if it has no gradient).

    `repeat` −1 is the first call, which may compile or load; it is not part of a median.
    """

    cell: Cell
    entry: str
    repeat: int
    forward_ms: float
    backward_ms: float


def functional(problem: Problem, seed: int = 0) -> Tensor:
    """The weights w (B n) of the linear functional wᵀx whose gradient is measured: standard normal, fixed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(problem.x0.shape, generator=generator, dtype=torch.float64).to(problem.x0.dtype)


def time_once(entry: Entry, problem: Problem, weights: Tensor, cell: Cell, repeat: int) -> Sample:
    """Solve, and differentiate wᵀx with respect to the context and every parameter of the networks."""
    context = problem.context.detach().clone().requires_grad_()
    parameters = problem.weights()
    generator = torch.Generator().manual_seed(0)
    began = time.perf_counter()
    x = entry.solve(problem.at(context), generator)
    solved = time.perf_counter()
    if entry.gradient:
        (x * weights).sum().backward()
    ended = time.perf_counter()
    for parameter in parameters:
        parameter.grad = None
    backward = 1e3 * (ended - solved) if entry.gradient else math.nan
    return Sample(cell, entry.name, repeat, 1e3 * (solved - began), backward)


def time_cell(
    cell: Cell,
    entries: list[Entry],
    setup: Setup,
    *,
    repeats: int,
    seconds: float,
    show: Callable[[str], None],
) -> list[Sample]:
    """Run every entry `repeats` times, interleaved; fewer times (at least 3) if the budget of seconds is used up.

    In float32. Parameters require gradients, as they do in training. `show` is called with the name of each run.
    """
    problem = build(cell, torch.float32, setup)
    for parameter in problem.weights():
        parameter.requires_grad_(True)
    weights = functional(problem)
    samples = []
    for entry in entries:
        show(f"{cell}: {entry.name}, first call")
        samples.append(time_once(entry, problem, weights, cell, -1))
    for repeat, entry in interleaved(entries, repeats, seconds):
        show(f"{cell}: {entry.name}, {repeat + 1}/{repeats}")
        gc.collect()
        samples.append(time_once(entry, problem, weights, cell, repeat))
    return samples


def peak_megabytes(cell: Cell, entry: Entry, setup: Setup) -> float:
    """Growth of the resident memory over one solve and backward, in a new process.

    The process runs the same entry once before, so that imports, compilation and caches are not counted, then returns free
    heap to the system. NaN if the system does not report it (it is read from Linux's /proc).
    """
    request = {
        "cell": [cell.problem, cell.horizon, cell.batch],
        "entry": entry.name,
        "setup": [str(setup.cache.resolve()), setup.start, setup.fit_steps, setup.seed],
        "threads": torch.get_num_threads(),
    }
    # A fixed threshold: large tensors are always returned to the system when freed, so that peaks are comparable.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "benchmarks.solver_timing", json.dumps(request)]
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DifftoriError(f"memory of {entry.name} on {cell}: the process failed: {done.stderr[-2000:]}")
    return float(done.stdout.strip().splitlines()[-1])


def _own_peak(request: dict) -> float:
    torch.set_num_threads(request["threads"])
    cell = Cell(*request["cell"])
    cache, *rest = request["setup"]
    setup = Setup(Path(cache), *rest)
    problem = build(cell, torch.float32, setup)
    for parameter in problem.weights():
        parameter.requires_grad_(True)
    entry, weights = find_entry(cell.problem, request["entry"]), functional(problem)
    time_once(entry, problem, weights, cell, -1)
    gc.collect()
    if sys.platform != "linux":
        return math.nan
    ctypes.CDLL(None).malloc_trim(0)
    before = _status_megabytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    time_once(entry, problem, weights, cell, 0)
    return _status_megabytes("VmHWM") - before


def _status_megabytes(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return float(line.split()[1]) / 1024
    return math.nan


if __name__ == "__main__":
    print(_own_peak(json.loads(sys.argv[1])))
