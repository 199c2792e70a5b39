"""Trajectory optimisation of known systems: compare ILQR of this library with CasADi (IPOPT, fatrop) and mpc.pytorch.

Problems: the swing-up of a cart-pole, a unicycle that avoids obstacles, and a quadrotor that flies to a point. Three solves
are timed: from the initial guess (cold), the next solve of a closed loop (warm), and a solve with the gradient of its plan
with respect to parameters of the dynamics. CasADi solves rows one after the other and differentiates by central differences.
All entries run interleaved in one process, in rotating order. The results are medians and quartiles in milliseconds, with
the cost of the actions and the largest violation of a constraint, computed by one float64 rollout for all entries.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from benchmarks.baselines import require_mpc
from benchmarks.control_casadi import casadi_version
from benchmarks.control_entries import ENTRIES, Cell, Entry, Gradient, Outcome, Session, entries
from benchmarks.control_problems import PROBLEMS, ControlProblem
from benchmarks.control_report import Line, Sample, summarise, table, write_plots, write_raw
from benchmarks.measuring import Device, as_in_runs, interleaved, milliseconds, progress_bar
from benchmarks.records import RESULTS, write_csv, write_record
from difftori.errors import ConfigError, MissingExtraError


class Config(BaseModel):
    """Entries, problems and settings to measure."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    problems: tuple[Literal["cartpole", "unicycle", "quadrotor"], ...] = ("cartpole", "unicycle", "quadrotor")
    """Problems to solve: `cartpole`, `unicycle`, `quadrotor`."""
    batches: tuple[PositiveInt, ...] = (1, 64)
    """Numbers of rows that are solved together."""
    entries: tuple[str, ...] = ()
    """Names of the entries to measure. Default: all."""
    repeats: PositiveInt = 9
    """Number of interleaved repeats of each cell."""
    seconds: float = 300.0
    """Time limit of a cell in seconds. After it, no further repeat begins, once there are three."""
    warm_steps: PositiveInt = 5
    """Number of closed-loop steps timed in each repeat."""
    loop_steps: PositiveInt = 40
    """Number of steps after which the closed loop restarts."""
    casadi_rows: PositiveInt = 4
    """Number of rows of a batch that CasADi solves. Its times are scaled to the whole batch."""
    max_steps: PositiveInt = 200
    """Largest number of iterations of ILQR and mpc.pytorch."""
    dtype: Literal["float32", "float64"] = "float64"
    """Precision of this library's entries. The others compute in float64."""
    device: Device = "cpu"
    """Device of this library's entries. The others use the CPU."""
    compile: bool = False
    """Also measure compiled entries: torch.compile, and CasADi with the C compiler. Each takes minutes to compile."""
    baselines: bool = True
    """Also measure CasADi and mpc.pytorch (`make baselines` installs them)."""
    threads: PositiveInt = 1
    """Number of threads of torch."""
    seed: int = Field(default=0, ge=0)
    """Seed of the starts and of the noise in the closed loop."""
    out: Path = RESULTS
    """Folder for `control-raw.csv`, `control-summary.csv`, `control.svg` and `control.json`. `--quick` writes to its subfolder `quick`."""
    quick: bool = False
    """Use short horizons and few iterations, to check that everything runs. The numbers are not meaningful."""


def run(config: Config) -> list[dict[str, str]]:
    """Measure, write the files to `out`, and return the table. The files are rewritten after each cell.

    Raises:
        MissingExtraError: CasADi or mpc.pytorch is not installed, and `baselines` is set.
        ConfigError: `entries` has an unknown name.
    """
    if unknown := set(config.entries) - {entry.name for entry in ENTRIES}:
        known = ", ".join(entry.name for entry in ENTRIES)
        raise ConfigError([f"entries: {', '.join(sorted(unknown))} unknown. Fix: choose from {known}"])
    baselines = _baselines() if config.baselines else {}
    with as_in_runs(config.threads):
        return _Run(config, baselines).measure()


def _baselines() -> dict[str, str]:
    try:
        return {"casadi": casadi_version()} | require_mpc()
    except MissingExtraError as missing:
        raise MissingExtraError(f"{missing} Or skip the baselines: difftori bench control --no-baselines.") from missing


def _cells(config: Config) -> list[Cell]:
    return [
        Cell(
            problem=_sized(PROBLEMS[name], config),
            batch=batch,
            dtype={"float32": torch.float32, "float64": torch.float64}[config.dtype],
            device=config.device,
            seed=config.seed,
            casadi_rows=config.casadi_rows,
            max_steps=2 if config.quick else config.max_steps,
        )
        for name in config.problems
        for batch in ((2,) if config.quick else config.batches)
    ]


def _sized(problem: ControlProblem, config: Config) -> ControlProblem:
    return problem.shortened(4) if config.quick else problem


@dataclass
class Loop:
    """The closed loop of one entry: the true system with disturbances, controlled by the first action of each plan.

    Every entry gets the same disturbances. The loop restarts after `length` steps.
    """

    cell: Cell
    session: Session
    first: Outcome
    length: int
    costs: list[float] = field(default_factory=list)
    violations: list[float] = field(default_factory=list)
    iterations: list[int] = field(default_factory=list)
    solved: list[bool] = field(default_factory=list)
    taken: int = 0

    def __post_init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._state, self._last = self.cell.starts[: self.session.rows], self.first
        self._noise = torch.Generator().manual_seed(self.cell.seed)

    def advance(self) -> Callable[[], None]:
        """Take one step of the system. Returns the next solve as a function; only the solve is timed."""
        if self.taken and self.taken % self.length == 0:
            self._restart()
        problem = self.cell.problem
        dynamics = problem.functions(problem.parameters).dynamics
        noise = torch.randn(self._state.shape[-1], generator=self._noise, dtype=torch.float64)
        action = self._last.actions[:, 0].double().cpu()
        self._state = dynamics(self._state, action) + noise * self._state.new_tensor(problem.noise)
        self.taken += 1
        return self._solve

    def _solve(self) -> None:
        self._last = self.session.warm(self._state, self._last)

    def record(self) -> None:
        """Record the result of the last solve."""
        cost, violation, _ = self.cell.problem.rollout(self._state, self._last.actions)
        self.costs += cost.tolist()
        self.violations += violation.tolist()
        self.iterations += self._last.iterations
        self.solved += self._last.solved


