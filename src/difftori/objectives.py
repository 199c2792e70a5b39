"""Trajectory objectives: the return of Eq. 4 and the energy of Eq. 7.

    RL (Eq. 4):  a(θ) = argmax Σ_{t<H} γ^t R(z_t, a_t) + γ^H Q(z_H),   z_{t+1} = d(z_t, a_t)
    IL (Eq. 7):  a(θ) = argmax Σ_{t<H} γ^t f(z_t, a_t),                z_{t+1} = d(z_t, a_t)

(Wan et al., 2024, "DiffTORI", arXiv 2402.05421.) The model is unrolled inside the objective and is not a constraint.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from difftori.errors import ObjectiveError, ShapeError, SolverError
from difftori.solver import ConstrainedTrajectory, TrajectoryObjective
from difftori.solver.objective import is_timeless, takes_time, with_time
from difftori.types import Actions, Points, PointSets, Rows, States

Dynamics = Callable[..., Tensor]
"""(state (B S), action (B A)) → next state (B S). A third required argument is the step t."""
Reward = Callable[..., Tensor]
"""(state (B S), action (B A)) → (B). A third required argument is the step t."""
Constraint = Callable[..., Tensor]
"""(state (B S), action (B A)) → (B m), must be ≤ 0. A third required argument is the step t."""
Value = Callable[..., Tensor]
"""state (B S) → (B), or (B k) for constraints. A second required argument is the step t."""


@dataclass(frozen=True, eq=False)
class ReturnObjective(TrajectoryObjective):
    """cost = −(Σ_{t<H} γ^t R(z_t, a_t) + γ^H V(z_H)), Eq. 4 with a terminal value that depends on the state alone.

    `state`: z_0 (B Z), encoded once before the solve. `first_step`: the step t of the first action, for functions that take
    it. `stacked`: the functions take any leading dimensions (…), t broadcasts against them, and no row has
    tensors of its own in them. Then the rewards of all steps, (H B), are one evaluation, and so are the candidates of a
    sampling solver, (K B). Default: False.
    """

    dynamics: Dynamics
    reward: Reward
    terminal_value: Value | None
    state: States
    horizon: int
    action_dim: int
    discount: float = 1.0
    first_step: int | Tensor = 0
    stacked: bool = False
    _weights: Tensor = field(init=False, repr=False)
    _timed: bool = field(init=False, repr=False)

    def __post_init__(self):
        _accept_time(self)
        if not isinstance(self.first_step, Tensor):
            # A tensor, so that the same compiled code is used for every step; filled on the device, without a copy.
            first = torch.full((), self.first_step, dtype=torch.long, device=self.state.device)
            object.__setattr__(self, "first_step", first)
        object.__setattr__(self, "_timed", self.terminal_value is not None and takes_time(self.terminal_value, 1))
        exponents = torch.arange(self.horizon, dtype=self.state.dtype, device=self.state.device)
        object.__setattr__(self, "_weights", self.discount**exponents)

    def cost(self, x: Points) -> Rows:
        """Minus the return."""
        return self._stacked_cost(x) if self.stacked else super().cost(x)

    def costs(self, candidates: PointSets) -> Tensor | None:
        """Minus the returns of K plans for every row, (K B n) → (K B), with `stacked`."""
        return self._stacked_cost(candidates) if self.stacked else None

    def _stacked_cost(self, x: Tensor) -> Tensor:
        """The same cost of (… n): the model step by step, then the rewards of all steps at once."""
        times, actions = self.times(), x.unflatten(-1, (self.horizon, self.action_dim)).movedim(-2, 0)
        latest = self.state.expand(*x.shape[:-1], self.state.shape[-1])
        states = []
        for t, action in zip(times.unbind(), actions.unbind(), strict=True):
            states.append(latest)
            latest = self._next(latest, action, t)
        rewards = self.reward_at(torch.stack(states), actions, times.view(-1, *(1,) * (x.dim() - 1)))
        total = (self._weights.view(-1, *(1,) * (x.dim() - 1)) * rewards).sum(0)
        if self.terminal_value is not None:
            total = torch.add(total, self.value_at(latest), alpha=self.discount**self.horizon)
        return -total

    def next(self, state: States, action: Actions, t: Tensor) -> States:
        """d(z, a)."""
        return self._next(state, action, t)

    def stage_cost(self, state: States, action: Actions, t: Tensor) -> Rows:
        """−R(z, a)."""
        return -self.reward_at(state, action, t)

    def _next(self, state: Tensor, action: Tensor, t: Tensor) -> Tensor:
        return self.dynamics(state, action, t if is_timeless(self.dynamics) else t + self.first_step)

    def reward_at(self, state: Tensor, action: Tensor, t: Tensor) -> Tensor:
        """R(z, a) of step t."""
        return self.reward(state, action, t if is_timeless(self.reward) else t + self.first_step)

    def terminal_cost(self, state: States) -> Rows:
        """−V(z), or zero if there is no terminal value."""
        return torch.zeros_like(state[..., 0]) if self.terminal_value is None else -self.value_at(state)

    def value_at(self, state: Tensor) -> Tensor:
        """V(z_H)."""
        assert self.terminal_value is not None
        if not self._timed:
            return self.terminal_value(state)
        return _last(self.terminal_value, self.first_step + self.horizon, state)

    def select(self, rows: Tensor) -> "ReturnObjective":
        """The same objective for some of the rows."""
        return replace(self, state=self.state[rows])


@dataclass(frozen=True, eq=False)
class ActionReturnObjective(TrajectoryObjective):
    """cost = −(Σ_{t<H} γ^t R(z_t, a_t) + γ^H Q(z_H, a_H)), Eq. 4 as printed: the last action is optimised too.

    `action_value` Q: (state (B Z), action (B A)) → (B). There are `horizon` = H + 1 actions. The last step has a different
    cost, so ILQR does not apply.
    """

    dynamics: Dynamics
    reward: Reward
    action_value: Reward
    state: States
    horizon: int
    action_dim: int
    discount: float = 1.0
    staged = False

    def __post_init__(self):
        _accept_time(self)

    def cost(self, x: Points) -> Rows:
        """Minus the return. The last action is an argument of Q instead of R."""
        state, total, weight = self.state, torch.zeros_like(x[..., 0]), 1.0
        *actions, last = self.plan(x).unbind(-2)
        for t, action in zip(self.times().unbind(), actions, strict=False):
            total = total + weight * self.reward(state, action, t)
            state = self.dynamics(state, action, t)
            weight = weight * self.discount
        return -(total + weight * self.action_value(state, last))

    def next(self, state: States, action: Actions, t: Tensor) -> States:
        """d(z, a)."""
        return self.dynamics(state, action, t)

    def stage_cost(self, state: States, action: Actions, t: Tensor) -> Rows:
        """Raise SolverError: the cost depends on the step."""
        raise SolverError(
            "ActionReturnObjective: the last step has a different cost. Fix: use a solver that needs no stages, not ILQR."
        )

    def terminal_cost(self, state: States) -> Rows:
        """Zero."""
        return torch.zeros_like(state[..., 0])

    def select(self, rows: Tensor) -> "ActionReturnObjective":
        """The same objective for some of the rows."""
        return replace(self, state=self.state[rows])


@dataclass(frozen=True, eq=False)
class EnergyObjective(TrajectoryObjective):
    """cost = −Σ_{t<H} γ^t f(z_t, a_t), Eq. 7: a learned score of actions, without a meaning outside the optimisation.

    `dynamics` may be None for H = 1, where f scores one action or one chunk of actions. `cost_and_grad` may then give −f and its
    gradient with respect to the action in closed form.
    """

    dynamics: Dynamics | None
    energy: Reward
    state: States
    horizon: int
    action_dim: int
    discount: float = 1.0
    cost_and_grad: Callable[[States, Actions], tuple[Rows, Actions]] | None = None

    def __post_init__(self):
        if self.dynamics is None and self.horizon != 1:
            raise ShapeError(
                f"EnergyObjective: horizon={self.horizon} needs dynamics. Fix: pass dynamics, or use horizon=1."
            )

    def cost(self, x: Points) -> Rows:
        """The discounted sum over the rollout."""
        return -self.energy(self.state, x) if self.horizon == 1 else super().cost(x)

    def value_and_grad(self, x: Points) -> tuple[Rows, Points] | None:
        """−f and its gradient, for H = 1 and if `cost_and_grad` is given."""
        return self.cost_and_grad(self.state, x) if self.cost_and_grad is not None and self.horizon == 1 else None

    def next(self, state: States, action: Actions, t: Tensor) -> States:
        """d(z, a). Not used for H = 1."""
        return state if self.dynamics is None else self.dynamics(state, action)

    def stage_cost(self, state: States, action: Actions, t: Tensor) -> Rows:
        """−f(z, a)."""
        return -self.energy(state, action)

    def terminal_cost(self, state: States) -> Rows:
        """Zero."""
        return torch.zeros_like(state[..., 0])

    def select(self, rows: Tensor) -> "EnergyObjective":
        """The same objective for some of the rows."""
        return replace(self, state=self.state[rows])


def _accept_time(objective: ReturnObjective | ActionReturnObjective) -> None:
    object.__setattr__(objective, "dynamics", with_time(objective.dynamics))
    object.__setattr__(objective, "reward", with_time(objective.reward))


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
    """Minus the return, with constraints if given: the objective of `plan` and `Controller`.

    Raises ObjectiveError for a discount that is negative or not finite, or 0 with constraints.
    """
    constrained = constraint is not None or terminal_constraint is not None
    if not 0 <= discount < math.inf or (constrained and discount == 0):
        why = (
            "must be above 0, because constraints are not discounted"
            if discount == 0
            else "must be finite and at least 0"
        )
        raise ObjectiveError(
            f"discount={discount} {why}. Fix: for example discount=1.0, or horizon 1 for the next reward only."
        )
    objective = ReturnObjective(
        dynamics, reward, terminal_value, state, horizon, action_dim, discount, first_step=first_step
    )
    if not constrained:
        return objective
    if terminal_constraint is not None and takes_time(terminal_constraint, 1):
        terminal_constraint = partial(_last, terminal_constraint, objective.first_step + horizon)
    return ConstrainedTrajectory(
        objective,
        None if constraint is None else partial(_shifted, with_time(constraint), objective.first_step),
        terminal_constraint,
    )


def _last(function: Value, t: int | Tensor, state: States) -> Tensor:
    return function(state, torch.as_tensor(t).reshape(1))


def _shifted(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], first: int | Tensor, state: States, action: Actions, t: Tensor
) -> Tensor:
    return function(state, action, t + first)
