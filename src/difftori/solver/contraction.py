"""Whether the derivative of an unrolled solve has reached that of the optimum, measured in its backward pass."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor  # pyright: ignore[reportMissingImports]

from difftori.solver.box import Box
from difftori.solver.interface import choose
from difftori.types import Points, RowFlags, Rows

MAX_ERROR = 0.01
"""A row whose derivative is estimated to be off by a larger share counts as not solved."""
_ROUNDINGS = 100.0
"""Roundings of the largest gradient that may add up."""


class _Backward(NamedTuple):
    """A loss's gradient (B n) at the result and at the start, and its largest coordinates at any iterate between."""

    asked: Points
    left: Points
    largest: Points

    def norms(self) -> tuple[Rows, Rows]:
        """The norm at the start, or that of roundings between if it is greater, and the norm at the result, (B)."""
        asked, left, largest = (torch.linalg.vector_norm(part, dim=-1) for part in self)
        return torch.maximum(left, _ROUNDINGS * torch.finfo(left.dtype).eps * largest), asked

    def worse(self, other: "_Backward") -> "_Backward":
        """In each row, the pass of which the greater share is left."""
        (left, asked), (left_other, asked_other) = self.norms(), other.norms()
        worse = ~(left * asked_other <= left_other * asked)  # also if it is NaN
        return _Backward(*(choose(worse, one, two) for one, two in zip(self, other, strict=True)))


class Contraction:
    """A loss's gradient at the start of the steps with a graph, as a share of that at the result.

    The optimum does not depend on where the solve started. The share that still does is the relative error of the unrolled derivative:
    small for a solve that contracted in every direction that the loss asks for, and above 1 where its steps amplify directions that
    they were not fitted to. H⁻¹ turns both into derivatives. A large gradient at any iterate between amplifies rounding.
    """

    def __init__(self, box: Box):
        self.box = box
        self._stale: RowFlags | None = None
        self._worst: _Backward | None = None
        self._now: tuple[Points, Points] | None = None

    def begin(self, x: Points, grad: Points, sound: RowFlags) -> Points:
        """The start x (B n), to be measured. It gets a part of ∇J(x) of weight zero, because a backward pass reaches only tensors that depend
        on what it differentiates by.
        """
        start = x + 0.0 * choose(sound, grad, grad.detach().nan_to_num(0.0, 0.0, 0.0))
        start.register_hook(self._finish)
        return start

    def watch(self, x: Points) -> None:
        """Measure at an iterate (B n)."""
        if x.requires_grad:
            x.register_hook(self._pass)

    def end(self, result: Points, progress: Any) -> Points:
        """The result (B n) of an iteration that ends with this progress. Its backward passes are measured."""
        grad = torch.zeros_like(result) if progress.state.grad is None else progress.state.grad.detach()
        # At a corner of the box, a derivative of zero is right.
        self._stale = ~progress.improved & ~self.box.held(result.detach(), grad).all(-1)
        if not result.requires_grad:
            return result
        result = result.view_as(result)  # a tensor of its own: the first iterate may be the result
        result.register_hook(self._begin)
        return result

    def unsolved(self, inverse: Callable[[Points], Points]) -> RowFlags:
        """Rows (B) whose derivative was off in any backward pass so far, or that have none. `inverse` computes H⁻¹v on the free set."""
        assert self._stale is not None
        if self._worst is None:
            return self._stale
        left, asked = _Backward(*map(inverse, self._worst)).norms()
        return self._stale | ~(left <= MAX_ERROR * asked)

    def _begin(self, grad: Tensor) -> None:
        if not (is_batchedtensor(grad) or is_legacy_batchedtensor(grad)):  # several passes at once are not measured
            self._now = grad.detach(), grad.detach().abs()

    def _pass(self, grad: Tensor) -> None:
        if self._now is not None:
            asked, largest = self._now
            self._now = asked, torch.maximum(largest, grad.detach().abs())

    def _finish(self, grad: Tensor) -> None:
        if self._now is not None:
            asked, largest = self._now
            latest, self._now = _Backward(asked, grad.detach(), largest), None
            self._worst = latest if self._worst is None else latest.worse(self._worst)
