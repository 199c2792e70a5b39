"""Cells (a problem at a size) and entries (a method to solve it). To add an entry, add one line to a table."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.baselines import mpc_pendulum, theseus_lm, theseus_lm_flattened
from benchmarks.solver_networks import ACTIONS
from benchmarks.solver_pendulum import PendulumProblem, pendulum_problem, quadratic_cost
from benchmarks.solver_problems import (
    ImitationProblem,
    LatentProblem,
    Problem,
    Start,
    imitation_problem,
    latent_problem,
)
from difftori import presets
from difftori.errors import ConfigError
from difftori.planning import Planner
from difftori.solver import (
    ILQR,
    MPPI,
    Adjoint,
    Detached,
    Implicit,
    ProjectedGradient,
    Solver,
    solve,
)
from difftori.types import Points


@dataclass(frozen=True)
class Cell:
    """One problem at one size."""

    problem: str
    horizon: int
    batch: int

    def __str__(self) -> str:
        return f"{self.problem} H={self.horizon} B={self.batch}"


@dataclass(frozen=True)
class Setup:
    """Settings for building every cell: the folder of fitted networks, the start of solves, and the number of fitting steps."""

    cache: Path
    start: Start = "cold"
    fit_steps: int = 500
    seed: int = 0


def build(cell: Cell, dtype: torch.dtype, setup: Setup) -> Problem:
    """The problems of a cell."""
    if cell.problem == "latent":
        return latent_problem(
            cell.horizon,
            cell.batch,
            dtype,
            setup.seed,
            cache=setup.cache,
            start=setup.start,
            fit_steps=setup.fit_steps,
        )
    if cell.problem == "imitation":
        return imitation_problem(cell.batch, dtype, setup.seed, cache=setup.cache, fit_steps=setup.fit_steps)
    if cell.problem == "pendulum":
        return pendulum_problem(cell.batch, dtype, setup.seed, horizon=cell.horizon)
    raise ConfigError([f"problem: {cell.problem!r} is unknown. Fix: use one of latent, imitation, pendulum"])


Solve = Callable[[Problem, torch.Generator], Points]
"""(problem, generator) → solution (B n), differentiable in problem.context and problem.weights() if `Entry.gradient` is set."""


@dataclass(frozen=True)
class Entry:
    """A method to solve a problem. `baseline`: from another library; `compiled`: with torch.compile; `gradient`: it has one.

    `largest`: the largest batch that is measured. Larger ones would take minutes, in proportion to the batch.
    """

    name: str
    solve: Solve
    baseline: bool = False
    compiled: bool = False
    gradient: bool = True
    largest: int = 1_000_000


def _planner(planner: Planner, problem: Problem, generator: torch.Generator, *, compile: bool = False) -> Points:
    return replace(planner, box=problem.box, compile=compile).solve(problem, problem.x0, generator=generator).x


def _ours(
    solver: Solver, adjoint: Adjoint, steps: int, problem: Problem, generator: torch.Generator, *, compile: bool = False
) -> Points:
    return solve(
        problem,
        problem.x0,
        solver=solver,
        adjoint=adjoint,
        box=problem.box,
        max_steps=steps,
        generator=generator,
        compile=compile,
    ).x


def _tdmpc(problem: Problem, generator: torch.Generator) -> Points:
    """MPPI as in TD-MPC: 512 samples and 25 noisy rollouts of the prior, 6 iterations."""
    assert isinstance(problem, LatentProblem)
    with torch.no_grad():
        latent = problem.z0.repeat(25, 1)
        shape = (len(latent), problem.horizon, ACTIONS)
        noise = 0.05 * torch.randn(shape, generator=generator, dtype=latent.dtype)
        candidates = problem.model.rollout(latent, noise).reshape(25, *problem.x0.shape)
    return solve(
        problem,
        problem.x0,
        solver=MPPI(samples=512),
        adjoint=Detached(),
        box=problem.box,
        max_steps=6,
        candidates=candidates,
        generator=generator,
    ).x


def _theseus(problem: Problem, generator: torch.Generator) -> Points:
    """The release's solve for reinforcement learning (100 iterations, step 1e-4, damping 1e-3), with its clamp in the cost."""
    assert isinstance(problem, LatentProblem)
    low, high = float(problem.box.low), float(problem.box.high)
    return theseus_lm(lambda x, z: problem.cost_from(x.clamp(low, high), z), problem.x0, problem.context)


