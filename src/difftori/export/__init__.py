"""`difftori export RUN`: a policy or an agent, its solve included, as one file that runs without this package.

The function from observations to actions is traced with symbolic numbers of rows, through the solver and its derivatives: a fixed
number of steps without decisions that depend on values. Random numbers become inputs.
"""

import statistics
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from difftori.errors import ExportError
from difftori.export.files import READERS, WRITERS, Call, Format
from difftori.export.noise import Draw, draws_of, noise, noise_inputs, supplied
from difftori.export.programs import Program, program_of
from difftori.export.tracing import described, trace
from difftori.il.weights import Which
from difftori.loading import in_memory, open_model
from difftori.policies.normalized import NormalizedPolicy
from difftori.published import Published

_CHECKED = (1, 2, 5)
"""Numbers of rows at which the file is compared with the original."""
_TIMED = 30


class Exported(NamedTuple):
    """The file, its size in bytes, the largest difference of its actions, and milliseconds for one row, original and exported."""

    path: Path
    size: int
    difference: float
    original_ms: float
    exported_ms: float


def export(
    run: str | Path | NormalizedPolicy,
    out: str | Path,
    *,
    format: Format = "onnx",
    which: Which | None = None,
    tolerance: float = 1e-5,
    trust_code: Collection[str] = (),
) -> Exported:
    """Write the policy or the agent of a run to `out`, and compare the file with the original.

    `run`, `which`, `trust_code`: as in `difftori.load`. The actions of a base that is code of yours become an input. Rows are free. The file contains a description (JSON): names, shapes and types of inputs and outputs, bounds of the actions,
    and how to use it. `tolerance`: largest difference of an action, as a share of its range; default: 1e-5.

    Raises the errors of `difftori.load`, MissingExtraError without the packages of the format, and ExportError if the
    function decides by values (`planner: reference`), or if the file computes other actions; then there is no file.
    """
    if isinstance(run, NormalizedPolicy):
        model = in_memory(run, which=which, trust_code=trust_code)
    else:
        model = open_model(run, which=which, trust_code=trust_code)
    return export_model(model, Path(out), format=format, tolerance=tolerance)


def export_model(model: Published, out: Path, *, format: Format = "onnx", tolerance: float = 1e-5) -> Exported:
    """Write a policy or an agent, as `export` does that of a run."""
    program = program_of(model)
    draws = draws_of(program)
    names = [*program.inputs, *noise_inputs(draws)]
    if taken := [name for name in program.inputs if name in noise_inputs(draws) or name == "actions"]:
        raise ExportError(
            f"{program.name}: the observation {taken[0]!r} has the name of another input or output of the file. Fix: train with "
            f"another name, such as --obs-keys my_{taken[0]}={taken[0]}"
        )
    traced, outputs, used = trace(program, draws, names)
    about = {**program.about, "inputs": described(program, draws, used), "outputs": outputs, "format": format}
    partial = out.with_name(f".partial-{out.name}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        WRITERS[format](traced, used, outputs, about, partial)
        call = READERS[format](partial, used, outputs)
        difference = max(_difference(program, draws, call, rows) for rows in _CHECKED)
        if not difference <= tolerance:  # also if it is NaN
            raise ExportError(
                f"{program.name}: the exported file computes other actions: difference {difference:.2g} of their range, more than "
                f"{tolerance:g}. Rounding decides where a planner chooses among plans that are nearly equal. Fix: --format pt2, "
                "which rounds as PyTorch does, or a larger tolerance"
            )
        times = _times(program, draws, call)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return Exported(out, out.stat().st_size, difference, *times)


def _difference(program: Program, draws: Sequence[Draw], call: Call, rows: int) -> float:
    """The largest difference of an output, actions as a share of their range; NaN if one is not finite."""
    generator = torch.Generator().manual_seed(rows)
    inputs = {**program.example(rows, generator), **noise(draws, rows, generator)}
    expected, found = supplied(program, draws, inputs), call(inputs)
    span = torch.tensor(program.about["high"]) - torch.tensor(program.about["low"])
    scale = torch.where(span.isfinite() & (span > 0), span, expected["actions"].abs().amax().clamp_min(1.0))
    parts = [(found["actions"] - expected["actions"]) / scale]
    parts += [value - expected[name] for name, value in found.items() if name != "actions"]
    return float(torch.cat([part.abs().flatten() for part in parts]).max())


def _times(program: Program, draws: Sequence[Draw], call: Call) -> tuple[float, float]:
    """Milliseconds for one row, of the function and of the file: medians of interleaved calls."""
    generator = torch.Generator().manual_seed(0)
    inputs = {**program.example(1, generator), **noise(draws, 1, generator)}
    jobs = (lambda: supplied(program, draws, inputs), lambda: call(inputs))
    samples: tuple[list[float], list[float]] = ([], [])
    for _ in range(_TIMED):
        for job, times in zip(jobs, samples, strict=True):
            began = time.perf_counter()
            job()
            times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(samples[0]), statistics.median(samples[1])
