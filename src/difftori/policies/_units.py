"""Bounds of actions: the action box of a task, and the bounds of a search in normalised units."""

import math
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from difftori.data.normalize import Normalizer
from difftori.errors import BoxError
from difftori.types import TaskSpec

Bounds: TypeAlias = tuple[Float[Tensor, "A"], Float[Tensor, "A"]]


def finite_box(spec: TaskSpec, owner: str) -> Bounds:
    """Return the lower and upper bounds (A) of the action box, in the task's units. Raises BoxError, naming `owner`, if not finite."""
    if not all(map(math.isfinite, (*spec.low, *spec.high))):
        raise BoxError(
            f"{owner}: its actions are bounded by the box [{spec.low}, {spec.high}], which is not finite. "
            "Fix: give finite bounds"
        )
    return torch.tensor(spec.low), torch.tensor(spec.high)


def normalized_bounds(spec: TaskSpec, *, margin: float = 0.0) -> Bounds:
    """Return the bounds (A) of normalised actions: [−1, 1] inside the action box. With `margin`, [−1, 1] widened on each side by
    this share of the range, also beyond the box: actions on its edge are then inside (executed ones are clamped to the box).
    """
    if margin:
        reach = torch.full((spec.action_dim,), 1.0 + 2.0 * margin)
        return -reach, reach
    normalize = Normalizer.of(spec).normalize_actions
    low, high = normalize(torch.tensor(spec.low)), normalize(torch.tensor(spec.high))
    # Data outside the box may leave an empty interval; then the box takes precedence.
    return low.clamp(min=-1.0).minimum(high), high.clamp(max=1.0).maximum(low)