def _theseus_imitation(iterations: int, problem: Problem, generator: torch.Generator) -> Points:
    assert isinstance(problem, ImitationProblem)
    return theseus_lm_flattened(problem.cost_from, problem.x0, problem.context, iterations=iterations)


def _mpc(analytic: bool, problem: Problem, generator: torch.Generator) -> Points:
    assert isinstance(problem, PendulumProblem)
    cost = quadratic_cost(problem.state)
    return mpc_pendulum(problem.state, problem.context, *cost, horizon=problem.horizon, analytic=analytic)


def _reference_il(problem: Problem, generator: torch.Generator, *, compile: bool = False) -> Points:
    return _planner(presets.reference_il(problem.x0.shape[0]), problem, generator, compile=compile)


def _both(name: str, run: Callable[..., Points]) -> tuple[Entry, Entry]:
    return Entry(name, run), Entry(f"{name} compiled", partial(run, compile=True), compiled=True)


_RELEASE = presets.reference_rl("cheetah-run")
_FAST, _ACCURATE = partial(_planner, presets.fast()), partial(_planner, presets.accurate())
_SHORT = replace(presets.reference_il(), max_steps=10)

ENTRIES: dict[str, tuple[Entry, ...]] = {
    # Ratios are relative to the first entry of each problem.
    "latent": (
        Entry("Theseus LM 100", _theseus, baseline=True),
        *_both("closed-form LM 100", partial(_planner, _RELEASE)),
        *_both("fast", _FAST),
        *_both("accurate", _ACCURATE),
        Entry("MPPI 525x6", _tdmpc, gradient=False, largest=32),
    ),
    "imitation": (
        Entry("Theseus LM 100 (one problem)", partial(_theseus_imitation, 100), baseline=True),
        Entry("Theseus LM 10 (one problem)", partial(_theseus_imitation, 10), baseline=True),
        *_both("closed-form LM 100", _reference_il),
        Entry("closed-form LM 10", partial(_planner, _SHORT)),
        *_both("fast", _FAST),
        *_both("accurate", _ACCURATE),
    ),
    "pendulum": (
        Entry("mpc.pytorch", partial(_mpc, False), baseline=True),
        Entry("mpc.pytorch + Jacobian", partial(_mpc, True), baseline=True),
        Entry("ILQR", partial(_ours, ILQR(), Implicit(), 50)),
        Entry("ILQR second order", partial(_ours, ILQR(second_order=True), Implicit(), 50)),
        *_both("spectral 60", partial(_ours, ProjectedGradient(), Implicit(), 60)),
        *_both("accurate", _ACCURATE),
    ),
}


def entries(cell: Cell, *, baselines: bool, compile: bool) -> list[Entry]:
    """The entries of a cell, without the baselines or the compiled ones if these are not requested."""
    return [
        entry
        for entry in ENTRIES[cell.problem]
        if (baselines or not entry.baseline) and (compile or not entry.compiled) and cell.batch <= entry.largest
    ]


def find_entry(problem: str, name: str) -> Entry:
    """Find an entry by its name."""
    found = [candidate for candidate in ENTRIES[problem] if candidate.name == name]
    if not found:
        raise ConfigError(
            [f"entry: {name!r} is unknown. Fix: use one of {', '.join(e.name for e in ENTRIES[problem])}"]
        )
    return found[0]
