"""Steering: a cost and constraints on the planned actions that a trained policy's or agent's objective gets when it acts."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from difftori.errors import ConfigError, NonFiniteError, ObjectiveError
from difftori.interfaces import Agent, Policy
from difftori.planning import Plan, Planner
from difftori.solver import TrajectoryObjective
from difftori.solver.constraints import ConstrainedFunction
from difftori.solver.objective import FunctionObjective, Objective
from difftori.types import Plans, Points

PlanFunction: TypeAlias = Callable[..., Tensor]
"""Planned actions (B P A), from the present step on, in the environment's units → (B), or (B m). A second required argument
is the present observations by name, (B …)."""
ToActions: TypeAlias = Callable[[Points], Sequence[Tensor]]
"""From variables (S·B n), S plans of each of B rows, to S times actions (B P A)."""
STEERED_STEPS = 30
"""Largest number of gradient steps of a solve with an added cost. The sum is not what the step lengths of training were for."""


@dataclass(frozen=True)
class Steering:
    """What is added to the objective of a trained policy or agent: max_a Σ f(z, a) − weight · cost(a), with constraint(a) ≤ 0.

    `cost` is differentiable, (B P A) → (B), and `constraint` too, (B P A) → (B m). The rows are those whose plans are made
    together. Raises ConfigError if there is neither, or the weight is negative or not finite.
    """

    cost: PlanFunction | None = None
    weight: float = 1.0
    constraint: PlanFunction | None = None

    def __post_init__(self):
        if self.cost is None and self.constraint is None:
            raise ConfigError(["steering: no cost and no constraint. Fix: give at least one of them"])
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ConfigError([f"weight: {self.weight} is not a finite number ≥ 0. Fix: give one, such as 1.0"])

    def within(self, model: Policy | Agent, convert: Callable[[Plans], Plans], obs: Mapping[str, Tensor]) -> "Steering":
        """The same as functions of the model's own actions alone, which `convert` maps to the environment's units.

        `obs`: the present observations by name, (B …). Raises ConfigError if the model has no objective to add them to.
        """
        if model.STEERABLE == "nothing":
            fix = (
                "use an agent that plans"
                if isinstance(model, Agent)
                else "refine it, `difftori train difftori-il --base RUN`"
            )
            raise ConfigError([f"cost: {model.name} has no objective to add it to. Fix: {fix}"])
        if self.constraint is not None and model.STEERABLE == "cost":
            raise ConfigError(
                [f"constraint: {model.name} plans by sampling, without constraints. Fix: give a cost of violating it"]
            )

        def converted(function: PlanFunction | None) -> PlanFunction | None:
            if function is None:
                return None
            takes_obs = _takes_two(function)
            return lambda actions: function(convert(actions), obs) if takes_obs else function(convert(actions))

        return replace(self, cost=converted(self.cost), constraint=converted(self.constraint))

    def plan(
        self,
        planner: Planner,
        objective: TrajectoryObjective,
        start: Plans,
        actions: ToActions | None = None,
        *,
        generator: torch.Generator | None = None,
        candidates: Tensor | None = None,
    ) -> Plan:
        """Solve the sum from a start (S·B H A). The cost is evaluated on `actions` of the variables (default: the plan).

        `generator`, `candidates`: as for `Planner.plan`.

        Raises:
            ObjectiveError: the cost or constraint has another shape.
            NonFiniteError: it is NaN or Inf in a row.
        """
        actions = actions or (lambda x: [objective.plan(x)])
        whole: Objective = objective
        if self.cost is not None and self.weight > 0:
            cost, weight = self.cost, self.weight
            whole = FunctionObjective(lambda x: objective.cost(x) + weight * _rows(cost, actions(x)))
        if self.constraint is not None:
            constraint = self.constraint
            whole = ConstrainedFunction(whole, lambda x: torch.cat([constraint(part) for part in actions(x)]), None)
        solution = replace(planner, project_start=True).solve(
            whole,
            start.flatten(1),
            generator=generator,
            candidates=None if candidates is None else candidates.flatten(2),
        )
        if not bool(solution.finite.all()):
            rows = (~solution.finite).nonzero().flatten().tolist()
            raise NonFiniteError(
                f"steering: the cost or constraint, or its gradient, is NaN or Inf in rows {rows[:8]} of {len(start)}. "
                "Fix: check it for these observations; |x| and sqrt(x) have no gradient at 0"
            )
        return Plan(objective.plan(solution.x), solution)


def _rows(cost: PlanFunction, parts: Sequence[Tensor]) -> Tensor:
    found = [cost(part) for part in parts]
    for part, values in zip(parts, found, strict=True):
        if not isinstance(values, Tensor) or values.shape != part.shape[:1]:
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ObjectiveError(
                f"cost: it returned {shape} for actions {tuple(part.shape)}. Fix: return one number per row, ({len(part)})"
            )
    return torch.cat(found)


def _takes_two(function: PlanFunction) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a built-in function without a signature
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return len([p for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]) >= 2
