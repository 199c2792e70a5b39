"""Base class of policies that refine the actions of a base policy."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from pydantic import Field

from difftori.interfaces import Policy, PolicyConfig
from difftori.types import PartPlans, Plans, TaskSpec, Window, WindowObs


class RefinerConfig(PolicyConfig):
    """Settings of all refiners."""

    base_samples: int = Field(default=8, ge=1)
    """Number of action samples of a stochastic base policy at each training window, computed once before training."""
    base_choice: Literal["drawn", "nearest"] = "nearest"
    """Sample of the base policy that a training step starts from: a random one (`drawn`), or the one nearest to the expert's action
    (`nearest`). From a random sample, the best answer is the mean over all demonstrated ways; from the nearest, it is one of them."""


class Refiner(Policy, ABC):
    """A policy that starts from a base policy's actions: `Window.base` in training, `base` at inference.

    The base is frozen. `NormalizedPolicy` computes its actions.
    """

    FROM_PRESENT = True
    OR_ELSE: ClassVar[str] = ""
    """Alternatives to a base policy, for the error message if it is missing."""

    def __init__(self, config: RefinerConfig, spec: TaskSpec):
        super().__init__(config, spec)
        self.base_samples, self.nearest = config.base_samples, config.base_choice == "nearest"
        self.uses_base = True

    @abstractmethod
    def act(self, obs: WindowObs, base: Plans | None = None, *, generator: torch.Generator) -> PartPlans:
        """Return actions (B P A) from the present step on, given the base's actions from that step on (B H A), without a graph."""

    def choose_base(self, batch: Window, generator: torch.Generator) -> Plans:
        """Return the base's actions (B H A) that a training batch starts from: the nearest of K samples to the expert's, or a random one.

        The nearest sample is the one whose executed actions have the least squared distance.
        """
        samples = batch.base
        assert samples is not None
        if self.nearest:
            away = (samples - batch.actions.unsqueeze(1))[:, :, : self.spec.n_action_steps]
            chosen = away.square().sum((-2, -1)).argmin(1)
        else:
            count, device = samples.shape[1], generator.device
            chosen = torch.randint(count, (len(samples),), generator=generator, device=device)
        return samples[torch.arange(len(samples), device=samples.device), chosen]