@dataclass
class Measured:
    """The measurements of one entry on one cell."""

    entry: Entry
    session: Session
    build_ms: float
    cold: Outcome
    gradient: Gradient
    loop: Loop


class _Run:
    """The measurements of one run so far."""

    def __init__(self, config: Config, baselines: dict[str, str]):
        self.config, self.baselines, self.began = config, baselines, time.perf_counter()
        self.samples: list[Sample] = []
        self.lines: list[Line] = []
        self.gradients: dict[str, list[float]] = {}

    def measure(self) -> list[dict[str, str]]:
        """Measure every cell: a first call of each entry, which is not part of the medians, then interleaved repeats."""
        cells = _cells(self.config)
        with progress_bar(len(cells)) as (show, advance):
            for index, cell in enumerate(cells):
                chosen = entries(
                    cell.problem, baselines=self.config.baselines, compile=self.config.compile, only=self.config.entries
                )
                measured = [self._first(cell, entry, show) for entry in chosen]
                self._repeat(cell, measured, show)
                self.lines += self._summary(cell, measured)
                if self.lines:
                    self._write(last=index == len(cells) - 1)
                advance()
        return table(self.lines)

    def _first(self, cell: Cell, entry: Entry, show: Callable[[str], None]) -> Measured:
        show(f"{cell}: {entry.name}, first call")
        began = time.perf_counter()
        session = entry.open(cell)
        cold = session.cold()
        build_ms = 1e3 * (time.perf_counter() - began)
        gradient = session.gradient()
        self.gradients[f"{cell} {entry.name}"] = gradient.tolist()
        loop_steps = 2 if self.config.quick else self.config.loop_steps
        loop = Loop(cell, session, cold, loop_steps)
        loop.advance()()
        loop.record()
        return Measured(entry, session, build_ms, cold, gradient, loop)

    def _repeat(self, cell: Cell, measured: list[Measured], show: Callable[[str], None]) -> None:
        repeats = min(self.config.repeats, 2) if self.config.quick else self.config.repeats
        for repeat, each in interleaved(measured, repeats, self.config.seconds):
            if repeat < each.entry.repeats:
                show(f"{cell}: {each.entry.name}, {repeat + 1}/{repeats}")
                self.samples += self._sample(cell, each, repeat)

    def _sample(self, cell: Cell, each: Measured, repeat: int) -> Iterator[Sample]:
        scale = cell.batch / each.session.rows

        def sample(part: str, job: Callable[[], object]) -> Sample:
            return Sample(str(cell), each.entry.name, part, repeat, milliseconds(job, cell.device) * scale)

        yield sample("gradient", each.session.gradient)
        yield sample("cold", each.session.cold)
        for _ in range(1 if self.config.quick else self.config.warm_steps):
            yield sample("warm", each.loop.advance())
            each.loop.record()

    def _summary(self, cell: Cell, measured: list[Measured]) -> list[Line]:
        lines: list[Line] = []
        for each in measured:
            cost, violation, _ = cell.problem.rollout(cell.starts[: each.session.rows], each.cold.actions)
            reference = measured[0]
            alike = reference.session.rows == each.session.rows and bool(
                (reference.cold.actions - each.cold.actions.double().cpu()).abs().max() < 1e-2
            )
            samples = [s for s in self.samples if (s.cell, s.entry) == (str(cell), each.entry.name)]
            error = _relative(each.gradient, reference.gradient) if alike and each is not reference else float("nan")
            lines.append(
                Line(
                    problem=cell.problem.name,
                    horizon=cell.problem.horizon,
                    batch=cell.batch,
                    entry=each.entry.name,
                    rows=each.session.rows,
                    first_call_ms=each.build_ms,
                    cost=float(cost.mean()),
                    violation=float(violation.max()),
                    iterations=_mean(each.cold.iterations),
                    solved=_mean(each.cold.solved),
                    warm_cost=_mean(each.loop.costs),
                    warm_violation=max(each.loop.violations),
                    warm_iterations=_mean(each.loop.iterations),
                    warm_solved=_mean(each.loop.solved),
                    gradient_error=error,
                    **summarise(samples, lines[0] if lines else None),
                )
            )
        return lines

    def _write(self, last: bool) -> None:
        out = self.config.out / "quick" if self.config.quick else self.config.out
        write_raw(out / "control-raw.csv", self.samples)
        write_csv(out / "control-summary.csv", [asdict(line) for line in self.lines])
        write_plots(out / "control.svg", self.lines)
        settings = self.config.model_dump(mode="json") | {"finished": last}
        found = {"seconds": round(time.perf_counter() - self.began, 1), "gradients": self.gradients}
        write_record(out / "control.json", found, config=settings, device=self.config.device, baselines=self.baselines)


def _relative(gradient: Gradient, reference: Gradient) -> float:
    return float(np.linalg.norm(gradient - reference) / np.linalg.norm(reference))


def _mean(values: list[int] | list[bool] | list[float]) -> float:
    return statistics.fmean(values) if values else float("nan")
