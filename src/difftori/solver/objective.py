"""Objectives: B independent problems over x (B n), with one cost per row."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from difftori.errors import ShapeError
from difftori.solver.box import Box, number_like
from difftori.types import Actions, Plans, Points, PointSets, Residuals, Rows, States

RowSelection = Tensor


class Objective(ABC):
    """B independent minimisation problems. The cost is minimised: to maximise a return G, use cost = −G.

    Gradients of a solution flow into every tensor that `cost` uses, such as parameters or an encoded state.
    """

    @abstractmethod
    def cost(self, x: Points) -> Rows:
        """One cost per row, (B n) → (B). Row i of the cost may depend on row i of x only."""

    def costs(self, candidates: PointSets) -> Tensor | None:
        """Costs (K B) of K candidates for every row, (K B n), or None if only `cost` is defined, which vmap then batches. Default: None."""
        return None

    def value_and_grad(self, x: Points) -> tuple[Rows, Points] | None:
        """Cost (B) and gradient (B n) in closed form, or None: autograd then differentiates `cost`. Default: None.

        Both must be differentiable with respect to everything that `cost` is.
        """
        return None

    def select(self, rows: RowSelection) -> "Objective | None":
        """The same objective on some rows (indices), or None if the objective cannot be split. Default: None.

        If implemented, rows with NaN do not affect the parameter gradients of the other rows, and a solver can skip rows that
        have converged.
        """
        return None


class FunctionObjective(Objective):
    """A callable (B n) → (B) as an objective."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self.function = function

    def cost(self, x: Points) -> Tensor:
        """The value of the callable, unchecked: `solve` checks its shape and type."""
        return self.function(x)


class LeastSquaresObjective(Objective):
    """cost = ½‖residual(x)‖², for Gauss–Newton and Levenberg–Marquardt."""

    @abstractmethod
    def residual(self, x: Points) -> Residuals:
        """The r residuals of each row, (B n) → (B r)."""

    def cost(self, x: Points) -> Rows:
        """Half the sum of squared residuals."""
        return 0.5 * self.residual(x).square().sum(-1)


class TrajectoryObjective(Objective):
    """Single shooting: Σ_{t<H} γ^t c(s_t, a_t, t) + γ^H c_H(s_H) with s_{t+1} = next(s_t, a_t, t), over x = (a_0 … a_{H−1}).

    `state` (B S) is the start, `horizon` H, `action_dim` A, so n = H·A. The model is unrolled inside the cost, so it is not a
    constraint, and any solver applies. `ILQR` and the implicit gradient also use the structure.

    `t` is the step as an integer tensor (1), which broadcasts against rows: `reference[t]` is (1) or (1 S). Use `torch.where`,
    not `if` or `int(t)`, because the derivatives of all steps are computed at once by `torch.func.vmap`.
    """

    state: Tensor
    horizon: int
    action_dim: int
    discount: float
    staged: bool = True
    """Whether the cost is the sum above. Set it to False if a subclass overrides `cost`; its structure is then not used. Default: True."""

    @abstractmethod
    def next(self, state: States, action: Actions, t: Tensor) -> States:
        """The next state."""

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
        """The states s_0 … s_H of the actions x, (B H+1 S)."""
        states = [self.state]
        for t, action in zip(self.times().unbind(), self.plan(x).unbind(-2), strict=True):
            states.append(self.next(states[-1], action, t))
        return torch.stack(states, -2)


class ClampedObjective(Objective):
    """Another objective, evaluated at the nearest point of the box: bounds as in the release."""

    def __init__(self, inner: Objective, box: Box):
        self.inner, self.box = inner, box

    def cost(self, x: Points) -> Rows:
        """The inner cost at clamp(x)."""
        return self.inner.cost(self.clamp(x))

    def clamp(self, x: Points) -> Points:
        """The nearest point of the box."""
        return torch.clamp(x, number_like(self.box.low, x), number_like(self.box.high, x))

    def select(self, rows: RowSelection) -> "Objective | None":
        """The objective on some rows, or None if the inner objective cannot be split or the bounds differ between rows."""
        inner = self.inner.select(rows)
        shared = all(torch.as_tensor(bound).dim() < 2 for bound in (self.box.low, self.box.high))
        return ClampedObjective(inner, self.box) if inner is not None and shared else None


def positional_parameters(function: Callable[..., Tensor]) -> list[inspect.Parameter]:
    """The positional parameters of a function, or of the `forward` of a module. Empty if it has no signature, as built-in ones."""
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter for parameter in signature.parameters.values() if parameter.kind in kinds]


def with_time(function: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The function as a function of (state, action, t), whether or not it takes the step.

    The function takes the step if its third positional argument is required or is named `t`.
    """
    return function if takes_time(function, 2) else _Timeless(function)


def takes_time(function: Callable[..., Tensor], position: int) -> bool:
    """Whether the function takes the step at this position: the parameter there is required or is named `t`."""
    positional = positional_parameters(function)[position:]
    return bool(positional) and (positional[0].default is inspect.Parameter.empty or positional[0].name == "t")


@dataclass(frozen=True)
class _Timeless:
    """A function of (state, action), called with the step as an ignored third argument."""

    function: Callable[..., Tensor]

    def __call__(self, state: Tensor, action: Tensor, t: Tensor) -> Tensor:
        return self.function(state, action)


def is_timeless(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> bool:
    """Whether a function returned by `with_time` ignores the step."""
    return isinstance(function, _Timeless)


def as_objective(objective: "Objective | Callable[[Tensor], Tensor]") -> Objective:
    """Return an `Objective` unchanged, and wrap any other callable."""
    if isinstance(objective, Objective):
        return objective
    if callable(objective):
        return FunctionObjective(objective)
    raise ShapeError(
        f"solve: the objective is a {type(objective).__name__}. Fix: pass an Objective or a callable from x (B n) to cost (B)."
    )
