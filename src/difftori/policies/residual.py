"""Residual refinement: a network adds its correction to a frozen base's actions."""

from typing import Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from difftori.data.normalize import Normalizer
from difftori.models.nets import mlp, noise_like, quiet
from difftori.models.pictures import Pictures
from difftori.models.window_encoder import WindowEncoder
from difftori.policies.refiner import Base, Refiner, RefinerConfig
from difftori.types import Metrics, PartPlans, Plans, Scalar, TaskSpec, Window, WindowObs


class ResidualConfig(RefinerConfig):
    """Settings of `Residual`. The sizes and the learning settings are DiffTORI's, so that the two can be compared."""

    optimizer: Literal["adam", "adamw", "rmsprop"] = "adamw"
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    epochs: int = Field(300, ge=1)
    batch_size: int = Field(64, ge=1)
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers."""
    scale: float = Field(1.0, gt=0)
    """α."""
    base_noise: float = Field(0.0, ge=0)
    """σ of Gaussian noise on the base's actions in training, in half-widths of the training data's range."""
    pictures: Pictures = Pictures()
    """How pictures are seen."""


@final
class Residual(Refiner):
    """â = a_base + α·MLP([features of the observations, a_base]), trained on ‖â − a*‖², for the actions that are executed.

    The last layer starts near zero, so that the first policy is the base. All in units of the training data's range.
    Rows, steps and dimensions share the mean. Source: the residual baseline of Wan et al. (2024), who do not give its
    sizes; after Johannink et al. (2019).
    """

    name = "residual"
    Config = ResidualConfig

    def __init__(self, config: ResidualConfig, spec: TaskSpec, base: Base | None = None):
        super().__init__(config, spec, base)
        self.settings = config
        self.low: Tensor
        self.high: Tensor
        self.register_buffer("low", torch.tensor(spec.low), persistent=False)
        self.register_buffer("high", torch.tensor(spec.high), persistent=False)
        self.normalizer = Normalizer.of(spec)
        self.window = WindowEncoder(spec, config.pictures)
        outputs = spec.execute * spec.action_dim
        self.network = mlp((self.window.width + outputs, *config.hidden, outputs))
        nn.init.zeros_(quiet(self.network).bias)

    def predict(self, obs: WindowObs, base: PartPlans, crops: torch.Generator | None = None) -> PartPlans:
        """Normalised observations and the base's executed actions (B P A) → corrected ones, with their graph.

        `crops` as `WindowEncoder` has it.
        """
        correction = self.network(torch.cat((self.window(obs, crops), base.flatten(1)), -1))
        return base + self.settings.scale * correction.reshape(base.shape)

    def loss(self, batch: Window, *, generator: torch.Generator) -> tuple[Scalar, Metrics]:
        """Mean squared error of the executed actions."""
        window = self.normalizer(batch)
        base = self._unit_base(self.base_plans(batch, generator=generator))
        start = (base + self.settings.base_noise * noise_like(base, generator)).clamp(-1, 1)
        target = window.actions[:, self.spec.present]
        loss = F.mse_loss(self.predict(window.obs, start, generator), target)
        return loss, {"action_mse": loss.item(), "start_mse": F.mse_loss(base, target).item()}

    @torch.no_grad()
    def act(self, obs: WindowObs, *, generator: torch.Generator) -> Plans:
        """The base's actions (B H A), those that are executed corrected."""
        plans = self.base_act(obs, generator=generator).clamp(self.low, self.high)
        unit = self.predict(self.normalizer.normalize_obs(obs), self._unit_base(plans))
        plans[:, self.spec.present] = self.normalizer.denormalize_actions(unit.clamp(-1, 1)).clamp(self.low, self.high)
        return plans

    def _unit_base(self, plans: Plans) -> PartPlans:
        return self.normalizer.normalize_actions(plans[:, self.spec.present]).clamp(-1, 1)
