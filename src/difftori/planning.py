"""Planning: the return of Eq. 4 and the energy of Eq. 7 as objectives, and the planner that solves them.

    RL (Eq. 4):  a(θ) = argmax Σ_{t<H} γ^t R(z_t, a_t) + γ^H Q(z_H),   z_{t+1} = d(z_t, a_t)
    IL (Eq. 7):  a(θ) = argmax Σ_{t<H} γ^t f(z_t, a_t),                z_{t+1} = d(z_t, a_t)

(Wan et al., 2024, "DiffTORI", arXiv 2402.05421.) The model is unrolled inside the objective: it is no constraint.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from difftori.errors import BoxError, NonFiniteError, ShapeError, SolverError
from difftori.solver import (
    ILQR,
    Adjoint,
    AugmentedLagrangian,
    Box,
    ConstrainedTrajectory,
    Implicit,
    Multipliers,
    ProjectedGradient,
    Solution,
    Solver,
    Status,
    TrajectoryObjective,
    solve,
)
from difftori.solver.box import Bound
from difftori.types import Actions, Plans, Points, Rows, States

Dynamics = Callable[..., Tensor]
"""(state (B S), action (B A)) → next state (B S). A third required argument is the step t."""
Reward = Callable[..., Tensor]
"""(state (B S), action (B A)) → (B). A third required argument is the step t."""
Constraint = Callable[..., Tensor]
"""(state (B S), action (B A)) → (B m), to be ≤ 0. A third required argument is the step t."""
Value = Callable[[Tensor], Tensor]
"""state (B S) → (B)."""


def with_time(function: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The function as one of (state, action, t), whether or not it takes the step.

    It takes the step if its third positional argument is required or is called `t`.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # built in, without a signature
        return _Timeless(function)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [p for p in parameters if p.kind in kinds]
    if len(positional) >= 3 and (positional[2].default is inspect.Parameter.empty or positional[2].name == "t"):
        return function
    return _Timeless(function)


@dataclass(frozen=True)
class _Timeless:
    """A function of (state, action) that is also given the step."""

    function: Callable[..., Tensor]

    def __call__(self, state: Tensor, action: Tensor, t: Tensor) -> Tensor:
        return self.function(state, action)


class ReturnObjective(TrajectoryObjective):
    """cost = −(Σ_{t<H} γ^t R(z_t, a_t) + γ^H V(z_H)), Eq. 4 with a terminal value of the state.

    `state` z_0 (B Z), encoded once, before the solve. `first_step` is the step t of the first action, for dynamics and
    rewards that take it.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        reward: Reward,
        terminal_value: Value | None,
        state: States,
        horizon: int,
        action_dim: int,
        discount: float = 1.0,
        first_step: int | Tensor = 0,
    ):
        self.dynamics, self.reward, self.terminal_value = dynamics, reward, terminal_value
        self._next, self._reward = with_time(dynamics), with_time(reward)
        # A tensor, so that compiled code is the same for every step.
        self.first_step = torch.as_tensor(first_step, device=state.device)
        self.state, self.horizon, self.action_dim, self.discount = state, horizon, action_dim, discount

    def next(self, state: States, action: Actions, t: Tensor) -> States:
        """d(z, a)."""
        return self._next(state, action, t + self.first_step)

    def stage_cost(self, state: States, action: Actions, t: Tensor) -> Rows:
        """−R(z, a)."""
        return -self._reward(state, action, t + self.first_step)

    def terminal_cost(self, state: States) -> Rows:
        """−V(z), or zero without a terminal value."""
        return torch.zeros_like(state[..., 0]) if self.terminal_value is None else -self.terminal_value(state)

    def select(self, rows: Tensor) -> "ReturnObjective":
        """The same plan from some of the states."""
        return ReturnObjective(
            self.dynamics,
            self.reward,
            self.terminal_value,
            self.state[rows],
            self.horizon,
            self.action_dim,
            self.discount,
            self.first_step,
        )


