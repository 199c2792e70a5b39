"""Whether the derivative of an unrolled solve has reached that of the optimum, measured in its backward pass."""

from typing import Any

import torch
from torch import Tensor

from difftori.solver.box import Box
from difftori.solver.method import largest
from difftori.types import Points, RowFlags, Rows

SOLVED = 0.01
"""A row whose derivative is estimated to be off by a larger share counts as not solved."""


class Contraction:
    """The norm of a loss's gradient at the first unrolled iterate, as a share of that at the result.

    The optimum does not depend on where the solve started. The share that still does is, to first order, the relative
    error of the unrolled derivative: small for a solve that contracted in every direction that the loss asks for, and above 1
    where its steps amplify directions that they were not fitted to. A large share at any iterate between amplifies rounding.

    `unsolved` (B): rows whose derivative was off by more than `SOLVED` in any backward pass so far, or that have none.
    `quadratic`: one step of the solver solves a quadratic problem, so that its derivative needs no second one.
    """

    def __init__(self, box: Box, tolerance: float, quadratic: bool):
        self.box, self.tolerance, self.quadratic = box, tolerance, quadratic
        self.unsolved: RowFlags | None = None
        self._watches = False
        self._measured: RowFlags | None = None
        self._asked: Rows | None = None
        self._largest: Rows | None = None

    def watch(self, x: Points) -> None:
        """Measure at an iterate (B n) with a graph. The first call is for the one after the first step."""
        if x.requires_grad:
            x.register_hook(self._pass if self._watches else self._compare)
            self._watches = True

    def end(self, result: Points, before: Any, after: Any) -> Points:
        """The result (B n), whose backward passes are measured. `before`, `after`: the iteration's progress at its ends."""
        grad = torch.zeros_like(result) if after.state.grad is None else after.state.grad.detach()
        # At a corner of the box, a derivative of zero is right.
        self.unsolved = ~after.improved & ~self.box.held(result.detach(), grad).all(-1)
        # The length of a step of the size of the tolerance may be chosen by rounding.
        far = largest(after.x.detach() - before.x.detach()) > 10 * self.tolerance * after.length[0]
        self._measured = ~(far & (after.steps <= before.steps + 1) & self.quadratic)
        if not result.requires_grad:
            return result
        result = result.view_as(result)  # a tensor of its own: the first iterate may be the result
        result.register_hook(self._begin)
        return result

    def _begin(self, grad: Tensor) -> None:
        self._asked = self._largest = _norm(grad)

    def _pass(self, grad: Tensor) -> None:
        if self._largest is not None:
            self._largest = torch.maximum(self._largest, _norm(grad))

    def _compare(self, grad: Tensor) -> None:
        if self._asked is None or self._largest is None or self._measured is None or self.unsolved is None:
            return
        off = torch.maximum(_norm(grad) * self._measured, _ROUNDINGS * torch.finfo(grad.dtype).eps * self._largest)
        self.unsolved = self.unsolved | ~(off <= SOLVED * self._asked)
        self._asked = self._largest = None


_ROUNDINGS = 100.0
"""Roundings of the largest gradient that may add up."""


def _norm(grad: Tensor) -> Rows:
    return torch.linalg.vector_norm(grad.detach(), dim=-1)
