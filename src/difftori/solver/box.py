"""Bounds on the variables, one pair for each coordinate."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from difftori.errors import BoxError
from difftori.types import PointFlags, Points, PointSetFlags, PointSets, Rows

Bound = float | Tensor


@dataclass(frozen=True)
class Box:
    """The set low ≤ x ≤ high.

    `low` and `high` are numbers, or tensors that broadcast against (B n): (n), (1 n) or (B n). Either may be infinite.

    `inward` changes the derivative of projecting, and nothing else: exactly, what lies outside has none, so that an unrolled
    solve whose coordinates are held never learns to leave the bound. With it the gradient of a loss passes where
    descending it would bring the coordinate inside. A heuristic, like a straight-through estimator, for `Unrolled`.

    Raises:
        BoxError: where low ≥ high or a bound is NaN, naming the coordinate.
    """

    low: Bound = field(default=-1.0)
    high: Bound = field(default=1.0)
    inward: bool = False

    def __post_init__(self):
        low, high = torch.as_tensor(self.low).detach(), torch.as_tensor(self.high).detach()
        try:
            empty = ~(low < high)  # also catches NaN
        except RuntimeError as error:
            raise BoxError(
                f"Box: low has shape {tuple(low.shape)} and high {tuple(high.shape)}, which do not broadcast; "
                "give both one shape, such as (n)."
            ) from error
        if bool(empty.any()):
            where = tuple(empty.nonzero()[0].tolist())
            low, high = torch.broadcast_tensors(low, high)
            raise BoxError(
                f"Box: low {low[where].item():g} is not below high {high[where].item():g}"
                + (f" at coordinate {where}" if where else "")
                + "; give low < high everywhere (a variable with no room is not a variable: leave it out)."
            )

    def to(self, x: Tensor) -> "Box":
        """The same box with tensor bounds of x's dtype and device, shaped to broadcast against x (B n)."""
        low = torch.as_tensor(self.low, dtype=x.dtype, device=x.device).detach()
        high = torch.as_tensor(self.high, dtype=x.dtype, device=x.device).detach()
        for name, bound in (("low", low), ("high", high)):
            try:
                fits = torch.broadcast_shapes(bound.shape, x.shape) == x.shape
            except RuntimeError:
                fits = False
            if not fits:
                raise BoxError(
                    f"Box: {name} has shape {tuple(bound.shape)}, which does not broadcast to x (B n) = {tuple(x.shape)}; "
                    "give a number or a tensor (n) or (B n)."
                )
        return _Bounds(low, high, self.inward)

    def project(self, x: PointSets) -> PointSets:
        """The nearest point of the box, coordinate by coordinate. NaN stays NaN."""
        if self.inward:
            return _Inward.apply(x, torch.as_tensor(self.low).to(x), torch.as_tensor(self.high).to(x))
        return torch.minimum(torch.maximum(x, torch.as_tensor(self.low).to(x)), torch.as_tensor(self.high).to(x))

    def contains(self, x: PointSets, slack: float = 0.0) -> PointSetFlags:
        """Which coordinates lie inside, up to `slack`."""
        return (x >= torch.as_tensor(self.low).to(x) - slack) & (x <= torch.as_tensor(self.high).to(x) + slack)

    def held(self, x: Points, grad: Points) -> PointFlags:
        """Which coordinates the box holds: on a bound, with the descent direction −grad pointing outwards.

        The other coordinates are the free set, on which a solution is an ordinary stationary point.
        """
        low, high = torch.as_tensor(self.low).to(x), torch.as_tensor(self.high).to(x)
        return ((x <= low) & (grad > 0)) | ((x >= high) & (grad < 0))

    def projected_gradient(self, x: Points, grad: Points) -> Points:
        """The move x − P(x − grad): zero exactly at a first-order point of the box-constrained problem."""
        # Written as a clamp of the gradient: where |x| is large the difference above would round a small one to nothing.
        low, high = torch.as_tensor(self.low).to(x), torch.as_tensor(self.high).to(x)
        return torch.minimum(torch.maximum(grad, x - high), x - low)

    def stationarity(self, x: Points, grad: Points) -> Rows:
        """Largest coordinate of the projected gradient, per row."""
        return self.projected_gradient(x, grad).abs().amax(-1)

    def width(self, x: Points) -> Points:
        """The range high − low, broadcast to x; infinite where a side is open."""
        low, high = torch.as_tensor(self.low).to(x), torch.as_tensor(self.high).to(x)
        return (high - low).expand_as(x)


class _Inward(torch.autograd.Function):
    """Clamping whose backward pass lets through what would lead inside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(x, low, high)
        return torch.minimum(torch.maximum(x, low), high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,), (x, low, high) = grads, ctx.saved_tensors
        outwards = ((x > high) & (grad < 0)) | ((x < low) & (grad > 0))
        return torch.where(outwards, 0.0, grad), None, None


@dataclass(frozen=True)
class _Bounds(Box):
    """A box that has been checked already: tensor bounds, nothing to check again (and nothing to wait for on a GPU)."""

    def __post_init__(self):
        pass


UNBOUNDED = Box(-float("inf"), float("inf"))
