"""Objectives with constraints other than bounds. Their cost is the augmented Lagrangian at given multipliers (see augmented_lagrangian.py)."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.func import vmap

from difftori.errors import ObjectiveError
from difftori.solver.derivatives import pullback, row_jacobian, unit_vectors
from difftori.solver.objective import FunctionObjective, Objective, RowSelection, TrajectoryObjective
from difftori.types import Actions, Plans, Points, Rows, States

Found = TypeVar("Found")


class Multipliers(NamedTuple):
    """The multipliers `values` and the weights ρ `weight`, (B M): one of each for every constraint.

    `first_weight` (B M): the weights of the first solve, which limit those of later, warm-started ones. None: `weight`.
    """

    values: Tensor
    weight: Tensor
    first_weight: Tensor | None = None

    @property
    def initial(self) -> Tensor:
        """`first_weight`, or `weight` where there is none."""
        return self.weight if self.first_weight is None else self.first_weight

    def select(self, rows: RowSelection) -> "Multipliers":
        """The multipliers of some rows."""
        first = None if self.first_weight is None else self.first_weight[rows]
        return Multipliers(self.values[rows], self.weight[rows], first)

    def updated(self, constraints: Tensor, equality: Tensor) -> Tensor:
        """max(0, λ + ρ g) and ν + ρ h at constraint values (B M). `equality` (M) marks the equations."""
        moved = self.values + self.weight * constraints
        return torch.where(equality, moved, moved.clamp_min(0))


class Constrained(ABC):
    """Interface of an objective with constraints, in addition to its (augmented) cost."""

    multipliers: Multipliers | None

    @property
    @abstractmethod
    def plain(self) -> Objective:
        """The objective without its constraints."""

    @abstractmethod
    def constraints(self, x: Points, states: Tensor | None) -> Tensor:
        """All constraint values at x, (B M). `states` (B H+1 S): the states of the trajectory, or None to compute them."""

    @abstractmethod
    def equality(self, x: Points) -> Tensor:
        """Which of the M constraints are equations, (M)."""

    @abstractmethod
    def steepness(self, x: Points) -> Tensor:
        """The length of each constraint's own gradient (B M), which has the constraint's unit: zero or NaN if it has none at x."""

    @abstractmethod
    def lagrangian(self, weights: Tensor) -> Objective:
        """J + weights·constraints, with weights (B M) fixed."""

    @abstractmethod
    def with_multipliers(self, multipliers: Multipliers) -> "Objective":
        """The same objective with other multipliers."""


class ConstrainedFunction(Objective, Constrained):
    """An objective with constraints on x: `inequality` g(x) ≤ 0, (B n) → (B m), and `equality_of` h(x) = 0, (B n) → (B p)."""

    def __init__(
        self,
        inner: Objective,
        inequality: Callable[[Tensor], Tensor] | None,
        equality: Callable[[Tensor], Tensor] | None,
        multipliers: Multipliers | None = None,
    ):
        self.inner, self.inequality, self.equality_of, self.multipliers = inner, inequality, equality, multipliers

    @property
    def plain(self) -> Objective:
        """The objective without its constraints."""
        return self.inner

    def constraints(self, x: Points, states: Tensor | None = None) -> Tensor:
        """Values of the inequalities, then of the equations, (B m+p)."""
        parts = []
        for name, function in (("inequality", self.inequality), ("equality", self.equality_of)):
            if function is not None:
                parts.append(_checked(function(x), x, name))
        return torch.cat(parts, -1)

    def equality(self, x: Points) -> Tensor:
        """Which constraints are equations. Inequalities come first."""
        with torch.no_grad():
            counts = [0 if f is None else f(x).shape[-1] for f in (self.inequality, self.equality_of)]
        return torch.arange(sum(counts), device=x.device) >= counts[0]

    def cost(self, x: Points) -> Rows:
        """The augmented cost."""
        assert self.multipliers is not None
        cost, begin = self.inner.cost(x), 0
        for name, function in (("inequality", self.inequality), ("equality", self.equality_of)):
            if function is not None:
                values = _checked(function(x), x, name)
                here = slice(begin, begin + values.shape[-1])
                given, weight = self.multipliers.values[..., here], self.multipliers.weight[..., here]
                cost = cost + augmentation(values, given, weight, name == "equality")
                begin = here.stop
        return cost

    def steepness(self, x: Points) -> Tensor:
        """The lengths of the gradients with respect to x, (B m+p)."""
        return self.jacobian(x).norm(dim=-1)

    def jacobian(self, x: Points) -> Tensor:
        """Derivatives of all constraints with respect to x, (B m+p n)."""
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            return row_jacobian(self.constraints(point), point).detach()

    def lagrangian(self, weights: Tensor) -> Objective:
        """J + weights·(g, h), with weights (B m+p) fixed."""
        return FunctionObjective(lambda x: self.inner.cost(x) + (weights * self.constraints(x)).sum(-1))

    def with_multipliers(self, multipliers: Multipliers) -> "ConstrainedFunction":
        """The same objective with other multipliers."""
        return ConstrainedFunction(self.inner, self.inequality, self.equality_of, multipliers)

    def select(self, rows: RowSelection) -> None:
        """None: the objective cannot be split, because the constraints may close over per-row data."""


StageConstraint = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(state (B S), action (B A), t) → (B m), must be ≤ 0."""


