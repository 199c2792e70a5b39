"""What policies share that start from a base policy's actions."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from pydantic import Field

from difftori.interfaces import Policy, PolicyConfig
from difftori.types import PartPlans, Plans, TaskSpec, Window, WindowObs


class RefinerConfig(PolicyConfig):
    """Settings that every refiner has."""

    base_samples: int = Field(8, ge=1)
    """Actions of a stochastic base policy that are drawn at each training window, before training."""
    base_choice: Literal["drawn", "nearest"] = "nearest"
    """Which of these a training step starts from: any, or the one nearest to the expert's action. A draw tells nothing of which
    of several good ways the expert took, so that from any the best answer is their mean; from the nearest it keeps to the way."""


class Refiner(Policy, ABC):
    """A policy that starts from a base policy's actions: of `Window.base` in training, of `base` when it acts.

    The base is frozen, and `NormalizedPolicy` asks it.
    """

    FROM_PRESENT = True
    OR_ELSE: ClassVar[str] = ""
    """How to do without a base, for the error where there is none."""

    def __init__(self, config: RefinerConfig, spec: TaskSpec):
        super().__init__(config, spec)
        self.base_samples, self.nearest = config.base_samples, config.base_choice == "nearest"
        self.uses_base = True

    @abstractmethod
    def act(self, obs: WindowObs, base: Plans | None = None, *, generator: torch.Generator) -> PartPlans:
        """The actions (B P A) from the present on, given the base's from there on (B H A), without a graph."""

    def choose_base(self, batch: Window, generator: torch.Generator) -> Plans:
        """The base's actions (B H A) that a training batch starts from: of its K samples, the nearest to the expert's, or any.

        Nearest is the one whose executed actions have the least squared distance.
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
