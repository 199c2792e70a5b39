"""Accuracy of a solution and its gradient, row by row, against a reference that finite differences confirm."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.solver_entries import Cell, Entry, Setup, build
from benchmarks.solver_problems import Problem
from benchmarks.solver_timing import functional
from difftori.solver import Implicit, Newton, ProjectedGradient, solve
from difftori.types import Points, RowFlags, Rows

_DIFFERENCE = 1e-5
_FLOOR = 1e-12


@dataclass(frozen=True)
class Quality:
    """The quality of one entry on one problem, over `rows` rows, solved in float64.

    `start` and `reached`: mean of −cost at x0 and at the solution, projected into the box. `optimum`: the same at the end of
    a converged solve from that solution. `inside`: share of the solution's coordinates inside the box. `compared`: share of
    the rows with a known true gradient. Over these rows: the median `cosine` between the entry's gradient and the true one,
    the share `aligned` with a cosine above .95, and the median of ‖error‖/‖truth‖. A gradient that is zero or not finite
    counts as cosine 0; its error is 1 or infinite.
    """

    cell: Cell
    entry: str
    rows: int
    start: float
    reached: float
    optimum: float
    inside: float
    compared: float = math.nan
    cosine: float = math.nan
    aligned: float = math.nan
    relative_error: float = math.nan


def measure_quality(cell: Cell, entry: Entry, setup: Setup, *, steps: int = 200) -> Quality:
    """Solve the cell's problems with one entry and compare.

    The differentiated function is wᵀx(c): x is the returned solution, c the row's context (z0, or the pendulum's g, m, l),
    and w are fixed random weights. The true gradient is that of the optimum x*(c) at the end of a converged solve from the
    entry's solution, in at most `steps` steps. The comparison therefore measures the entry's derivative, not its choice of
    a local optimum.
    """
    problem = build(cell, torch.float64, setup)
    weights = functional(problem, seed=1)
    context = problem.context.detach().clone().requires_grad_()
    x = entry.solve(problem.at(context), torch.Generator().manual_seed(0))
    solution = problem.box.project(x.detach())
    truth, known, optimum = _truth(problem, solution, weights, steps)
    with torch.no_grad():
        quality = Quality(
            cell=cell,
            entry=entry.name,
            rows=len(solution),
            start=-problem.cost(problem.x0).mean().item(),
            reached=-problem.cost(solution).mean().item(),
            optimum=-problem.cost(optimum).mean().item(),
            inside=problem.box.contains(x.detach(), 1e-6).double().mean().item(),
        )
    if not entry.gradient:
        return quality
    (found,) = torch.autograd.grad((x * weights).sum(), context)
    return _compare(quality, found, truth, known)


def _converged(problem: Problem, context: Tensor, start: Tensor, steps: int) -> Tensor:
    """An optimum near `start`, to rounding if the objective is smooth there, with its implicit gradient.

    The eigenvalue floors are far below the solver's defaults, because a torque has 1e-5 times the curvature of a state.
    """
    return solve(
        problem.at(context),
        start,
        solver=ProjectedGradient(polish=4, polish_with=Newton(eigenvalue_floor=_FLOOR)),
        adjoint=Implicit(eigenvalue_floor=_FLOOR),
        box=problem.box,
        max_steps=steps,
        tolerance=1e-12,
    ).x


def _truth(
    problem: Problem, start: Tensor, weights: Tensor, steps: int, seed: int = 2
) -> tuple[Tensor, RowFlags, Points]:
    """∂wᵀx*/∂c (B C), the rows for which it is known, and x*.

    Computed by the implicit function theorem on the free set, in float64. It counts as known if central differences of the
    converged solve, along a random unit direction of each row's context, agree to 1e-3 of the average size of such a
    directional derivative, and if it is not zero (every bound active). This excludes rows that did not converge, saddles,
    and optima on the ridge where the twin critics are equal, which are common.
    """
    context = problem.context.detach().clone().requires_grad_()
    x = _converged(problem, context, start, steps)
    (truth,) = torch.autograd.grad((x * weights).sum(), context)
    x = x.detach()
    direction = torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed), dtype=truth.dtype)
    direction = direction / direction.norm(dim=-1, keepdim=True)
    with torch.no_grad():
        ends = [
            (_converged(problem, problem.context + sign * _DIFFERENCE * direction, x, steps // 5) * weights)
            for sign in (1.0, -1.0)
        ]
    differences = (ends[0] - ends[1]).sum(-1) / (2 * _DIFFERENCE)
    norm = truth.norm(dim=-1)
    slack = 1e-3 * norm / math.sqrt(truth.shape[-1])
    known = ((truth * direction).sum(-1) - differences).abs() <= slack
    return truth, known & torch.isfinite(norm) & (norm > 1e-9), x


def _compare(quality: Quality, found: Tensor, truth: Tensor, known: RowFlags) -> Quality:
    if not bool(known.any()):
        return replace(quality, compared=0.0)
    found, truth = found[known], truth[known]
    cosine: Rows = torch.nan_to_num(torch.cosine_similarity(found, truth, dim=-1), nan=0.0)
    error = (found - truth).norm(dim=-1) / truth.norm(dim=-1)
    return replace(
        quality,
        compared=known.double().mean().item(),
        cosine=cosine.median().item(),
        aligned=(cosine > 0.95).double().mean().item(),
        relative_error=torch.nan_to_num(error, nan=math.inf).median().item(),
    )
