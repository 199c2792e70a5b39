"""Bounds on the variables."""

import math
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from difftori.errors import BoxError
from difftori.types import PointFlags, Points, PointSetFlags, PointSets, Rows

Bound = float | Tensor
UNEVEN = 8.0
"""Ranges that differ by this factor are taken for ranges in different units."""
_OPEN = 1e12
"""A wider range says nothing about the scale of its variable."""


@dataclass(frozen=True)
class Box:
    """The set low ≤ x ≤ high.

    A variable with low = high is fixed: it has that value and derivative 0, and the other variables are solved.

    Args:
        low, high: numbers, or tensors that broadcast against (B n): (n), (1 n) or (B n). Either may be infinite.
        inward: change the derivative of the projection, and nothing else. The exact derivative outside the box is zero, so
            training through an unrolled solve cannot move a coordinate off its bound. With `inward=True`, the gradient of a
            loss passes if descending it would move the coordinate into the box. This is a heuristic for `Unrolled`, similar
            to a straight-through estimator. Default: False.

    Raises:
        BoxError: low > high, a bound is NaN, or both are the same infinity. The message names the coordinate.
    """

    low: Bound = field(default=-1.0)
    high: Bound = field(default=1.0)
    inward: bool = False
    fixes: bool = field(default=False, init=False, repr=False, compare=False)
    """Whether any variable is fixed."""
    uneven: bool = field(default=False, init=False, repr=False, compare=False)
    """Whether the ranges of the variables of a row differ by a factor of 8 or more (see `spans`). Fixed variables do not count."""

    scaled: bool = field(default=False, init=False, repr=False, compare=False)
    """Whether the range of any variable is not 2 (see `spans`). Fixed variables do not count."""

    def __post_init__(self):
        if not (isinstance(self.low, int | float) and isinstance(self.high, int | float)):
            self._check_tensors()
            return
        if not self.low <= self.high or (self.low == self.high and math.isinf(self.low)):  # also catches NaN
            raise BoxError(_empty(self.low, self.high, ()))
        object.__setattr__(self, "fixes", self.low == self.high)
        object.__setattr__(
            self, "scaled", self.low < self.high and self.high - self.low < _OPEN and self.high - self.low != 2
        )

    def _check_tensors(self) -> None:
        low, high = _numbers("low", self.low), _numbers("high", self.high)
        try:
            empty = ~(low <= high) | ((low == high) & torch.isinf(low))  # also catches NaN
        except RuntimeError as error:
            raise BoxError(
                f"Box: low has shape {tuple(low.shape)} and high has shape {tuple(high.shape)}, which do not broadcast. "
                "Fix: use the same shape for both, such as (n)."
            ) from error
        width, fixed = _spans(high - low), low == high
        scaled = (width != 2) & ~fixed
        narrow, wide = torch.where(fixed, torch.inf, width), torch.where(fixed, 0.0, width)
        if width.dim() and width.numel():
            narrow, wide = narrow.amin(-1), wide.amax(-1)
        one_synchronisation = torch.stack([empty.any(), fixed.any(), (wide >= UNEVEN * narrow).any(), scaled.any()])
        inverted, fixes, uneven, scaled = one_synchronisation.tolist()
        object.__setattr__(self, "fixes", fixes)
        object.__setattr__(self, "uneven", uneven)
        object.__setattr__(self, "scaled", scaled)
        if inverted:
            where = tuple(empty.nonzero()[0].tolist())
            low, high = torch.broadcast_tensors(low, high)
            raise BoxError(_empty(low[where].item(), high[where].item(), where))

    def to(self, x: Tensor) -> "Box":
        """The same box with tensor bounds of x's dtype and device, shaped to broadcast against x (B n)."""
        low, high = number_like(self.low, x).detach(), number_like(self.high, x).detach()
        for name, bound in (("low", low), ("high", high)):
            try:
                fits = bound.dim() == 0 or torch.broadcast_shapes(bound.shape, x.shape) == x.shape
            except RuntimeError:
                fits = False
            if not fits:
                raise BoxError(
                    f"Box: {name} has shape {tuple(bound.shape)}, which does not broadcast to x (B n) = {tuple(x.shape)}. "
                    "Fix: use a number or a tensor (n) or (B n)."
                )
        return _checked(low, high, self)

    def select(self, rows: Tensor, x: Points) -> "Box":
        """The box of some rows (indices) of x."""
        low, high = (number_like(bound, x).expand_as(x)[rows] for bound in (self.low, self.high))
        return _checked(low, high, self)

    def project(self, x: PointSets) -> PointSets:
        """The nearest point of the box, coordinate by coordinate. NaN is unchanged."""
        if self.fixes:  # first, so a fixed variable has no derivative
            x = torch.where(self.fixed(x), number_like(self.low, x), x)
        if self.inward:
            return _Inward.apply(x, number_like(self.low, x), number_like(self.high, x))
        return torch.minimum(torch.maximum(x, number_like(self.low, x)), number_like(self.high, x))

    def contains(self, x: PointSets, slack: float = 0.0) -> PointSetFlags:
        """Which coordinates lie inside the box, up to `slack`. Default: `slack=0.0`."""
        return (x >= number_like(self.low, x) - slack) & (x <= number_like(self.high, x) + slack)

    def held(self, x: Points, grad: Points) -> PointFlags:
        """Which coordinates are fixed, or have an active bound: on the bound, with the descent direction −grad pointing outwards.

        The other coordinates form the free set, where a solution is an ordinary stationary point. A coordinate within a few
        roundings of a bound counts as on it.
        """
        low, high = self._edges(x)
        return ((x <= low) & (grad > 0)) | ((x >= high) & (grad < 0)) | self.fixed(x)

    def fixed(self, x: PointSets) -> PointSetFlags:
        """Which coordinates are fixed: low equals high."""
        if not self.fixes:
            return torch.zeros_like(x, dtype=torch.bool)
        return (number_like(self.low, x) == number_like(self.high, x)).expand_as(x)

    def _edges(self, x: Points) -> tuple[Tensor, Tensor]:
        """The values from which a coordinate counts as on its lower or upper bound."""
        return _edges(number_like(self.low, x), number_like(self.high, x))

    def projected_gradient(self, x: Points, grad: Points) -> Points:
        """The difference x − P(x − grad): zero exactly at a first-order point of the box-constrained problem."""
        # Computed as a clamp of the gradient: if |x| is large, the difference above would round a small gradient to zero.
        low, high = number_like(self.low, x), number_like(self.high, x)
        return torch.minimum(torch.maximum(grad, x - high), x - low)

    def pull(self, x: Points, grad: Points) -> Points:
        """The gradient, with zero for coordinates with an active bound: zero exactly at a first-order point.

        Unlike the projected gradient it is not limited by the width of the box, so it is proportional to the scale of the cost.
        """
        low, high = self._edges(x)
        pull = torch.where(x <= low, grad.clamp_max(0), grad)
        return torch.where(x >= high, pull.clamp_min(0), pull)

    def stationarity(self, x: Points, grad: Points) -> Rows:
        """The largest gradient coordinate without an active bound, per row: zero exactly at a first-order point."""
        return torch.linalg.vector_norm(self.pull(x, grad), float("inf"), -1)

    def narrowest(self, x: Points, unbounded: float) -> Rows:
        """The narrowest range of each row's variables, (B). An open range counts as `unbounded`; fixed variables do not count."""
        width = self.width(x)
        width = torch.where(torch.isfinite(width), width, unbounded)
        narrowest = torch.where(self.fixed(x), float("inf"), width).amin(-1)
        return torch.where(torch.isfinite(narrowest), narrowest, unbounded)

    def room(self, x: Points) -> Rows:
        """Half the narrowest range of each row's variables, at most 1, (B)."""
        return self.narrowest(x, 2.0).clamp_max(2.0) / 2.0

    def width(self, x: Points) -> Points:
        """The range high − low, broadcast to x. Infinite if a side is open."""
        low, high = number_like(self.low, x), number_like(self.high, x)
        return (high - low).expand_as(x)

    def spans(self, x: Points) -> Points:
        """The ranges as measures of scale: 2 if they are open or above 1e12."""
        return _spans(self.width(x))


