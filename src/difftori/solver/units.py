"""Solves in units of the variables' ranges, where these differ, such as newtons beside radians.

In the task's own units the curvatures of such problems are as far apart as the squares of the ranges: gradients are then small far from
the optimum, and single precision does not resolve the narrow variables. Units are powers of two, so no bound is rounded.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from difftori.solver.box import Box
from difftori.solver.constraints import ConstrainedFunction, ConstrainedTrajectory
from difftori.solver.objective import LeastSquaresObjective, Objective, TrajectoryObjective
from difftori.types import Actions, Points, PointSets, Residuals, Rows, States


def range_units(box: Box, objective: Objective, x: Points) -> Tensor | None:
    """The unit of each variable (n), half its range, the same for all rows and steps. None if the ranges differ little."""
    if not box.uneven:
        return None
    width = box.to(x).width(x)
    half = torch.where(torch.isfinite(width), 0.5 * width, 1.0).amax(0)
    if isinstance(objective, TrajectoryObjective):
        half = half.view(-1, objective.action_dim).amax(0).repeat(objective.horizon)
    # A fixed variable has no range.
    return torch.where(half > 0, half, 1.0).log2().round().exp2()


def in_units(objective: Objective, unit: Tensor) -> Objective:
    """The objective as a function of x / unit, with the structure that solvers use."""
    if isinstance(objective, ConstrainedTrajectory):
        action_unit, stage = unit[: objective.action_dim], objective.stage
        scaled = None if stage is None else lambda state, action, t: stage(state, action * action_unit, t)
        inner = TrajectoryInUnits(objective.inner, unit)
        return ConstrainedTrajectory(inner, scaled, objective.terminal, objective.multipliers, objective.linear)
    if isinstance(objective, ConstrainedFunction):
        functions = (objective.inequality, objective.equality_of)
        inequality, equality = (None if f is None else _scaled(f, unit) for f in functions)
        return ConstrainedFunction(in_units(objective.inner, unit), inequality, equality, objective.multipliers)
    if isinstance(objective, TrajectoryObjective):
        return TrajectoryInUnits(objective, unit)
    if isinstance(objective, LeastSquaresObjective):
        return LeastSquaresInUnits(objective, unit)
    return InUnits(objective, unit)


def _scaled(function: Callable[[Tensor], Tensor], unit: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x * unit)


class InUnits(Objective):
    """An objective as a function of x / unit."""

    def __init__(self, inner: Objective, unit: Tensor):
        self.inner, self.unit = inner, unit

    def cost(self, x: Points) -> Rows:
        """The inner cost."""
        return self.inner.cost(x * self.unit)

    def costs(self, candidates: PointSets) -> Tensor | None:
        """The inner costs of candidates."""
        return self.inner.costs(candidates * self.unit)

    def select(self, rows: Tensor) -> "Objective | None":
        """The objective on some rows, or None if the inner objective cannot be split."""
        inner = self.inner.select(rows)
        return None if inner is None else in_units(inner, self.unit)


class LeastSquaresInUnits(InUnits, LeastSquaresObjective):
    """A least-squares objective as a function of x / unit."""

    inner: LeastSquaresObjective

    def residual(self, x: Points) -> Residuals:
        """The inner residuals."""
        return self.inner.residual(x * self.unit)


class TrajectoryInUnits(InUnits, TrajectoryObjective):
    """A trajectory objective as a function of x / unit, where the units of an action are the same in all steps."""

    inner: TrajectoryObjective

    def __init__(self, inner: TrajectoryObjective, unit: Tensor):
        super().__init__(inner, unit)
        self.state, self.horizon, self.action_dim = inner.state, inner.horizon, inner.action_dim
        self.discount, self.staged, self._action_unit = inner.discount, inner.staged, unit[: inner.action_dim]

    def next(self, state: States, action: Actions, t: Tensor) -> States:
        """The next state."""
        return self.inner.next(state, action * self._action_unit, t)

    def stage_cost(self, state: States, action: Actions, t: Tensor) -> Rows:
        """Cost of step t, undiscounted."""
        return self.inner.stage_cost(state, action * self._action_unit, t)

    def terminal_cost(self, state: States) -> Rows:
        """Cost of the last state, undiscounted."""
        return self.inner.terminal_cost(state)
