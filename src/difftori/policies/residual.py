"""Residual refinement: a network adds a correction to the actions of a frozen base policy."""

from typing import Literal, final

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from difftori.models.images import Images
from difftori.models.nets import mlp, noise_like, small_init_
from difftori.models.window_encoder import WindowEncoder
from difftori.policies.refiner import Refiner, RefinerConfig
from difftori.types import PartPlans, Plans, Scalar, Scalars, TaskSpec, Window, WindowObs


class ResidualConfig(RefinerConfig):
    """Settings of `Residual`. Sizes and training settings equal DiffTORI's, so that the two can be compared."""

    optimizer: Literal["adam", "adamw", "rmsprop"] = "adamw"
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    epochs: int = Field(default=300, ge=1)
    batch_size: int = Field(default=64, ge=1)
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers."""
    scale: float = Field(default=1.0, gt=0)
    """Scale α of the correction."""
    base_noise: float = Field(default=0.0, ge=0)
    """Standard deviation σ of Gaussian noise on the base's actions in training, in half-widths of the training data's range."""
    images: Images = Images()
    """Image encoder."""


@final
class Residual(Refiner):
    """â = a_base + α·MLP([features of the observations, a_base]), trained on ‖â − a*‖², for the actions that are executed.

    The last layer is initialised near zero, so that the untrained policy equals the base. The loss is the mean over rows, steps
    and dimensions. Source: the residual baseline of Wan et al. (2024), who do not give its sizes; after Johannink et al. (2019).
    """

    name = "residual"
    Config = ResidualConfig

    def __init__(self, config: ResidualConfig, spec: TaskSpec):
        super().__init__(config, spec)
        self.settings = config
        self.window = WindowEncoder(spec, config.images)
        outputs = spec.n_action_steps * spec.action_dim
        self.network = mlp((self.window.width + outputs, *config.hidden, outputs))
        nn.init.zeros_(small_init_(self.network).bias)

    def predict(self, obs: WindowObs, base: PartPlans, crops: torch.Generator | None = None) -> PartPlans:
        """Return the corrected actions for the base's executed actions (B P A), with their graph. `crops`: see `WindowEncoder`."""
        correction = self.network(torch.cat((self.window(obs, crops), base.flatten(1)), -1))
        return base + self.settings.scale * correction.reshape(base.shape)

    def loss(self, batch: Window, *, generator: torch.Generator) -> tuple[Scalar, Scalars]:
        """Return the mean squared error of the executed actions."""
        base = self._executed(self.choose_base(batch, generator))
        start = (base + self.settings.base_noise * noise_like(base, generator)).clamp(-1, 1)
        target = batch.actions[:, : self.spec.n_action_steps]
        loss = F.mse_loss(self.predict(batch.obs, start, generator), target)
        return loss, {"action_mse": loss, "start_mse": F.mse_loss(base, target)}

    @torch.no_grad()
    def act(self, obs: WindowObs, base: Plans | None = None, *, generator: torch.Generator) -> PartPlans:
        """Return the base's executed actions (B P A), corrected."""
        assert base is not None
        return self.predict(obs, self._executed(base)).clamp(-1, 1)

    def _executed(self, base: Plans) -> PartPlans:
        return base[:, : self.spec.n_action_steps].clamp(-1, 1)