class ActionReturnObjective(ReturnObjective):
    """cost = −(Σ_{t<H} γ^t R(z_t, a_t) + γ^H Q(z_H, a_H)), Eq. 4 as printed: the last action is optimised too.

    `action_value` Q: (state (B Z), action (B A)) → (B). There are `horizon` = H + 1 actions. Its last step is unlike the
    others, so ILQR does not apply.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        reward: Reward,
        action_value: Reward,
        state: States,
        horizon: int,
        action_dim: int,
        discount: float = 1.0,
    ):
        super().__init__(dynamics, reward, None, state, horizon, action_dim, discount)
        self.action_value = action_value

    def cost(self, x: Points) -> Rows:
        """Minus the return; the last action meets Q instead of R."""
        state, total, weight = self.state, torch.zeros_like(x[..., 0]), 1.0
        *actions, last = self.plan(x).unbind(-2)
        for t, action in zip(self.times().unbind(), actions, strict=False):
            total = total + weight * self._reward(state, action, t + self.first_step)
            state = self._next(state, action, t + self.first_step)
            weight = weight * self.discount
        return -(total + weight * self.action_value(state, last))

    staged = False

    def stage_cost(self, state: States, action: Actions, t: Tensor) -> Rows:
        """Refused: it depends on the step."""
        raise SolverError("ActionReturnObjective: the last step's cost is another; use a solver that needs no stages")

    def select(self, rows: Tensor) -> "ActionReturnObjective":
        """The same plan from some of the states."""
        return ActionReturnObjective(
            self.dynamics,
            self.reward,
            self.action_value,
            self.state[rows],
            self.horizon,
            self.action_dim,
            self.discount,
        )


class EnergyObjective(TrajectoryObjective):
    """cost = −Σ_{t<H} γ^t f(z_t, a_t), Eq. 7: a learned score of actions, with no meaning outside the plan.

    `dynamics` may be None for H = 1, where f scores one action or one whole chunk of actions.
    """

    def __init__(
        self,
        dynamics: Dynamics | None,
        energy: Reward,
        state: States,
        horizon: int,
        action_dim: int,
        discount: float = 1.0,
    ):
        if dynamics is None and horizon != 1:
            raise ShapeError(f"EnergyObjective: horizon {horizon} needs dynamics; without them the horizon must be 1.")
        self.dynamics, self.energy = dynamics, energy
        self.state, self.horizon, self.action_dim, self.discount = state, horizon, action_dim, discount

    def next(self, state: States, action: Actions, t: Tensor) -> States:
        """d(z, a); for H = 1 there is no next state to need."""
        return state if self.dynamics is None else self.dynamics(state, action)

    def stage_cost(self, state: States, action: Actions, t: Tensor) -> Rows:
        """−f(z, a)."""
        return -self.energy(state, action)

    def terminal_cost(self, state: States) -> Rows:
        """Zero."""
        return torch.zeros_like(state[..., 0])

    def select(self, rows: Tensor) -> "EnergyObjective":
        """The same plan from some of the states."""
        return EnergyObjective(
            self.dynamics, self.energy, self.state[rows], self.horizon, self.action_dim, self.discount
        )


@dataclass(frozen=True)
class Plan:
    """`actions` (B H A), differentiable as the planner's adjoint says and inside the box; `solution`, the solve itself."""

    actions: Plans
    solution: Solution

    @cached_property
    def states(self) -> Tensor:
        """The states s_0 … s_H that the plan leads through, (B H+1 S), differentiable as the actions are.

        `ILQR` computes them with feedback, so they hold for unstable dynamics too; for other solvers the actions are
        rolled out at the first look.
        """
        found = self.solution.differentiated.states
        if found is not None:
            return found
        objective = self.solution.problem.objective
        assert isinstance(objective, TrajectoryObjective)
        return objective.rollout(self.actions.flatten(1))

    @property
    def value(self) -> Rows:
        """The return of the plan, (B)."""
        return -self.solution.cost

    def shifted(self) -> Plans:
        """The plan one step later, last action repeated: where the next solve of a receding horizon starts, (B H A)."""
        actions = self.actions.detach()
        return torch.cat([actions[:, 1:], actions[:, -1:]], 1)


