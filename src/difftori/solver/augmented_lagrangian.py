"""Constraints other than bounds, by the augmented Lagrangian: the rounds that update the multipliers.

    min_x J(x)   subject to   g(x) ≤ 0,  h(x) = 0

is solved as a sequence of problems without constraints (Hestenes, 1969; Powell, 1969; Rockafellar, 1973),

    min_x J(x) + Σ_i (max(0, λ_i + ρ g_i(x))² − λ_i²) / 2ρ + Σ_j (ν_j h_j(x) + ρ h_j(x)² / 2),

with λ ← max(0, λ + ρ g) and ν ← ν + ρ h after each one. Any solver can take the steps. Each row has its own multipliers λ, ν
and its own ρ; rows do not interact. Every constraint's ρ is in the unit of that constraint, so that units matter only for the tolerance.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from difftori.errors import SolverError
from difftori.solver import lq
from difftori.solver.adjoint import Adjoint, Detached, Implicit, Iterates
from difftori.solver.constraints import Constrained, ConstrainedTrajectory, Multipliers, violation
from difftori.solver.interface import Problem, largest
from difftori.solver.lengths import Lengths
from difftori.solver.objective import Objective
from difftori.solver.settings import check_settings
from difftori.solver.solution import Solution, Status, status_with_hessian
from difftori.types import Points, RowFlags, Rows

Inner = Callable[[Objective, Points, float | Rows], Solution]
"""(objective without constraints, start, tolerance of all rows or of each) → solution without a graph."""


@dataclass(frozen=True)
class AugmentedLagrangian:
    """Settings of the augmented Lagrangian.

    Args:
        rounds: the largest number of solves; each may take `max_steps` steps.
        weight: the first ρ, in units that make it independent of the scales of cost and constraints.
        growth: ρ is multiplied by this factor in rows where a round did not reduce the violation enough.
        progress: the share of the previous violation that a round must reach.
        tolerance: the largest violation that counts as zero, in the units of the constraints. Default: 1e-6 in float64 and
            1e-4 in float32.
    """

    rounds: int = 20
    weight: float = 10.0
    growth: float = 10.0
    progress: float = 0.25
    tolerance: float | None = None

    def __post_init__(self):
        check_settings(
            self, rounds="[1, inf)", weight="(0, inf)", growth="(1, inf)", progress="(0, 1)", tolerance="(0, inf)"
        )

    def allowed(self, dtype: torch.dtype) -> float:
        """The largest violation that counts as zero."""
        return (1e-6 if dtype == torch.float64 else 1e-4) if self.tolerance is None else self.tolerance

    def first(self, objective: Constrained, x: Points) -> Multipliers:
        """Initial multipliers: zero, with weights from the gradients of cost and constraints at x, and from the cost's curvature.

        Constraints are compared in units in which their own gradients have length 1. The curvature, along the gradient of the most
        violated constraint, sets the weight where x is a minimum of the cost without constraints: the gradient of the cost is zero
        there.
        """
        equality = objective.equality(x)
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            values = objective.constraints(point, None)
            unit = _units(objective.steepness(x), values.detach(), equality, x.detach())
            values = values / unit
            worst = torch.where(_near(values, equality), values.abs(), 0.0).amax(-1)
            slope, steepness = _slope(objective.plain.cost(point), point), _steepness(worst, point)
            normal = _slope(violation(values, equality), point)
            length = normal.square().sum(-1, keepdim=True)
            along = torch.where(length > 0, normal / length.sqrt(), 0.0)
            step = torch.finfo(x.dtype).eps ** 0.5 * x.detach().abs().amax(-1, keepdim=True).clamp(min=1.0)
            moved = (x.detach() + step * along).requires_grad_()
            bend = (_slope(objective.plain.cost(moved), moved) - slope) / step
        pull = slope.abs().amax(-1)
        sloped = self.weight * pull / (steepness * torch.maximum(worst.detach(), steepness))
        curved = ((bend * along).sum(-1) / length.squeeze(-1)).nan_to_num(0.0, 0.0, 0.0)
        weight = torch.maximum(sloped, _LIGHT * curved)
        usable = torch.isfinite(weight) & (weight > 0)
        weight = torch.where(usable, weight, self.weight)
        weights = weight[:, None] / unit.square()
        return Multipliers(torch.zeros_like(weights), weights, weights)


_LIGHT = 1e-3
"""The least first weight, as a share of the curvature of the cost. Heavy first weights lead to poor local optima."""


def _units(steepness: Tensor, values: Tensor, equality: Tensor, x: Points) -> Tensor:
    """The unit of each constraint (B M): the length of its own gradient, or the largest one of the row if it has none.

    Where the gradient almost vanishes, at the centre of an obstacle or far from a smooth step, its length is not the unit: the limit
    would seem to be far away compared with the size of x. The value then sets the unit.
    """
    broken = (values > 0) | equality
    own = values.abs() / x.abs().amax(-1, keepdim=True).clamp(min=1.0)
    small = own > torch.where(broken, 1.0, _VANISHES) * steepness
    steepness = torch.where(small, own, steepness)
    known = torch.isfinite(steepness) & (steepness > 0)
    most = torch.where(known, steepness, 0.0).amax(-1, keepdim=True)
    return torch.where(known, steepness, torch.where(most > 0, most, 1.0))


_VANISHES = 1e3
"""A constraint that is kept, by this multiple of its gradient's length times the size of x, has almost no gradient."""


