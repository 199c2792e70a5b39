"""What several policies compute in: normalised observations, and actions in units of the training data's range."""

from typing import final

import torch
from torch import Tensor, nn

from difftori.data.normalize import Normalizer
from difftori.errors import BoxError
from difftori.types import AnyActions, PartPlans, Plans, TaskSpec, Window, WindowObs


@final
class Units(nn.Module):
    """Observations normalised by the training data, actions so that its range, or the box without one, is [−1, 1].

    `low` and `high` (A) are the task's box in its own units. `least` and `greatest` (A) bound the actions that a policy
    may consider, in units: [−1, 1] widened on each side by `margin` of it, and nowhere outside of the box.
    Raises BoxError, in the name of `owner`, if the box is not finite.
    """

    def __init__(self, spec: TaskSpec, owner: str, *, margin: float = 0.0):
        super().__init__()
        self.low: Tensor
        self.high: Tensor
        self.least: Tensor
        self.greatest: Tensor
        low, high = torch.tensor(spec.low), torch.tensor(spec.high)
        if not (low.isfinite().all() and high.isfinite().all()):
            raise BoxError(
                f"{owner} keeps to the box [{spec.low}, {spec.high}], which is not finite: give finite bounds"
            )
        self.normalizer = Normalizer.of(spec)
        reach = 1.0 + 2.0 * margin
        unit_low, unit_high = (self.normalizer.normalize_actions(bound) for bound in (low, high))
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)
        # Data beyond its box leaves no room between the two: the box counts.
        self.register_buffer("least", unit_low.clamp(min=-reach).minimum(unit_high), persistent=False)
        self.register_buffer("greatest", unit_high.clamp(max=reach).maximum(unit_low), persistent=False)

    def forward(self, window: Window) -> Window:
        """The window with observations and actions in units."""
        return self.normalizer(window)

    def obs(self, obs: WindowObs) -> WindowObs:
        """Observations in units."""
        return self.normalizer.normalize_obs(obs)

    def of(self, actions: AnyActions) -> AnyActions:
        """Actions (… A) in units."""
        return self.normalizer.normalize_actions(actions)

    def squashed(self, raw: AnyActions) -> AnyActions:
        """tanh of any numbers (… A), stretched over the box, in the task's own units."""
        return (self.low + self.high) / 2 + (self.high - self.low) / 2 * raw.tanh()

    def task(self, actions: AnyActions) -> AnyActions:
        """Actions (… A) back in the task's own units, inside the box."""
        return self.normalizer.denormalize_actions(actions).clamp(self.low, self.high)


def whole_plans(executed: PartPlans, spec: TaskSpec) -> Plans:
    """H actions (B H A) around P from the present on (B P A): the first and the last of these stand for the others."""
    before = spec.observe - 1
    after = spec.horizon - before - executed.shape[1]
    first, last = executed[:, :1].expand(-1, before, -1), executed[:, -1:].expand(-1, after, -1)
    return torch.cat((first, executed, last), 1)
