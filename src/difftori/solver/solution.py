"""The result of `solve`."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from difftori.solver.adjoint import Differentiated, Implicit
from difftori.solver.constraints import Multipliers
from difftori.solver.inference import without_inference_tensors
from difftori.solver.interface import Problem, State
from difftori.solver.lengths import Lengths
from difftori.types import Points, RowCounts, RowFlags, Rows


class Status(IntEnum):
    """The status of a row at the end of a solve."""

    CONVERGED = 0
    """The estimated distance to the optimum is within the tolerance."""
    MAX_STEPS = 1
    """The step limit was reached, rounding allows no further step, or the Hessian shows that the optimum is far from an x whose
    gradient is small. Common and harmless for short solves."""
    NON_FINITE = 2
    """NaN or Inf in the cost or its gradient. x is the last finite iterate or the start, not a solution."""
    NOT_A_MINIMUM = 3
    """The Hessian on the free set has negative curvature. Reported only if `Implicit` computed the Hessian."""
    ILL_CONDITIONED = 4
    """The Hessian on the free set is singular to working precision: x may be a minimum, but its gradient is undetermined.
    Reported only if `Implicit` computed the Hessian. Fix: solve in float64, rescale the variables, add a small quadratic
    term to the cost, or use `ILQR` for trajectories."""
    INFEASIBLE = 5
    """A constraint is violated by more than the tolerance after the last round: x is the best compromise found. Either the
    constraints contradict each other, or the search is stuck at a point from which no small step helps. Fix: check
    `Solution.violation`, start elsewhere, or allow more rounds."""


def status_with_hessian(status: RowCounts, differentiated: Differentiated, lengths: Lengths, x: Points) -> RowCounts:
    """The status (B) of x, corrected by the Hessian if the adjoint computed it.

    A row has not converged if a Newton step would still move a variable by 2 % of its length: the gradient is small there only
    because the curvatures are far apart.
    """
    convex, singular, step = differentiated.convex, differentiated.singular, differentiated.newton_step
    if convex is None or singular is None or step is None:
        return status
    near = (step.abs() <= _FAR * lengths.of(x)).all(-1)
    status = torch.where((status == Status.CONVERGED) & ~near, int(Status.MAX_STEPS), status)
    status = torch.where(convex, status, int(Status.NOT_A_MINIMUM))
    return torch.where(singular, int(Status.ILL_CONDITIONED), status)


_FAR = 2e-2
"""A Newton step of more than this share of a variable's length scale means that the optimum is far."""


class History(NamedTuple):
    """Every iterate (k B n) and its cost (k B), starting with x0."""

    x: Tensor
    cost: Tensor


@dataclass(frozen=True)
class Solution:
    """The result of a solve, row by row.

    `x` (B n) is differentiable as its adjoint defines; all other tensors are detached. `cost` (B) at x; `steps` (B) until the
    row converged or the step limit was reached; `status` (B), values of `Status`. `state` is the internal state of the solver.
    `multipliers`: those of the constraints, to start a similar problem.
    """

    x: Points
    cost: Rows
    steps: RowCounts
    status: RowCounts
    history: History | None
    state: State
    problem: Problem
    differentiated: Differentiated
    stationarity: Rows | None
    multipliers: Multipliers | None = None
    violated: Rows | None = None

    @property
    def violation(self) -> Rows:
        """The largest violation of a constraint, in the units of the constraints, (B). Zero without constraints."""
        return torch.zeros_like(self.cost) if self.violated is None else self.violated

    @cached_property
    def grad_norm(self) -> Rows:
        """The largest gradient coordinate without an active bound, (B): zero at a first-order point.

        Solvers without gradients (CEM, MPPI) compute it at the first access.
        """
        if self.stationarity is not None:
            return self.stationarity
        _, grad = without_inference_tensors(lambda: self.problem.evaluate(self.x.detach()))
        return self.problem.box.stationarity(self.x.detach(), grad)

    @property
    def gradient_valid(self) -> RowFlags:
        """Which rows have a trustworthy gradient of the optimum, (B).

        The row is finite and feasible, its free-set Hessian is positive definite, and a Newton step would move no coordinate
        by more than 1e-2 of the narrowest range of its row (ranges above 2, and open ones, count as 2; fixed variables do not
        count) or, where the ranges of the row differ by a factor of 8 or more, by 2e-2 of its own length
        (`Lengths.of`). `Implicit("dense")` computes the Hessian during the solve; otherwise the first access computes it with n
        batched Hessian-vector products.

        After a backward pass, also what it found: with `Implicit("cg")`, that the linear system was solved; with `Unrolled` and
        `Truncated`, and a tolerance, that the derivative depends on the first unrolled iterate by at most 1 %.
        """
        solves, contraction = self.differentiated.solves, self.differentiated.contraction
        if contraction is not None:
            return self._near_minimum & ~without_inference_tensors(partial(contraction.unsolved, self._examined[2]))
        if solves is None or solves.unsolved is None or len(solves.unsolved) != len(self._near_minimum):
            return self._near_minimum
        return self._near_minimum & ~solves.unsolved

    @cached_property
    def _examined(self) -> tuple[RowFlags, Points, Callable[[Points], Points]]:
        x = self.x.detach()
        return without_inference_tensors(lambda: Implicit().examine(self.problem, x))

    @cached_property
    def _near_minimum(self) -> RowFlags:
        convex, step = self.differentiated.convex, self.differentiated.newton_step
        x = self.x.detach()
        if convex is None or step is None:
            convex, step, _ = self._examined
        near = (step.abs() <= _FAR * Lengths(self.problem.box, x).trusted(x)).all(-1)
        feasible = self.status != Status.INFEASIBLE
        return convex & near & self.finite & feasible

    @property
    def converged(self) -> RowFlags:
        """Which rows reached the tolerance, (B)."""
        return self.status == Status.CONVERGED

    @property
    def finite(self) -> RowFlags:
        """Which rows had no NaN or Inf, (B). The others have no solution."""
        return self.status != Status.NON_FINITE