def _needed(objective: Constrained, x: Points, allowed: float, multipliers: Multipliers) -> Rows:
    """The relative accuracy of each row of x at which its constraints are as accurate as `allowed`, by their derivatives at x.

    The first weights of a row's `multipliers` are the inverse squares of the constraints' units, up to a factor of the row.
    """
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        values, equality = objective.constraints(point, None), objective.equality(point)
        near = _near(values * multipliers.initial.sqrt(), equality)
        slope = _slope(torch.where(near, values.abs(), 0.0).amax(-1), point)
    largest_change = (slope.abs().sum(-1) * x.abs().amax(-1).clamp(min=1.0)).nan_to_num(0.0, 0.0, 0.0)
    return allowed / largest_change.clamp(min=torch.finfo(x.dtype).tiny)


def _near(values: Tensor, equality: Tensor) -> Tensor:
    """Which constraints (B M) set the scale of their row, by their `values` in their own units: not inequalities with 100 times the
    slack of the nearest one, such as a distant obstacle.
    """
    values = values.detach()
    signed = torch.where(equality, values.abs(), values)
    return -signed <= _DISTANT * signed.amax(-1, keepdim=True).abs()


_DISTANT = 100.0


def _steepness(of: Rows, x: Points) -> Rows:
    return largest(_slope(of, x))


def _slope(of: Rows, x: Points) -> Points:
    if not of.requires_grad:
        return torch.zeros_like(x)
    (grad,) = torch.autograd.grad(of.sum(), x, retain_graph=True, allow_unused=True)
    return torch.zeros_like(x) if grad is None else grad.detach()


def solve_constrained(
    problem: Problem,
    inner: Inner,
    adjoint: Adjoint,
    x0: Points,
    method: AugmentedLagrangian,
    multipliers: Multipliers | None,
    tolerance: float,
) -> Solution:
    """Solve and update the multipliers until every row is within the tolerances or the rounds are used up."""
    objective = problem.objective
    assert isinstance(objective, Constrained)
    if not isinstance(adjoint, Implicit | Detached):
        raise SolverError(
            f"solve: {type(adjoint).__name__} cannot differentiate a solve with constraints. Fix: adjoint=Implicit() or Detached()."
        )
    undefined = torch.isnan(x0).any(-1)
    x = problem.box.project(torch.nan_to_num(x0.detach()))
    with torch.no_grad():
        equality = objective.equality(x)
    first = method.first(objective, x) if multipliers is None else multipliers
    _check(first, len(x), len(equality))
    if multipliers is not None:
        first = _restarted(first, method, objective, x)
    each: float | Rows = tolerance
    if method.tolerance is not None and tolerance > 0:
        # Where the weight is heavy, an error of x that the solver tolerates would change the multipliers by the weight times as much.
        each = (
            _needed(objective, x, method.tolerance, first).clamp(min=10 * torch.finfo(x.dtype).eps).clamp(max=tolerance)
        )
    rounds = _Rounds(objective, equality, method, each, multipliers is not None)
    state = rounds.run(inner, x, first)
    problem = replace(problem, objective=objective.with_multipliers(state.multipliers))
    return _finish(problem, adjoint, state, method, undefined)


@dataclass
class _State:
    """The state after the rounds: the last solution, the multipliers used to compute it, its constraint values (B M), and whether the
    multipliers of a row have settled.
    """

    solution: Solution
    multipliers: Multipliers
    following: Multipliers
    steps: Tensor
    values: Tensor
    violated: Rows
    settled: RowFlags