class ConstrainedTrajectory(TrajectoryObjective, Constrained):
    """A trajectory objective with constraints.

    `stage`: g(s_t, a_t, t) ≤ 0, (B m), for t < H. `terminal`: constraints on s_H, (B k). `linear`: the cost is the
    Lagrangian J + λ·g without the augmentation; default: False.
    """

    def __init__(
        self,
        inner: TrajectoryObjective,
        stage: StageConstraint | None,
        terminal: Callable[[Tensor], Tensor] | None,
        multipliers: Multipliers | None = None,
        linear: bool = False,
    ):
        self.inner, self.stage, self.terminal = inner, stage, terminal
        self.multipliers, self.linear = multipliers, linear
        self.state, self.horizon, self.action_dim = inner.state, inner.horizon, inner.action_dim
        self.discount = inner.discount

    @property
    def plain(self) -> TrajectoryObjective:
        """The objective without its constraints."""
        return self.inner

    def next(self, state: States, action: Actions, t: Tensor) -> States:
        """The next state of the inner objective."""
        return self.inner.next(state, action, t)

    def stage_cost(self, state: States, action: Actions, t: Tensor) -> Rows:
        """The augmented cost of a step. Constraints are not discounted."""
        cost = self.inner.stage_cost(state, action, t)
        if self.stage is None:
            return cost
        values = _checked(self.stage(state, action, t), state, "constraint")
        count = values.shape[-1]

        def here(given: Tensor) -> Tensor:
            stages = given[:, : self.horizon * count].unflatten(1, (self.horizon, count))
            return stages.index_select(1, t.reshape(1)).squeeze(1)

        added = self._added(values, here(self._given.values), here(self._given.weight))
        return cost + (added if self.discount == 1.0 else added * self.discount ** (-t))

    def terminal_cost(self, state: States) -> Rows:
        """The augmented cost of the last state."""
        cost = self.inner.terminal_cost(state)
        if self.terminal is None:
            return cost
        values = _checked(self.terminal(state), state, "terminal_constraint")
        last = slice(self._given.values.shape[1] - values.shape[-1], None)
        added = self._added(values, self._given.values[:, last], self._given.weight[:, last])
        return cost + added * self.discount ** (-self.horizon)

    def constraints(self, x: Points, states: Tensor | None = None) -> Tensor:
        """Values of the stage constraints, step by step, then of the terminal constraints, (B H·m+k).

        Those of the first state alone are at most 0: no action can change them.
        """
        states = self.inner.rollout(x) if states is None else states
        plan, parts = self.plan(x), []
        if (stage := self.stage) is not None:
            each = vmap(lambda s, a, t: _checked(stage(s, a, t), s, "constraint"), (1, 1, 0), randomness="same")
            values = each(states[:, :-1], plan, self.times()).movedim(0, 1)
            first = torch.where(self._unchangeable(stage, plan[:, 0]), values[:, 0].clamp(max=0.0), values[:, 0])
            parts.append(torch.cat([first.unsqueeze(1), values[:, 1:]], 1).flatten(1))
        if self.terminal is not None:
            parts.append(_checked(self.terminal(states[:, -1]), x, "terminal_constraint"))
        return torch.cat(parts, -1)

    def _unchangeable(self, stage: StageConstraint, action: Actions) -> Tensor:
        """Which stage constraints of the first step (B m) have the same value for very different actions too.

        The actions differ in size and in the ratios of their components, so that a function of a difference or a share changes too.
        All values are computed in one call: another kernel would round them differently.
        """
        with torch.no_grad():
            numbers = torch.arange(_PROBES * action.shape[-1], dtype=action.dtype, device=action.device).view(
                _PROBES, 1, -1
            )
            sizes = 10.0 ** torch.arange(_PROBES, dtype=action.dtype, device=action.device).view(_PROBES, 1, 1)
            moves = sizes * (1.0 + 1.7 * numbers).cos() * action.abs().clamp(min=1.0)
            moves = torch.cat([torch.zeros_like(moves[:1]), moves])
            start = self.times()[0]
            found = vmap(lambda move: stage(self.state, action + move, start), randomness="same")(moves)
            return (found == found[:1]).all(0)

    def equality(self, x: Points) -> Tensor:
        """False for every constraint: there are no equations."""
        count = 0
        with torch.no_grad():
            if self.stage is not None:
                values = self.stage(self.state, self.plan(x)[:, 0], self.times()[0])
                count += self.horizon * _checked(values, x, "constraint").shape[-1]
            if self.terminal is not None:
                count += _checked(self.terminal(self.state), x, "terminal_constraint").shape[-1]
        return torch.zeros(count, dtype=torch.bool, device=x.device)

    def steepness(self, x: Points) -> Tensor:
        """The lengths of the gradients with respect to (s_t, a_t), for each stage constraint the largest of all steps, (B H·m+k)."""
        with torch.no_grad():
            stage, last = self.jacobians(self.inner.rollout(x), self.plan(x))
        stage = stage.norm(dim=-1).amax(1, keepdim=True).expand(stage.shape[:3])
        return torch.cat([stage.flatten(1), last.norm(dim=-1)], 1)

    def jacobians(self, states: Tensor, plan: Plans) -> tuple[Tensor, Tensor]:
        """Derivatives of the stage constraints with respect to (s_t, a_t), (B H m N), and of the terminal ones with respect to s_H,
        (B k S), along states (B H+1 S) and actions (B H A).
        """
        size = states.shape[-1]

        def jacobian(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
            value, pull = pullback(function, at)
            return vmap(pull)(unit_vectors(value, value.shape[-1])).movedim(0, 1)

        stage = plan.new_zeros(*plan.shape[:2], 0, size + plan.shape[-1])
        if (constraint := self.stage) is not None:
            pairs = torch.cat([states[:, :-1], plan], -1)
            stage = vmap(
                lambda pair, t: jacobian(lambda z: constraint(z[..., :size], z[..., size:], t), pair), in_dims=(1, 0)
            )(pairs, self.times()).movedim(0, 1)
        last = plan.new_zeros(len(plan), 0, size)
        return stage, last if self.terminal is None else jacobian(self.terminal, states[:, -1])

    def split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Split values (B H·m+k) into those of the stages (B H m) and the terminal ones (B k)."""
        if self.stage is None:
            return values.new_zeros(len(values), self.horizon, 0), values
        if self.terminal is None:
            return values.unflatten(1, (self.horizon, -1)), values[:, :0]
        with torch.no_grad():
            last = self.terminal(self.state).shape[-1]
        return values[:, : values.shape[1] - last].unflatten(1, (self.horizon, -1)), values[:, values.shape[1] - last :]

    def _added(self, values: Tensor, multipliers: Tensor, weight: Tensor) -> Rows:
        return (multipliers * values).sum(-1) if self.linear else augmentation(values, multipliers, weight)

    @property
    def _given(self) -> Multipliers:
        assert self.multipliers is not None
        return self.multipliers

    def with_multipliers(self, multipliers: Multipliers) -> "ConstrainedTrajectory":
        """The same objective with other multipliers."""
        return ConstrainedTrajectory(self.inner, self.stage, self.terminal, multipliers, self.linear)

    def lagrangian(self, weights: Tensor) -> TrajectoryObjective:
        """J + weights·g, with weights (B H·m+k) fixed."""
        multipliers = self._given._replace(values=weights)
        return ConstrainedTrajectory(self.inner, self.stage, self.terminal, multipliers, linear=True)

    def shifted(self, multipliers: Multipliers) -> Multipliers:
        """The multipliers for the plan shifted by one step. The last step is repeated."""
        stage, terminal = self.split(multipliers.values)
        stage = torch.cat([stage[:, 1:], stage[:, -1:]], 1)
        return multipliers._replace(values=torch.cat([stage.flatten(1), terminal], 1))

    def select(self, rows: RowSelection) -> "Objective | None":
        """The objective on some rows, or None if the inner objective cannot be split."""
        inner = self.inner.select(rows)
        if not isinstance(inner, TrajectoryObjective):
            return None
        multipliers = None if self.multipliers is None else self.multipliers.select(rows)
        return ConstrainedTrajectory(inner, self.stage, self.terminal, multipliers, self.linear)


_PROBES = 7
"""Number of other actions that tell which constraints depend on the first action. Each is ten times as far away as the one before."""


def augmentation(values: Tensor, multipliers: Tensor, weight: Tensor, equality: bool = False) -> Rows:
    """Σ (max(0, λ + ρ g)² − λ²)/2ρ, or Σ (ν h + ρ h²/2), of constraint values, multipliers and weights (B m), (B)."""
    moved = multipliers + weight * values
    moved = moved if equality else moved.clamp_min(0)
    return ((moved.square() - multipliers.square()) / (2 * weight)).sum(-1)


def violation(values: Tensor, equality: Tensor) -> Rows:
    """The largest violation of each row, (B): max(g, |h|, 0)."""
    return torch.where(equality, values.abs(), values.clamp_min(0)).amax(-1)


def _checked(values: Tensor, like: Tensor, name: str) -> Tensor:
    if not isinstance(values, Tensor) or values.dim() != 2 or values.shape[0] != like.shape[0] or not values.shape[1]:
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ObjectiveError(
            f"{name}: returned {shape} for {like.shape[0]} rows, but must return (B m): m ≥ 1 values per row, each ≤ 0 "
            f"(= 0 for an equality). Fix: for one constraint, add a last dimension: value.unsqueeze(-1)."
        )
    if values.dtype != like.dtype:
        raise ObjectiveError(
            f"{name}: returned {values.dtype}, but the problem is in {like.dtype}. Fix: return by how much the limit is exceeded, "
            f"such as x - limit instead of x > limit, in {like.dtype}."
        )
    return values


STIFFER = {torch.float32: 10.0, torch.float64: 1e3}
"""Factor by which the weight of active constraints is increased in the linear system of a derivative, so that few rounds suffice. A
larger one would leave float32 no digits for the directions that keep the constraints."""
_FEW, _MOST = 6, 60


def keep_active(
    solve: Callable[[Tensor], Found], broken: Callable[[Found], Tensor], multipliers: Tensor, weight: Tensor
) -> tuple[Found, Tensor]:
    """Solve K d = v with J d = 0 for active constraints, by rounds of multipliers y (B M). Returns d and y. Six rounds are enough
    unless the weight is light.

    `solve` computes K⁻¹(v − Jᵀy), and `broken` computes J d (B M). K already contains the constraints with `weight` (B M).
    """
    found = solve(multipliers)
    left, unit = broken(found), weight.sqrt()
    small = 1e3 * torch.finfo(weight.dtype).eps * (unit * left).abs().amax(-1)
    for count in range(1, _MOST + 1):
        multipliers = multipliers + weight * left
        found = solve(multipliers)
        left = broken(found)
        if count % _FEW == 0 and _all((unit * left).abs().amax(-1) <= small):
            break
    return found, multipliers


def _all(flags: Tensor) -> bool:
    """Whether all are true; assumed for several gradients at once (`is_grads_batched`), whose values cannot be read."""
    try:
        return bool(flags.all())
    except RuntimeError:
        return True
