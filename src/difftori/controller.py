"""Model predictive control: plan, return the first action, shift the plan by one step, and plan again from there."""

import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from difftori.errors import NonFiniteError, ShapeError, SolverError
from difftori.planning import Constraint, Dynamics, Plan, Planner, Reward, Value, check_model, trajectory_objective
from difftori.solver import (
    ILQR,
    AugmentedLagrangian,
    Box,
    ConstrainedTrajectory,
    Detached,
    Multipliers,
    Problem,
    Solver,
    Status,
)
from difftori.solver.box import Bound
from difftori.types import Plans, RowFlags


@dataclass(frozen=True)
class Timing:
    """Statistics of the calls since the last `reset` of all rows: their number, milliseconds and solver steps per call, and
    `fallbacks`, the number of rows that used the action of an earlier plan.
    """

    calls: int
    median_ms: float
    p95_ms: float
    longest_ms: float
    median_steps: float
    fallbacks: int


_GROWN, _HEAVY = 1e4, 1e3
"""Shares of a constraint's first weight: above `_GROWN`, a row that is infeasible begins again; above `_HEAVY`, the weight of a row that
is feasible is reduced."""


class Controller:
    """Receding-horizon control of B systems at once: `action = controller(state)`.

        max over a_0 … a_{H−1}  Σ_{t<H} γ^t reward(s_t, a_t) + γ^H terminal_value(s_H),  s_{t+1} = dynamics(s_t, a_t),
        subject to  low ≤ a_t ≤ high,  constraint(s_t, a_t) ≤ 0,  terminal_constraint(s_H) ≤ 0

    Each call solves this problem. It warm-starts from the previous plan, shifted by one step and corrected by the solver's
    feedback for the measured state, and from the previous multipliers of the constraints. If the solve of a row fails (NaN or
    Inf), the row takes the action of its last valid plan. `status` is the status of the last solve of each row.

    Functions may take the step as a further argument t, which counts from the last `reset`: `reference[t]`.

    Args:
        dynamics, reward, terminal_value, constraint, terminal_constraint, discount: as for `difftori.plan`.
        horizon: H, the number of planned steps.
        action_dim: A.
        low, high: bounds: numbers, (A) or (H A).
        init_actions: the initial guess of a first solve, (A), (H A) or (B H A); default: the middle of the box, or 0.
        solver: default: `ILQR()`.
        max_steps: the largest number of solver steps of a call with a previous plan.
        first_steps: the largest number of solver steps of a call without a previous plan.
        tolerance: a solve ends when the estimated distance to the optimum is at most this share of the action's range.
        augmented: settings of the constraints; default: at most 6 rounds per warm call, violations up to 1e-4 allowed.
        compile: compile rollouts and derivatives (the first call takes some 20 s).
    """

    def __init__(
        self,
        dynamics: Dynamics,
        reward: Reward,
        terminal_value: Value | None = None,
        *,
        horizon: int,
        action_dim: int,
        low: Bound = -1.0,
        high: Bound = 1.0,
        constraint: Constraint | None = None,
        terminal_constraint: Value | None = None,
        discount: float = 1.0,
        init_actions: Tensor | float | None = None,
        solver: Solver | None = None,
        max_steps: int = 10,
        first_steps: int = 200,
        tolerance: float = 1e-4,
        augmented: AugmentedLagrangian | None = None,
        compile: bool = False,
    ):
        if horizon < 1 or action_dim < 1:
            raise ShapeError(
                f"Controller: invalid horizon={horizon}, action_dim={action_dim}. Fix: use at least 1 for both."
            )
        if max_steps < 1 or first_steps < 1:
            raise SolverError(
                f"Controller: invalid max_steps={max_steps}, first_steps={first_steps}. Fix: use at least 1 for both."
            )
        self._model = (dynamics, reward, terminal_value, constraint, terminal_constraint, discount)
        self._shape = (horizon, action_dim)
        self._box, self._first_guess = Box(low, high), init_actions
        self._solver, self._tolerance, self._compile = ILQR() if solver is None else solver, tolerance, compile
        self._steps, self._first_steps = max_steps, first_steps
        self._augmented = AugmentedLagrangian(tolerance=1e-4) if augmented is None else augmented
        self._warm_rounds = replace(self._augmented, rounds=6) if augmented is None else augmented
        self.reset()

    def reset(self, rows: RowFlags | None = None) -> None:
        """Discard the plans of all rows or of some (a mask (B)). Their next call is a first solve, at step 0 if all are reset.

        If only some are reset, a solve of all rows as usual follows it, so that the others do not notice.
        """
        if rows is None or self._actions is None:
            self._actions: Plans | None = None
            self._multipliers: Multipliers | None = None
            self._feedback: tuple[Tensor, Tensor] | None = None
            self._fresh: RowFlags | None = None
            self._size: int | None = None
            self.plan: Plan | None = None
            self.status: Tensor | None = None
            self.step, self.fallbacks = 0, 0
            self._ms: deque[float] = deque(maxlen=10_000)
            self._taken: deque[float] = deque(maxlen=10_000)
            return
        rows = torch.as_tensor(rows, device=self._actions.device)
        if rows.shape != self._actions.shape[:1] or rows.dtype != torch.bool:
            raise ShapeError(
                f"Controller.reset: rows has shape {tuple(rows.shape)} and type {rows.dtype}. "
                f"Fix: use a boolean mask ({len(self._actions)},)."
            )
        if not bool(rows.any()):
            return
        self._fresh = rows if self._fresh is None else self._fresh | rows
        if bool(self._fresh.all()):
            self.reset()

    @torch.no_grad()
    def __call__(self, state: Any) -> Any:
        """The action for a state: (B S) → (B A), or (S) → (A). Returns a tensor for a tensor, an array for an array.

        Raises:
            ShapeError: the state has another shape, precision or device than before, or is not floating point; bounds or `init_actions` do not fit.
            NonFiniteError: the first solve of a row produced NaN or Inf, so there is no earlier plan to use.
        """
        began = time.perf_counter()
        given = torch.as_tensor(state)
        if not given.is_floating_point() or given.dim() not in (1, 2) or 0 in given.shape:
            raise ShapeError(
                f"Controller: the state is {tuple(given.shape)} {given.dtype}. Fix: use floats, (S) or (B S)."
            )
        states = given if given.dim() == 2 else given[None]
        if self._actions is not None and (states.dtype, states.device) != (self._actions.dtype, self._actions.device):
            raise ShapeError(
                f"Controller: the state is {states.dtype} on {states.device}, but the last call had {self._actions.dtype} on "
                f"{self._actions.device}. Fix: give the same, or reset() before another one."
            )
        if self._size not in (None, states.shape[-1]):
            raise ShapeError(
                f"Controller: the state has {states.shape[-1]} numbers, but the last call had {self._size}. "
                "Fix: give the same state, or reset() before another one."
            )
        if self._actions is not None and len(self._actions) != len(states):
            raise ShapeError(
                f"Controller: the state has {len(states)} rows, but the last call had {len(self._actions)}. Fix: reset() before another batch."
            )
        plan = self._solve(states)
        action = plan.actions[:, 0]
        self._taken.append(float(plan.solution.steps.max()))
        self._ms.append(1e3 * (time.perf_counter() - began))
        action = action if given.dim() == 2 else action[0]
        return action if isinstance(state, Tensor) else action.numpy()

    def timing(self) -> Timing:
        """The duration of the calls, including the first, which has no previous plan."""
        if not self._ms:
            return Timing(0, 0.0, 0.0, 0.0, 0.0, 0)
        ms, steps = torch.tensor(list(self._ms)), torch.tensor(list(self._taken))
        return Timing(
            len(ms),
            float(ms.median()),
            float(ms.quantile(0.95)),
            float(ms.max()),
            float(steps.median()),
            self.fallbacks,
        )

    def _solve(self, states: Tensor) -> Plan:
        dynamics, reward, value, constraint, terminal_constraint, discount = self._model
        objective = trajectory_objective(
            dynamics, reward, value, states, *self._shape, discount, constraint, terminal_constraint, self.step
        )
        if self._actions is None:
            check_model(objective)
        fresh = torch.ones_like(states[:, 0], dtype=torch.bool) if self._actions is None else self._fresh
        start = self._start(objective, states, fresh)
        if fresh is None:
            plan = self._solved(objective, start, self._multipliers)
        else:
            plan = self._solved_first(objective, start, fresh)
            if not bool(fresh.all()):  # a start for the solve of all rows, so that the others are as without it
                start, first = torch.where(fresh[:, None, None], plan.actions, start), plan.solution
                plan = self._solved(objective, start, _chosen(fresh, first.multipliers, self._multipliers))
                steps = plan.solution.steps + torch.where(fresh, first.steps, 0)
                plan = replace(plan, solution=replace(plan.solution, steps=steps))
        lost = plan.solution.status == Status.NON_FINITE
        actions = plan.actions
        if bool(lost.any()):
            self.fallbacks += int(lost.sum())
            actions = torch.where(lost[:, None, None], start, actions)
            plan = replace(plan, actions=actions)
        self.plan, self.status = plan, plan.solution.status
        self._move_on(objective, plan, actions)
        return plan

    def _solved(self, objective: Any, start: Plans, multipliers: Multipliers | None) -> Plan:
        """A solve from a plan of before."""
        solver = replace(self._solver, hold=False) if isinstance(self._solver, ILQR) else self._solver
        planner = Planner(solver, Detached(), self._box, self._steps, self._tolerance, self._compile)
        return planner.plan(objective, start, augmented=self._warm_rounds, multipliers=multipliers)

    def _solved_first(self, objective: Any, start: Plans, fresh: RowFlags) -> Plan:
        """A first solve, for the rows `fresh`. Raises NonFiniteError if one of these is NaN or Inf."""
        planner = Planner(self._solver, Detached(), self._box, self._first_steps, self._tolerance, self._compile)
        plan = planner.plan(objective, start, augmented=self._augmented)
        lost = fresh & (plan.solution.status == Status.NON_FINITE)
        if bool(lost.any()):
            rows = lost.nonzero().squeeze(-1).tolist()
            raise NonFiniteError(
                f"Controller: the objective or its derivative is NaN or Inf in rows {rows[:8]} (of {len(lost)}), which have no "
                "earlier plan. Fix: check the state of these rows, and functions without a derivative there, such as sqrt at 0."
            )
        return plan

    def _start(self, objective: Any, states: Tensor, fresh: RowFlags | None) -> Plans:
        """The previous plan, shifted by one step and corrected for the measured state. Rows without a plan use the initial guess."""
        guess = self._guess(states)
        if self._actions is None:
            return guess
        actions = self._actions
        if self._feedback is not None:
            actions = self._corrected(objective, states, actions)
        return actions if fresh is None else torch.where(fresh[:, None, None], guess, actions)

    def _guess(self, states: Tensor) -> Plans:
        shape = (len(states), *self._shape)
        low, high = (_spread(name, getattr(self._box, name), states, shape) for name in ("low", "high"))
        if self._first_guess is not None:
            first = _spread("init_actions", self._first_guess, states, shape)
        else:
            middle = (low + high) / 2
            first = torch.where(torch.isfinite(middle), middle, 0.0)
        return first.maximum(low).minimum(high)

    def _bounded(self, multipliers: Multipliers, status: Tensor) -> Multipliers:
        """The multipliers for the next call. In a row that no action makes feasible, they would grow without limit.

        A heavy weight hides the cost, so it is reduced once the row is feasible, whose multipliers are then about right.
        """
        infeasible, lost = status == Status.INFEASIBLE, status == Status.NON_FINITE
        first = multipliers.initial
        again = (lost | (infeasible & (multipliers.weight >= _GROWN * first).any(-1)))[:, None]
        heavy = ~infeasible[:, None] & (multipliers.weight > _HEAVY * first)
        weight = torch.where(heavy, 1e-2 * multipliers.weight, multipliers.weight)
        values = torch.where(again, 0.0, multipliers.values)
        return multipliers._replace(values=values, weight=torch.where(again, first, weight))

    def _corrected(self, objective: Any, states: Tensor, actions: Plans) -> Plans:
        """The actions corrected by feedback for the current state. Unchanged if that leads to NaN or Inf."""
        assert self._feedback is not None
        assert isinstance(self._solver, ILQR)
        nominal, gains = self._feedback
        if isinstance(objective, ConstrainedTrajectory) and self._multipliers is not None:
            objective = objective.with_multipliers(self._multipliers)
        box = Planner(box=self._box).flat_box(actions).to(actions.flatten(1))
        corrected = self._solver.corrected(
            objective, Problem(objective, box, compile=self._compile), actions, nominal, gains
        )
        sound = torch.isfinite(corrected).all(-1).all(-1)
        return torch.where(sound[:, None, None], corrected, actions)

    def _move_on(self, objective: Any, plan: Plan, actions: Plans) -> None:
        self._actions = torch.cat([actions[:, 1:], actions[:, -1:]], 1)
        self._fresh, self._size = None, objective.state.shape[-1]
        self.step += 1
        multipliers = plan.solution.multipliers
        if multipliers is not None and isinstance(objective, ConstrainedTrajectory):
            self._multipliers = objective.shifted(self._bounded(multipliers, plan.solution.status))
        self._feedback = None
        gains = self._solver.feedback(plan.solution.state) if isinstance(self._solver, ILQR) else None
        if gains is not None:
            sound = torch.isfinite(gains).all(-1).all(-1).all(-1)
            gains = torch.where(sound[:, None, None, None], gains, 0.0)
            states = plan.states
            nominal = torch.cat([states[:, 1:], states[:, -1:]], 1)
            self._feedback = nominal, torch.cat([gains[:, 1:], torch.zeros_like(gains[:, :1])], 1)


def _chosen(rows: RowFlags, own: Multipliers | None, others: Multipliers | None) -> Multipliers | None:
    """The multipliers `own` in `rows`, and `others` elsewhere."""
    if own is None or others is None:
        return None
    pairs = (own.values, others.values), (own.weight, others.weight), (own.initial, others.initial)
    return Multipliers(*(torch.where(rows[:, None], mine, theirs) for mine, theirs in pairs))


def _spread(name: str, values: Bound, states: Tensor, shape: tuple[int, int, int]) -> Plans:
    """The numbers for all rows, steps and actions (B H A)."""
    numbers = torch.as_tensor(values).to(states)
    try:
        return numbers.expand(shape)
    except RuntimeError as error:
        raise ShapeError(
            f"Controller: {name} has shape {tuple(numbers.shape)}, which does not fit actions (B H A) = {shape}. "
            "Fix: use a number, (A), (H A) or (B H A)."
        ) from error
