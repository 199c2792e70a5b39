"""Units and length scales of the variables, by the ranges of the box.

`range_units` are the units in which curvatures of states and actions are compared. `Lengths` tells what counts as a small change:
variables in different units, such as newtons beside radians, are told apart by their ranges. Ranges that differ by less than a factor
of 8 count as one scale.
"""

from functools import cached_property

import torch
from torch import Tensor

from difftori.solver.box import UNEVEN, Box
from difftori.solver.interface import largest
from difftori.types import PointFlags, Points, Rows


def range_units(box: Box, x: Points) -> Points | None:
    """Half the range of each variable (B n); 1 for open ranges and for fixed variables. None if that is 1 for all."""
    return torch.where(box.fixed(x), 1.0, 0.5 * box.spans(x)) if box.scaled else None


def _half_ranges(box: Box, x: Points) -> tuple[Points, Tensor]:
    """Half the ranges (B n), 1 for open ones, and which rows have different ones (B 1)."""
    half, fixed = 0.5 * box.spans(x), box.fixed(x)
    least = torch.where(fixed, torch.inf, half).amin(-1, keepdim=True)
    most = torch.where(fixed, 0.0, half).amax(-1, keepdim=True)
    return half, most >= UNEVEN * least


class Lengths:
    """The length scales of the variables of a box, row by row.

    `units` (B n): half the range of each variable in rows whose ranges differ; 1 in other rows, for open ranges and for fixed
    variables. None if no row has different ranges.
    """

    def __init__(self, box: Box, x: Points):
        self._box, self._x = box, x
        self.units: Points | None = None
        if not box.uneven:
            return
        half, self._uneven = _half_ranges(box, x)
        self.units = torch.where(self._uneven & self._movable, half, 1.0)
        self._reach = torch.where(self._uneven, half.clamp_max(1.0), self.room.unsqueeze(-1))
        # The ranges in ascending order, and the position up to which they are not much wider than that of each variable.
        width = torch.where(self._movable, box.width(x), torch.inf)
        ordered, self._order = width.sort(-1)
        similar = torch.searchsorted(ordered, UNEVEN * width, right=True) - 1
        self._similar = torch.where(self._uneven, similar, x.shape[-1] - 1)

    @cached_property
    def room(self) -> Rows:
        """Half the narrowest range of each row's variables, at most 1, (B)."""
        return self._box.room(self._x)

    @cached_property
    def _movable(self) -> PointFlags:
        return ~self._box.fixed(self._x)

    def natural(self, x: Points) -> Rows:
        """One length scale of all variables, (B): half the narrowest range (at most 1) or the largest |x|, whichever is larger."""
        # |x| counts because the gradient is accurate to the rounding of x only.
        return torch.maximum(self.room, largest(x * self._movable))

    def of(self, x: Points) -> Tensor:
        """The length scale of each variable, (B n), or (B 1) if no row has different ranges. In rows with different ranges, it is
        half the variable's own range (at most 1) or the largest |x| of the variables whose ranges are not much wider.
        """
        if self.units is None:
            return self.natural(x).unsqueeze(-1)
        size = (x * self._movable).abs().gather(-1, self._order).cummax(-1).values
        return torch.maximum(self._reach, size.gather(-1, self._similar))

    def trusted(self, x: Points) -> Tensor:
        """The lengths, (B n) or (B 1), on which the Hessian is taken to be constant: `room`, or `of` in rows with different ranges."""
        room = self.room.unsqueeze(-1)
        return room if self.units is None else torch.where(self._uneven, self.of(x), room)
