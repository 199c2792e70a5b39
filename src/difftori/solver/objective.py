"""What is minimised: B independent problems over x (B n), one cost per row."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from difftori.errors import ShapeError
from difftori.solver.box import Box
from difftori.types import Actions, Plans, Points, Residuals, Rows, States

RowSelection = Tensor


class Objective(ABC):
    """B independent minimisation problems. Cost is minimised, so a return G enters as cost = −G.

    Gradients of a solution flow into every tensor that `cost` uses: parameters, an encoded state, anything.
    """

    @abstractmethod
    def cost(self, x: Points) -> Rows:
        """One cost per row, (B n) → (B). Row i may depend on row i of x only."""

    def select(self, rows: RowSelection) -> "Objective | None":
        """The same objective on some rows (indices), or None where the objective cannot be split.

        An objective that can keeps a row of NaN from touching the others' parameter gradients, and lets a solver stop
        working on rows that have converged.
        """
        return None


class FunctionObjective(Objective):
    """A plain callable (B n) → (B) as an objective."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self.function = function

    def cost(self, x: Points) -> Tensor:
        """The callable's value, whatever its shape: `solve` checks it and says what is wrong."""
        return self.function(x)


class LeastSquaresObjective(Objective):
    """cost = ½‖residual(x)‖², for Gauss–Newton and Levenberg–Marquardt."""

    @abstractmethod
    def residual(self, x: Points) -> Residuals:
        """The r residuals per row, (B n) → (B r)."""

    def cost(self, x: Points) -> Rows:
        """Half the sum of squared residuals."""
        return 0.5 * self.residual(x).square().sum(-1)


class TrajectoryObjective(Objective):
    """Single shooting: Σ_{t<H} γ^t c(s_t, a_t, t) + γ^H c_H(s_H) with s_{t+1} = next(s_t, a_t, t), over x = (a_0 … a_{H−1}).

    `state` (B S) is the start, `horizon` H, `action_dim` A, so n = H·A. The model is unrolled inside the cost, so it is
    no constraint, and any solver applies; `ILQR` and the implicit gradient also use the structure.

    `t` is the step as an integer tensor (1), which broadcasts against rows: `reference[t]` is (1) or (1 S). Use `torch.where`,
    not `if` and not `int(t)`, because derivatives of all steps are computed at once by `torch.func.vmap`.
    """

    state: Tensor
    horizon: int
    action_dim: int
    discount: float
    staged: bool = True
    """Whether the cost is the sum above. False: one that overrides `cost`, so that its structure must not be used."""

    @abstractmethod
    def next(self, state: States, action: Actions, t: Tensor) -> States:
        """The state one step later."""

    @abstractmethod
    def stage_cost(self, state: States, action: Actions, t: Tensor) -> Rows:
        """Cost of step t, undiscounted."""

    @abstractmethod
    def terminal_cost(self, state: States) -> Rows:
        """Cost of the last state, undiscounted."""

    def plan(self, x: Points) -> Plans:
        """The variables x (B n) as actions (B H A)."""
        return x.unflatten(-1, (self.horizon, self.action_dim))

    def times(self) -> Tensor:
        """The steps 0 … H − 1, (H 1)."""
        return torch.arange(self.horizon, device=self.state.device).unsqueeze(-1)

    def cost(self, x: Points) -> Rows:
        """The discounted sum over the rollout."""
        state, total, weight = self.state, torch.zeros_like(x[..., 0]), 1.0
        for t, action in zip(self.times().unbind(), self.plan(x).unbind(-2), strict=True):
            total = total + weight * self.stage_cost(state, action, t)
            state = self.next(state, action, t)
            weight = weight * self.discount
        return total + weight * self.terminal_cost(state)

    def rollout(self, x: Points) -> Tensor:
        """The states s_0 … s_H that x leads to, (B H+1 S)."""
        states = [self.state]
        for t, action in zip(self.times().unbind(), self.plan(x).unbind(-2), strict=True):
            states.append(self.next(states[-1], action, t))
        return torch.stack(states, -2)


class ClampedObjective(Objective):
    """Another objective at the nearest point of the box: bounds as the release has them."""

    def __init__(self, inner: Objective, box: Box):
        self.inner, self.box = inner, box

    def cost(self, x: Points) -> Rows:
        """The inner cost at clamp(x)."""
        return self.inner.cost(
            torch.clamp(x, torch.as_tensor(self.box.low).to(x), torch.as_tensor(self.box.high).to(x))
        )

    def select(self, rows: RowSelection) -> "Objective | None":
        """Some rows, where the inner objective can be split and the bounds are the same for all of them."""
        inner = self.inner.select(rows)
        shared = all(torch.as_tensor(bound).dim() < 2 for bound in (self.box.low, self.box.high))
        return ClampedObjective(inner, self.box) if inner is not None and shared else None


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


def as_objective(objective: "Objective | Callable[[Tensor], Tensor]") -> Objective:
    """An `Objective` as it is; any other callable wrapped."""
    if isinstance(objective, Objective):
        return objective
    if callable(objective):
        return FunctionObjective(objective)
    raise ShapeError(
        f"solve: the objective is a {type(objective).__name__}; give an Objective or a callable from x (B n) to cost (B)."
    )