@dataclass(frozen=True)
class Planner:
    """A solver, an adjoint, a box and a budget: everything about planning except what is planned.

    TD-MPC is `Planner(MPPI(), Detached())`; DiffTORI is a gradient solver with `Unrolled()` or `Implicit()`.
    """

    solver: Solver = field(default_factory=ProjectedGradient)
    adjoint: Adjoint = field(default_factory=Implicit)
    box: Box = field(default_factory=Box)
    max_steps: int = 20
    tolerance: float | None = None
    compile: bool = False
    keep: Literal["best", "last"] = "best"

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
        """Solve from init_actions (B H A), projected onto the box first. `candidates` (K B H A) as for `solve`.

        Raises:
            ShapeError: the actions or candidates do not fit the objective's rows, horizon and action dimension.
            BoxError: the planner's bounds do not fit the actions.
            NonFiniteError: with `throw`, a row's cost or gradient is NaN or Inf.
        """
        expected = (objective.state.shape[0], objective.horizon, objective.action_dim)
        if tuple(init_actions.shape) != expected:
            raise ShapeError(
                f"Planner.plan: init_actions have shape {tuple(init_actions.shape)}, the objective wants (B H A) = {expected}."
            )
        if candidates is not None and tuple(candidates.shape[1:]) != expected:
            raise ShapeError(
                f"Planner.plan: candidates have shape {tuple(candidates.shape)}, the objective wants (K B H A) with "
                f"(B H A) = {expected}."
            )
        box = self.flat_box(init_actions)
        solution = solve(
            objective,
            box.project(init_actions.flatten(1)),
            solver=self.solver,
            adjoint=self.adjoint,
            box=box,
            max_steps=self.max_steps,
            tolerance=self.tolerance,
            keep=self.keep,
            candidates=None if candidates is None else candidates.flatten(2),
            generator=generator,
            history=history,
            compile=self.compile,
            augmented=augmented,
            multipliers=multipliers,
        )
        if throw:
            _raise_if_unsound(solution)
        return Plan(objective.plan(solution.x), solution)

    def flat_box(self, actions: Plans) -> Box:
        """Bounds given as numbers, per action (A), per step (H A) or per row (B H A), for the flat variables (H·A)."""

        def flat(bound: Bound, name: str) -> Bound:
            tensor = torch.as_tensor(bound, dtype=actions.dtype, device=actions.device)
            if tensor.dim() == 0:
                return tensor
            try:
                return tensor.expand(actions.shape if tensor.dim() == 3 else actions.shape[1:]).flatten(-2)
            except RuntimeError as error:
                raise BoxError(
                    f"Planner: {name} has shape {tuple(tensor.shape)}, which does not fit actions (B H A) = "
                    f"{tuple(actions.shape)}; give a number, (A), (H A) or (B H A)."
                ) from error

        return Box(flat(self.box.low, "low"), flat(self.box.high, "high"), self.box.inward)


def _raise_if_unsound(solution: Solution) -> None:
    rows = (solution.status == Status.NON_FINITE).nonzero().squeeze(-1).tolist()
    if rows:
        raise NonFiniteError(
            f"Planner.plan: the objective or its gradient is NaN or Inf in rows {rows[:8]} (of {len(solution.status)}); "
            "look for the network, or the state, that brings it in."
        )


def trajectory_objective(
    dynamics: Dynamics,
    reward: Reward,
    terminal_value: Value | None,
    state: States,
    horizon: int,
    action_dim: int,
    discount: float = 1.0,
    constraint: Constraint | None = None,
    terminal_constraint: Value | None = None,
    first_step: int = 0,
) -> ReturnObjective | ConstrainedTrajectory:
    """Minus the return, under constraints if there are any: what `plan` and `Controller` minimise."""
    objective = ReturnObjective(
        dynamics, reward, terminal_value, state, horizon, action_dim, discount, first_step=first_step
    )
    if constraint is None and terminal_constraint is None:
        return objective
    return ConstrainedTrajectory(
        objective, None if constraint is None else _later(with_time(constraint), objective.first_step), terminal_constraint
    )


def _later(function: Callable[[Tensor, Tensor, Tensor], Tensor], first: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda state, action, t: function(state, action, t + first)


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
    """Trajectory optimisation with known or learned dynamics, differentiable in everything that the callables use.

        max_{a_0 … a_{H−1}}  Σ_{t<H} γ^t reward(s_t, a_t) + γ^H terminal_value(s_H),   s_{t+1} = dynamics(s_t, a_t)

    Args:
        dynamics: (state (B S), action (B A)) → (B S).
        reward: (state (B S), action (B A)) → (B), maximised.
        terminal_value: state (B S) → (B), or None.
        state: where each of the B plans starts, (B S).
        init_actions: the first guess, (B H A); its shape sets the horizon.
        low, high: action bounds: numbers, (A), (H A) or (B H A).
        discount: γ.
        solver: `ProjectedGradient(window=5, polish=1)` unless given; `ILQR()` suits smooth known dynamics and long horizons.
        adjoint: how the plan is differentiated; `Implicit()` unless given.
        max_steps, tolerance, compile: as for `difftori.solver.solve`.

    Returns:
        Plan: `actions` (B H A) inside the bounds, `value` (B), `solution`.

    Raises:
        ShapeError, BoxError, ObjectiveError: wrong input.
    """
    if init_actions.dim() != 3:
        raise ShapeError(f"plan: init_actions have shape {tuple(init_actions.shape)}; give (B H A).")
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
    planner = Planner(
        ILQR() if solver is None else solver,
        Implicit() if adjoint is None else adjoint,
        Box(low, high),
        max_steps,
        tolerance,
        compile,
    )
    return planner.plan(objective, init_actions, augmented=augmented, multipliers=multipliers)
