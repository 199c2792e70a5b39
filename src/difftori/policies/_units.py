"""The bounds of actions: the box of a task, and what of it a search considers."""

from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from difftori.data.normalize import Normalizer
from difftori.errors import BoxError
from difftori.types import TaskSpec

Bounds: TypeAlias = tuple[Float[Tensor, "A"], Float[Tensor, "A"]]


def finite_box(spec: TaskSpec, owner: str) -> Bounds:
    """The lower and upper bounds (A) of the action box, in the task's units. BoxError, in the name of `owner`, if not finite."""
    low, high = torch.tensor(spec.low), torch.tensor(spec.high)
    if not (low.isfinite().all() and high.isfinite().all()):
        raise BoxError(f"{owner} keeps to the box [{spec.low}, {spec.high}], which is not finite: give finite bounds")
    return low, high


def normalized_bounds(spec: TaskSpec, *, margin: float = 0.0) -> Bounds:
    """The bounds (A) of normalised actions: [−1, 1], widened on each side by `margin` of it, and nowhere outside of the box."""
    normalize = Normalizer.of(spec).normalize_actions
    low, high = normalize(torch.tensor(spec.low)), normalize(torch.tensor(spec.high))
    reach = 1.0 + 2.0 * margin
    # Data beyond its box leaves no room between the two: the box counts.
    return low.clamp(min=-reach).minimum(high), high.clamp(max=reach).maximum(low)