@dataclass(frozen=True)
class _Rounds:
    objective: Constrained
    equality: Tensor
    method: AugmentedLagrangian
    tolerance: float | Rows
    warm: bool

    def run(self, inner: Inner, x: Points, multipliers: Multipliers) -> _State:
        allowed, heaviest = self.method.allowed(x.dtype), _HEAVIEST * multipliers.initial
        done = torch.zeros_like(x[:, 0], dtype=torch.bool)
        before = torch.full_like(multipliers.values, torch.inf)
        steps = torch.zeros_like(done, dtype=torch.long)
        for count in range(self.method.rounds):
            # Early rounds use a loose tolerance, because the multipliers are not exact yet.
            tolerance = self.tolerance if self.warm else _at_least(1e-3 * 0.01**count, self.tolerance)
            solution = inner(self.objective.with_multipliers(multipliers), x, tolerance)
            x, steps = solution.x, steps + solution.steps
            with torch.no_grad():
                values = self.objective.constraints(x, solution.differentiated.states)
            following = multipliers.updated(values, self.equality)
            # The change of the multipliers measures the distance from feasibility and complementarity.
            each = (following - multipliers.values).abs() / multipliers.weight
            moved = each.amax(-1)
            lost = ~(solution.finite & torch.isfinite(moved))
            slow = (each > self.method.progress * before) & (each > allowed)
            stuck = (slow & (multipliers.weight >= heaviest)).any(-1)
            done = done | lost | stuck | ((moved <= allowed) & (tolerance <= self.tolerance))
            heavier = multipliers.weight * self.method.growth
            weight = torch.where(slow & ~done[:, None], heavier, multipliers.weight)
            after = multipliers._replace(
                values=torch.where(lost[:, None], multipliers.values, following), weight=weight
            )
            if bool(done.all()) or count == self.method.rounds - 1:
                break
            # Finished rows keep their multipliers, so their solutions do not change.
            values = torch.where(done[:, None], multipliers.values, after.values)
            multipliers = multipliers._replace(values=values, weight=weight.minimum(heaviest))
            before = each
        return _State(
            solution, multipliers, after, steps, values, violation(values, self.equality), torch.le(moved, allowed)
        )


def _at_least(least: float, tolerance: float | Rows) -> float | Rows:
    return tolerance.clamp(min=least) if isinstance(tolerance, Tensor) else max(tolerance, least)


_HEAVIEST = 1e8
"""Upper limit of the weight, as a multiple of the first weight. Above it, rounding would hide the cost."""


def _restarted(given: Multipliers, method: AugmentedLagrangian, objective: Constrained, x: Points) -> Multipliers:
    """The multipliers of a warm start. Those of rows at the limit of the weight, which were infeasible, or with NaN begin again."""
    again = ~((given.weight < _HEAVIEST * given.initial) & torch.isfinite(given.values)).all(-1)
    if not bool(again.any()):
        return given
    fresh, again = method.first(objective, x), again[:, None]
    return Multipliers(
        torch.where(again, fresh.values, given.values),
        torch.where(again, fresh.weight, given.weight),
        torch.where(again, fresh.weight, given.initial),
    )


def _finish(
    problem: Problem, adjoint: Adjoint, state: _State, method: AugmentedLagrangian, undefined: RowFlags
) -> Solution:
    """The solution with its derivative, from the optimality conditions with the active constraints as equations.

    A row whose multipliers have not settled is not at the optimum: some of its active constraints may be wrong. `undefined`: rows
    whose start was NaN.
    """
    solution = state.solution
    iterates = Iterates(solution.x.detach(), solution.finite, None, solution.differentiated.states)
    differentiated = adjoint.apply(lambda *_, **__: iterates, problem, 0)
    if (step := differentiated.newton_step) is not None:
        differentiated = differentiated._replace(newton_step=torch.where(state.settled[:, None], step, torch.inf))
    feasible = state.violated <= method.allowed(solution.x.dtype)
    x = solution.x.detach()
    status = status_with_hessian(solution.status, differentiated, Lengths(problem.box, x), x)
    status = torch.where(feasible | ~solution.finite, status, int(Status.INFEASIBLE))
    status = torch.where(solution.finite & ~undefined, status, int(Status.NON_FINITE))
    with torch.no_grad():
        cost = _plain_cost(cast(Constrained, problem.objective), solution)
    return replace(
        solution,
        x=differentiated.x,
        cost=cost,
        steps=state.steps,
        status=status,
        problem=problem,
        differentiated=differentiated,
        multipliers=state.following,
        violated=state.violated,
    )


def _plain_cost(objective: Constrained, solution: Solution) -> Rows:
    states = solution.differentiated.states
    if isinstance(objective, ConstrainedTrajectory) and states is not None:
        return lq.costs(objective.plain, states, objective.plan(solution.x))
    return objective.plain.cost(solution.x)


def _check(multipliers: Multipliers, rows: int, count: int) -> None:
    if not multipliers.values.shape == multipliers.weight.shape == multipliers.initial.shape == (rows, count):
        raise SolverError(
            f"solve: multipliers have values {tuple(multipliers.values.shape)} and weight {tuple(multipliers.weight.shape)}, "
            f"but there are {rows} rows with {count} constraints. Fix: use the multipliers of a solution of the same shape, or None."
        )
