"""When a row has converged: its distance to the optimum is small compared with its length scale."""

import torch
from torch import Tensor

from difftori.solver.interface import Problem, State, largest
from difftori.solver.lengths import Lengths
from difftori.types import Points, RowFlags, Rows


class Convergence:
    """The test of convergence of one solve, in K units at once: those of x and, where ranges differ, those of the ranges (K = 2).

    A gradient per newton is small beside one per radian, however far the optimum is. The distance is the gradient divided by the
    curvature along recent steps, unless the solver estimates it (`State.distance`). `stops`: whether any row stops before the last
    step; a `tolerance` of 0 for all rows means none.
    """

    def __init__(self, problem: Problem, x: Points, tolerance: float | Rows):
        self.problem, self.tolerance = problem, tolerance
        self.stops = isinstance(tolerance, Tensor) or tolerance > 0
        self.lengths = Lengths(problem.box, x)

    def norm(self, x: Points, state: State) -> Tensor:
        """The distance from a first-order point (K B): the solver's estimate as a share of the length scale (K = 1), or the largest
        gradient coordinate without an active bound.
        """
        if state.distance is not None:
            return (state.distance.detach().abs() / self.lengths.of(x.detach())).amax(-1).unsqueeze(0)
        if state.grad is None:
            return torch.full_like(state.cost.detach(), float("inf")).unsqueeze(0)
        return self._of_gradients(self.problem.box.pull(x.detach(), state.grad.detach()))

    def close(self, norm: Tensor, curvature: Tensor, length: Tensor) -> RowFlags:
        """Which rows have converged, (B). All arguments are (K B)."""
        close = norm <= self.tolerance * curvature * length if self.stops else norm <= 0
        return close[0] if len(close) == 1 else close.all(0)

    def length(self, x: Points, state: State) -> Tensor:
        """The length scale of x in each of the K units, (K B); 1 if it is not used: for a tolerance of 0, and for estimated
        distances, which are shares of it.
        """
        if not self.stops or state.distance is not None:
            return torch.ones_like(x[:, 0]).unsqueeze(0)
        natural = self.lengths.natural(x)
        if self.lengths.units is None:
            return natural.unsqueeze(0)
        movable = torch.where(self.problem.box.fixed(x), 0.0, x)
        return torch.stack([natural, largest(movable / self.lengths.units).clamp_min(1.0)])

    def first_curvature(self, x: Points, state: State, norm: Tensor, length: Tensor) -> Tensor:
        """The curvature along the first gradient (K B), by one evaluation nearby. If it is not positive, the result is zero, so that
        no row counts as converged. Without this, a start at the optimum could not be recognised.
        """
        if state.distance is not None:
            return torch.ones_like(norm)
        if not self.stops or state.grad is None:
            return torch.zeros_like(norm)
        grad = state.grad.detach()
        step = torch.finfo(x.dtype).eps ** 0.5 * length[0] / torch.where(norm[0] > 0, norm[0], 1.0)
        trial = self.problem.project(x - step[:, None] * grad)
        _, there = self.problem.evaluate(trial)
        s, y = trial - x, there - grad
        curvature = self._of_gradients(y) / self._of_lengths(s)
        valid = ((s * y).sum(-1) > 0) & torch.isfinite(curvature)
        return torch.where(valid, curvature, 0.0)

    def learned(self, curvature: Tensor, step: Points, change: Points, length: Tensor) -> Tensor:
        """The curvature ‖Δ∇J‖/‖Δx‖ (K B), updated with a step and the change of the gradient. `length` (K B) after the step.

        A small step along a flat direction at most halves it; after a step of half the length scale or more, the old value is
        discarded.
        """
        move = self._of_lengths(step)
        latest = self._of_gradients(change) / move
        known = torch.maximum(latest, (0.5 - move / length).clamp_min(0.0) * curvature)
        # A step of length zero gives NaN or infinity and is ignored.
        return torch.where(torch.isfinite(latest), known, curvature)

    def _of_gradients(self, v: Points) -> Tensor:
        """The largest |v| in each of the K units, (K B), for a gradient."""
        return largest(v).unsqueeze(0) if self.lengths.units is None else _stacked(v, v * self.lengths.units)

    def _of_lengths(self, v: Points) -> Tensor:
        """The same for a change of x."""
        return largest(v).unsqueeze(0) if self.lengths.units is None else _stacked(v, v / self.lengths.units)


def _stacked(natural: Points, scaled: Points) -> Tensor:
    return torch.stack([largest(natural), largest(scaled)])