class _Inward(torch.autograd.Function):
    """Clamping whose backward pass keeps the gradients that lead into the box."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        inside = torch.clamp(x, low, high)
        ctx.save_for_backward(x - inside)
        return inside

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,), (excess,) = grads, ctx.saved_tensors
        return grad.masked_fill(excess * grad < 0, 0.0), None, None


def _empty(low: float, high: float, where: tuple[int, ...]) -> str:
    place = f" at coordinate {where}" if where else ""
    return f"Box: no finite number lies between low {low:g} and high {high:g}{place}. Fix: use low ≤ high everywhere (low = high fixes a variable)."


def _numbers(name: str, bound: Bound) -> Tensor:
    if isinstance(bound, Tensor) and bound.requires_grad and torch.is_grad_enabled():
        warnings.warn(
            f"Box: {name} requires a gradient, but none flows into bounds. Fix: pass {name}.detach(), or make the limit a constraint, "
            "which is differentiated.",
            stacklevel=5,
        )
    try:
        return torch.as_tensor(bound).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise BoxError(
            f"Box: {name}={bound!r} is not a number or a tensor. Fix: for a variable without bounds, low=-math.inf and high=math.inf."
        ) from error


def number_like(value: float | Tensor, x: Tensor) -> Tensor:
    """A number or tensor as a tensor with the dtype and device of x. A number is filled in on the device, without a copy."""
    if isinstance(value, int | float):
        return torch.full((), float(value), dtype=x.dtype, device=x.device)
    return torch.as_tensor(value).to(x)


def _spans(width: Tensor) -> Tensor:
    return torch.where(width < _OPEN, width, 2.0)


def _edges(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    slack = 4 * torch.finfo(low.dtype).eps
    # An infinite bound becomes NaN here, so no coordinate is on it.
    return low + slack * low.abs(), high - slack * high.abs()


@dataclass(frozen=True)
class _Bounds(Box):
    """A box with tensor bounds that are already checked. It checks nothing and does not synchronise with a GPU."""

    def __post_init__(self):
        pass

    @cached_property
    def _touching(self) -> tuple[Tensor, Tensor]:
        assert isinstance(self.low, Tensor)
        assert isinstance(self.high, Tensor)
        return _edges(self.low, self.high)

    def _edges(self, x: Points) -> tuple[Tensor, Tensor]:
        low, high = self._touching
        return low.to(x), high.to(x)


def _checked(low: Tensor, high: Tensor, like: Box) -> Box:
    bounds = _Bounds(low, high, like.inward)
    object.__setattr__(bounds, "fixes", like.fixes)
    object.__setattr__(bounds, "uneven", like.uneven)
    object.__setattr__(bounds, "scaled", like.scaled)
    return bounds


UNBOUNDED = Box(-float("inf"), float("inf"))
