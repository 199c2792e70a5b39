"""`Planner`, which solves trajectory objectives (objectives.py), and `plan`, its shortcut for control."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor

from difftori.errors import BoxError, NonFiniteError, ObjectiveError, ShapeError
from difftori.objectives import (
    ActionReturnObjective,
    Constraint,
    Dynamics,
    EnergyObjective,
    ReturnObjective,
    Reward,
    Value,
    trajectory_objective,
)
from difftori.solver import (
    ILQR,
    Adjoint,
    AugmentedLagrangian,
    Box,
    ConstrainedTrajectory,
    Detached,
    Implicit,
    Multipliers,
    Objective,
    ProjectedGradient,
    Solution,
    Solver,
    Status,
    TrajectoryObjective,
    solve,
)
from difftori.solver.box import Bound
from difftori.solver.objective import ClampedObjective, as_objective
from difftori.solver.validation import check_rows
from difftori.types import Plans, Points, Rows, States


@dataclass(frozen=True)
class Plan:
    """A plan: `actions` (B H A) inside the box, differentiable as the adjoint defines, `solution`, the result of the solve, and `objective`,
    whose dynamics it follows.

    With `Planner(clamp_in_cost=True)` actions may lie outside the box; the cost is that of the nearest ones inside.
    """

    actions: Plans
    solution: Solution
    objective: TrajectoryObjective

    @cached_property
    def states(self) -> Tensor:
        """The states s_0 … s_H of the plan, (B H+1 S), differentiable like the actions.

        `ILQR` computes them with feedback, so they are correct for unstable dynamics too. For other solvers the actions are
        rolled out at the first access.
        """
        found = self.solution.differentiated.states
        if found is not None:
            return found
        x, solved = self.actions.flatten(1), self.solution.problem.objective
        return self.objective.rollout(solved.clamp(x) if isinstance(solved, ClampedObjective) else x)

    @property
    def value(self) -> Rows:
        """The return of the plan, (B)."""
        return -self.solution.cost

    def shifted(self) -> Plans:
        """The plan shifted by one step with the last action repeated: the initial guess of the next solve of an MPC loop, (B H A)."""
        actions = self.actions.detach()
        return torch.cat([actions[:, 1:], actions[:, -1:]], 1)


@dataclass(frozen=True)
class Planner:
    """A solver, an adjoint, a box and a step limit: all settings of planning, without the objective.

    TD-MPC is `Planner(MPPI(), Detached())`; DiffTORI is a gradient solver with `Unrolled()` or `Implicit()`.
    """

    solver: Solver = field(default_factory=ProjectedGradient)
    adjoint: Adjoint = field(default_factory=Implicit)
    box: Box = field(default_factory=Box)
    max_steps: int = 20
    tolerance: float | None = None
    compile: bool = False
    keep: Literal["best", "last"] = "best"
    project_start: bool = False
    """Start at the nearest point of the box, as `plan` always does. Default: False, the start of `solve` must lie inside."""
    clamp_in_cost: bool = False
    """Clamp x inside the cost, as the authors' release does: coordinates outside the box have no gradient and stay there, so
    the result may lie outside. Default: False."""

    def acting(self) -> "Planner":
        """The same planner for inference: without a derivative, returning the best iterate."""
        return replace(self, adjoint=Detached(), keep="best")

    def solve(
        self,
        objective: Objective | Callable[[Tensor], Tensor],
        x0: Points,
        *,
        generator: torch.Generator | None = None,
        candidates: Tensor | None = None,
        history: bool = False,
        augmented: AugmentedLagrangian | None = None,
        multipliers: Multipliers | None = None,
    ) -> Solution:
        """Call `difftori.solver.solve` with these settings, for any objective over x (B n). The box bounds x."""
        box = self.box
        if self.clamp_in_cost:
            objective, box = ClampedObjective(as_objective(objective), box.to(x0)), None
        return solve(
            objective,
            x0,
            solver=self.solver,
            adjoint=self.adjoint,
            box=box,
            project_start=self.project_start,
            max_steps=self.max_steps,
            tolerance=self.tolerance,
            keep=self.keep,
            candidates=candidates,
            generator=generator,
            history=history,
            compile=self.compile,
            augmented=augmented,
            multipliers=multipliers,
        )

    def plan(
        self,
        objective: TrajectoryObjective,
        init_actions: Plans,
        *,
        generator: torch.Generator | None = None,
        candidates: Tensor | None = None,
        history: bool = False,
        throw: bool = False,
        augmented: AugmentedLagrangian | None = None,
        multipliers: Multipliers | None = None,
    ) -> Plan:
        """Solve from init_actions (B H A), which are first projected onto the box. `candidates` (K B H A) as for `solve`.

        Raises:
            ShapeError: the actions or candidates do not fit the objective's rows, horizon and action dimension.
            BoxError: the planner's bounds do not fit the actions.
            NonFiniteError: with `throw`, the cost or gradient of a row is NaN or Inf.
        """
        expected = (objective.state.shape[0], objective.horizon, objective.action_dim)
        if tuple(init_actions.shape) != expected:
            raise ShapeError(
                f"Planner.plan: init_actions have shape {tuple(init_actions.shape)}. Fix: use (B H A) = {expected}, as the objective expects."
            )
        if candidates is not None and tuple(candidates.shape[1:]) != expected:
            raise ShapeError(
                f"Planner.plan: candidates have shape {tuple(candidates.shape)}. Fix: use (K B H A) with (B H A) = {expected}, "
                "as the objective expects."
            )
        box = self.flat_box(init_actions)
        start = init_actions.flatten(1)
        solution = replace(self, box=box, project_start=True).solve(
            objective,
            box.project(start) if self.clamp_in_cost else start,
            candidates=None if candidates is None else candidates.flatten(2),
            generator=generator,
            history=history,
            augmented=augmented,
            multipliers=multipliers,
        )
        if throw:
            _raise_if_non_finite(solution)
        return Plan(objective.plan(solution.x), solution, objective)

    def flat_box(self, actions: Plans) -> Box:
        """Bounds given as numbers, per action (A), per step (H A) or per row (B H A), for the flat variables (H·A)."""

        def flat(bound: Bound, name: str) -> Bound:
            if isinstance(bound, int | float):
                return bound
            tensor = torch.as_tensor(bound, dtype=actions.dtype, device=actions.device).detach()
            if tensor.dim() == 0:
                return tensor
            try:
                return tensor.expand(actions.shape if tensor.dim() == 3 else actions.shape[1:]).flatten(-2)
            except RuntimeError as error:
                raise BoxError(
                    f"Planner: {name} has shape {tuple(tensor.shape)}, which does not fit actions (B H A) = "
                    f"{tuple(actions.shape)}. Fix: use a number, (A), (H A) or (B H A)."
                ) from error

        return Box(flat(self.box.low, "low"), flat(self.box.high, "high"), self.box.inward)


def _raise_if_non_finite(solution: Solution) -> None:
    rows = (solution.status == Status.NON_FINITE).nonzero().squeeze(-1).tolist()
    if rows:
        raise NonFiniteError(
            f"Planner.plan: the objective or its gradient is NaN or Inf in rows {rows[:8]} (of {len(solution.status)}). "
            "Fix: check the state and the outputs of the networks for these rows."
        )


_SMALL_STATE = 24
"""The largest state dimension for which `plan` uses ILQR by default: ILQR computes derivatives with respect to each one."""


def check_model(objective: ReturnObjective | ConstrainedTrajectory) -> None:
    """Raise ObjectiveError if dynamics, reward or terminal value return rows of the wrong shape or precision, or rows of a function
    depend on each other.
    """
    model, state = objective.plain if isinstance(objective, ConstrainedTrajectory) else objective, objective.state
    assert isinstance(model, ReturnObjective)
    action = state.new_zeros(len(state), objective.action_dim)
    t = objective.times()[0]
    functions: list[tuple[str, Callable[..., Tensor], tuple[Tensor, ...], torch.Size]] = [
        ("dynamics", partial(model.next, t=t), (state, action), state.shape),
        ("reward", partial(model.reward_at, t=t), (state, action), state.shape[:1]),
    ]
    if model.terminal_value is not None:
        functions.append(("terminal_value", model.value_at, (state,), state.shape[:1]))
    with torch.no_grad():
        for name, function, inputs, shape in functions:
            got = function(*inputs)
            if not isinstance(got, Tensor) or got.shape != shape:
                found = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
                raise ObjectiveError(
                    f"{name} returned {found} for state {tuple(state.shape)} and action {tuple(action.shape)}, not a tensor "
                    f"{tuple(shape)}. Fix: keep the rows, and index or sum over the last dimension: state[..., 0], cost.sum(-1)."
                )
            if got.dtype != state.dtype:
                raise ObjectiveError(
                    f"{name} returned {got.dtype} for a state in {state.dtype}. Fix: use the same precision for both."
                )
            check_rows(name, function, *inputs)
    if isinstance(objective, ConstrainedTrajectory):
        stage, terminal = objective.stage, objective.terminal
        if stage is not None:
            check_rows("constraint", lambda s, a: stage(s, a, t), state, action)
        if terminal is not None:
            check_rows("terminal_constraint", terminal, state)


def plan(
    dynamics: Dynamics,
    reward: Reward,
    terminal_value: Value | None,
    state: States,
    init_actions: Plans,
    low: Bound = -1.0,
    high: Bound = 1.0,
    *,
    discount: float = 1.0,
    solver: Solver | None = None,
    adjoint: Adjoint | None = None,
    max_steps: int = 200,
    tolerance: float | None = None,
    compile: bool = False,
    constraint: Constraint | None = None,
    terminal_constraint: Value | None = None,
    augmented: AugmentedLagrangian | None = None,
    multipliers: Multipliers | None = None,
    first_step: int = 0,
) -> Plan:
    """Optimise a trajectory with known or learned dynamics, differentiable in every tensor that the functions use.

        max_{a_0 … a_{H−1}}  Σ_{t<H} γ^t reward(s_t, a_t) + γ^H terminal_value(s_H),   s_{t+1} = dynamics(s_t, a_t)

    All functions may take the step as a further argument t, an integer tensor (1), which is H (plus `first_step`) in terminal
    functions. `reference[t]` (1 …) broadcasts against rows. Use `torch.where`, not `if`.

    Args:
        dynamics: (state (B S), action (B A)) → (B S).
        reward: (state (B S), action (B A)) → (B), maximised.
        terminal_value: state (B S) → (B), or None.
        state: the initial states of the B plans, (B S).
        init_actions: the initial guess, (B H A); its shape sets the horizon.
        low, high: action bounds: numbers, (A), (H A) or (B H A).
        discount: γ.
        solver: default: `ILQR()` for up to 24 state dimensions, else `ProjectedGradient(window=5, polish=1)`.
        adjoint: how the plan is differentiated; default: `Implicit()`.
        constraint: (state (B S), action (B A)) → (B m), must be ≤ 0 at every step t < H. Those that depend on s_0 alone do
            not count, because no action can change them. Solved by the augmented Lagrangian;
            `plan.solution.violation` (B) is the largest violation. The gradient keeps the active constraints active.
        terminal_constraint: state (B S) → (B k), must be ≤ 0 at s_H.
        augmented, multipliers: as for `difftori.solver.solve`.
        first_step: the step t of the first action, for functions that take t.
        max_steps, tolerance, compile: as for `difftori.solver.solve`.

    Returns:
        Plan: `actions` (B H A) inside the bounds, `value` (B), `solution`.

    Raises:
        ShapeError, BoxError, ObjectiveError: invalid input.
    """
    for name, value, wanted in (("state", state, "(B S)"), ("init_actions", init_actions, "(B H A)")):
        if not isinstance(value, Tensor) or value.dim() != len(wanted.split()) or 0 in value.shape[1:]:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
            raise ShapeError(f"plan: {name} has {found}. Fix: use a tensor {wanted}, with at least 1 for all but B.")
    _, horizon, action_dim = init_actions.shape
    objective = trajectory_objective(
        dynamics,
        reward,
        terminal_value,
        state,
        horizon,
        action_dim,
        discount,
        constraint,
        terminal_constraint,
        first_step,
    )
    check_model(objective)
    if solver is None:
        small = state.shape[-1] <= _SMALL_STATE
        solver = ILQR() if small else ProjectedGradient(window=5, polish=1)
    planner = Planner(
        solver,
        Implicit() if adjoint is None else adjoint,
        Box(low, high),
        max_steps,
        tolerance,
        compile,
    )
    return planner.plan(objective, init_actions, augmented=augmented, multipliers=multipliers)


__all__ = [
    "ActionReturnObjective",
    "Constraint",
    "Dynamics",
    "EnergyObjective",
    "Plan",
    "Planner",
    "ReturnObjective",
    "Reward",
    "Value",
    "check_model",
    "plan",
    "trajectory_objective",
]
