"""Steering: a cost and constraints on the planned actions that a trained policy or agent gets when it acts.

Policies that plan add them to their objective, diffusion policies to every denoising step, and all others are projected.
"""

import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from difftori.errors import ConfigError, NonFiniteError, ObjectiveError
from difftori.interfaces import Agent, Policy
from difftori.planning import Plan, Planner
from difftori.solver import (
    CEM,
    MPPI,
    Box,
    Detached,
    Newton,
    ProjectedGradient,
    Solution,
    Status,
    TrajectoryObjective,
    solve,
)
from difftori.solver.constraints import ConstrainedFunction
from difftori.solver.derivatives import value_and_grad
from difftori.solver.inference import without_inference_tensors
from difftori.solver.objective import FunctionObjective, Objective, positional_parameters
from difftori.types import Plans, Points

PlanFunction: TypeAlias = Callable[..., Tensor]
"""Planned actions (B P A), from the present step on, in the environment's units → (B), or (B m). A second required argument
is the present observations by name, (B …), as the policy gets them; agents have one, `state`."""
_NO_GRADIENT = (
    "{}: it has no gradient with respect to the actions. Fix: compute it from them with differentiable functions, "
    "such as clamp_min in place of a comparison, and without detach()"
)
_log = logging.getLogger(__name__)
_SOLVER, _STEPS = ProjectedGradient(polish=2, polish_with=Newton(linear="cg", products=32)), 50
"""The solver of projections, and its largest number of gradient steps. The Newton steps after them are for stiff costs, such as high weights on jerk."""
_FIRST_ORDER, _FIRST_ORDER_STEPS = ProjectedGradient(), 300
"""The same for costs without second derivatives, such as a map that is interpolated."""


@dataclass(frozen=True)
class Steering:
    """What is added to the objective of a trained policy or agent: max_a Σ f(z, a) − weight · cost(a), with constraint(a) ≤ 0.

    `cost` is differentiable, (B P A) → (B), and `constraint` too, (B P A) → (B m). The rows are those whose plans are made
    together. `project`: change the finished plan instead, as little as needed (`projected`); policies without a way to plan with
    a cost (`STEERABLE`) always do. Raises ConfigError if there is neither cost nor constraint, or the weight is negative or not finite.
    """

    cost: PlanFunction | None = None
    weight: float = 1.0
    constraint: PlanFunction | None = None
    project: bool = False

    def __post_init__(self):
        if self.cost is None and self.constraint is None:
            raise ConfigError(["steering: no cost and no constraint. Fix: give at least one of them"])
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ConfigError([f"weight: {self.weight} is not a finite number ≥ 0. Fix: give one, such as 1.0"])

    def projects(self, model: Policy | Agent) -> bool:
        """Whether the finished plan of this model is projected."""
        return self.project or model.STEERABLE == "none"

    def check(self, model: Policy | Agent) -> None:
        """Raise ConfigError if the model plans with costs, but not with the given constraint."""
        if self.constraint is not None and model.STEERABLE == "cost" and not self.project:
            raise ConfigError(
                [
                    f"constraint: {model.name} plans by sampling, without constraints. "
                    "Fix: give a cost of violating it, or project=True"
                ]
            )

    def within(self, convert: Callable[[Plans], Plans], obs: Mapping[str, Tensor]) -> "Steering":
        """The same as functions of normalised actions alone, which `convert` maps to the environment's units.

        `obs`: the present observations by name, (B …).
        """

        def converted(function: PlanFunction | None) -> PlanFunction | None:
            if function is None:
                return None
            takes_obs = _takes_obs(function)
            return lambda actions: function(convert(actions), obs) if takes_obs else function(convert(actions))

        return replace(self, cost=converted(self.cost), constraint=converted(self.constraint))

    def plan(
        self,
        planner: Planner,
        objective: TrajectoryObjective,
        start: Plans,
        *,
        generator: torch.Generator | None = None,
        candidates: Tensor | None = None,
    ) -> Plan:
        """Solve the sum from a start (B H A), with the planner's own solver. Other arguments as for `Planner.plan`.

        Raises:
            ObjectiveError: the cost or constraint has another shape, or no gradient.
            NonFiniteError: it is NaN or Inf at the start of a row.
        """

        def actions(x: Points) -> Sequence[Tensor]:
            return (objective.plan(x),)

        whole, constraint = self._added(objective.cost, actions)
        planner = replace(planner, project_start=True, compile=False)
        if not isinstance(planner.solver, MPPI | CEM):  # they use values only
            self._check_gradients(lambda: actions(start.flatten(1)))
        solution = planner.solve(
            whole,
            start.flatten(1),
            generator=generator,
            candidates=None if candidates is None else candidates.flatten(2),
        )
        if constraint is not None:
            solution = self._constrained(planner, whole, constraint, solution)
        self._report(solution, len(start))
        return Plan(objective.plan(solution.x), solution, objective)

    def _constrained(
        self, planner: Planner, whole: Objective, constraint: Callable[[Points], Tensor], free: Solution
    ) -> Solution:
        """Solve again with the constraint, from the solution without it, which is kept in the rows where it satisfies the constraint."""
        with torch.no_grad():
            kept = without_inference_tensors(lambda: (constraint(free.x) <= 0).all(1)) & free.finite
        if bool(kept.all()):
            return free
        held = replace(planner, tolerance=None).solve(ConstrainedFunction(whole, constraint, None), free.x)
        chosen = {name: torch.where(kept, getattr(free, name), getattr(held, name)) for name in ("cost", "status")}
        return replace(held, x=torch.where(kept[:, None], free.x, held.x), **chosen)

    def proximal_plan(
        self, objective: TrajectoryObjective, start: Plans, step_size: Tensor, steps: int, rows: int, action_dim: int
    ) -> Plan:
        """Gradient steps on the objective as in training with `GradientDescent`, each followed by a proximal step on the cost (forward–backward splitting).

        x ← argmin_y ½‖y − (x − α∇J(x))‖² / α + weight · cost(y), with constraint(y) ≤ 0, in [−1, 1]. Without a weight these are the
        steps of training, and every weight is stable. `start` has (S·rows H A) S plans for each of `rows` observations.
        Source: Combettes and Wajs (2005), "Signal recovery by proximal forward-backward splitting". Raises as `plan`.
        """

        def actions(y: Points) -> Sequence[Tensor]:
            return y.reshape(-1, rows, y.shape[-1] // action_dim, action_dim).unbind()

        def run() -> Solution:
            box, x, solution = Box(-1.0, 1.0), start.flatten(1).clamp(-1, 1), None
            self._check_gradients(lambda: actions(x))
            for _ in range(steps):
                forward = x - step_size * value_and_grad(objective, x)[1]
                solution = self._proximal(forward, step_size, box, actions)
                x = solution.x
            assert solution is not None
            return solution

        solution = without_inference_tensors(run)
        x = solution.x
        self._report(solution, rows)
        cost = objective.cost(x) + self._weighted(actions(x))
        # of several plans, a feasible one is better than others, and a finite one than one with NaN
        cost = cost.masked_fill(solution.status == Status.INFEASIBLE, torch.inf).masked_fill(
            ~solution.finite, torch.nan
        )
        return Plan(objective.plan(x), replace(solution, cost=cost), objective)

    def projected(self, plans: Plans, *, final: bool = True) -> Plans:
        """Change normalised plans (B P A) as little as needed: argmin_y ½‖y − plans‖² + weight · cost(y), with constraint(y) ≤ 0.

        y is in [−1, 1], extended to numbers of the plan that are outside of it. `final`: check that there are gradients, and warn of rows that violate the constraint.
        Raises as `plan`.
        """

        def actions(y: Points) -> Sequence[Tensor]:
            return (y.reshape(plans.shape),)

        def run() -> Solution:
            point = plans.flatten(1)
            box = Box(point.clamp(max=-1), point.clamp(min=1))
            if final:
                self._check_gradients(lambda: actions(point))
            return self._proximal(point, point.new_ones(()), box, actions)

        bad = ~plans.isfinite().flatten(1).all(1)
        if bool(bad.any()):
            raise NonFiniteError(
                f"steering: the plan is NaN or Inf in rows {_listed(bad)} of {len(plans)}. Fix: check the observations"
            )
        with torch.no_grad():
            solution = without_inference_tensors(run)
        self._report(solution, len(plans), warn=final)
        return solution.x.reshape(plans.shape)

    def _proximal(
        self, point: Points, scale: Tensor, box: Box, actions: Callable[[Points], Sequence[Tensor]]
    ) -> Solution:
        """Minimise ½‖y − point‖² / scale + weight · cost(y), with constraint(y) ≤ 0, in the box, from its point nearest to `point` on."""
        start = box.project(point)
        whole, constraint = self._added(lambda y: 0.5 * (y - point).square().sum(-1) / scale, actions)
        parts = [whole.cost] if constraint is None else [whole.cost, constraint]
        twice = all(_twice_differentiable(part, start) for part in parts)
        return solve(
            whole,
            start,
            solver=_SOLVER if twice else _FIRST_ORDER,
            adjoint=Detached(),
            box=box,
            max_steps=_STEPS if twice else _FIRST_ORDER_STEPS,
            inequality=constraint,
        )

    def _added(
        self, inner: Callable[[Points], Tensor], actions: Callable[[Points], Sequence[Tensor]]
    ) -> tuple[Objective, Callable[[Points], Tensor] | None]:
        """The objective inner + weight · cost, and the constraint, as functions of variables (S·B n)."""
        objective = FunctionObjective(lambda x: inner(x) + self._weighted(actions(x)))
        if self.constraint is None:
            return objective, None
        return objective, lambda x: torch.cat([_checked(self.constraint, part, "constraint") for part in actions(x)])

    def _weighted(self, parts: Sequence[Tensor]) -> Tensor:
        if self.cost is None or self.weight == 0:
            return torch.zeros((), device=parts[0].device)
        return self.weight * torch.cat([_checked(self.cost, part, "cost") for part in parts])

    def _check_gradients(self, actions: Callable[[], Sequence[Tensor]]) -> None:
        """Raise ObjectiveError if cost or constraint have no gradient with respect to the actions (B P A), also if their parameters have one."""

        def run() -> None:
            with torch.enable_grad():
                point = actions()[0].detach().requires_grad_()
                for name, function in (("cost", self.cost), ("constraint", self.constraint)):
                    if function is not None and (name == "constraint" or self.weight > 0):
                        values = _checked(function, point, name)
                        (slope,) = torch.autograd.grad(values.sum(), point, allow_unused=True)
                        if slope is None:
                            raise ObjectiveError(_NO_GRADIENT.format(name))

        without_inference_tensors(run)

    def _report(self, solution: Solution, rows: int, *, warn: bool = True) -> None:
        """Raise NonFiniteError for rows of which no plan is finite, and warn of those of which none satisfies the constraint.

        There are one or several plans for each of `rows` observations.
        """
        bad = ~solution.finite.reshape(-1, rows).any(0)
        if bool(bad.any()):
            raise NonFiniteError(
                f"steering: the cost or constraint, or its gradient, is NaN or Inf in rows {_listed(bad)} of {rows}. "
                "Fix: check it for these observations (sqrt(x) has no gradient at 0)"
            )
        broken = ((solution.status == Status.INFEASIBLE) | ~solution.finite).reshape(-1, rows).all(0)
        if warn and bool(broken.any()):
            _log.warning("constraint: no plan satisfies it in rows %s of %d", _listed(broken), rows)


def _listed(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()[:8]


def _checked(function: PlanFunction | None, actions: Tensor, name: str) -> Tensor:
    """The values of a cost (B) or constraint (B m), in the type of the actions. Raises ObjectiveError for another shape, or no gradient."""
    assert function is not None
    values, rows = function(actions), actions.shape[0]
    number = 1 if name == "cost" else 2
    if not isinstance(values, Tensor) or values.dim() != number or values.shape[0] != rows:
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        wanted = f"one number per row, ({rows})" if name == "cost" else f"m numbers per row, ({rows} m)"
        raise ObjectiveError(f"{name}: it returned {shape} for actions {tuple(actions.shape)}. Fix: return {wanted}")
    if torch.is_grad_enabled() and actions.requires_grad and not values.requires_grad:
        raise ObjectiveError(_NO_GRADIENT.format(name))
    return values.to(actions.dtype)


def _twice_differentiable(function: Callable[[Points], Tensor], x: Points) -> bool:
    """Whether torch has second derivatives of all operations, which those of interpolation (`grid_sample`) lack."""
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(function(point).sum(), point, create_graph=True, allow_unused=True)
        if slope is None or not slope.requires_grad:
            return True
        try:
            torch.autograd.grad(slope.sum(), point, allow_unused=True)
        except RuntimeError:
            return False
    return True


def _takes_obs(function: PlanFunction) -> bool:
    """Whether a second argument is required."""
    return len([p for p in positional_parameters(function) if p.default is inspect.Parameter.empty]) >= 2
