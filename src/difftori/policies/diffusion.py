"""Diffusion Policy (Chi et al., 2023, arXiv 2303.04137), the CNN variant with global conditioning."""

from typing import Any, ClassVar, final

import torch
from pydantic import Field

from difftori.interfaces import Policy
from difftori.policies.action_diffusion import ActionDiffusion, ActionDiffusionConfig
from difftori.steering import Steering
from difftori.types import Plans, Scalar, Scalars, TaskSpec, Window, WindowObs


class DiffusionConfig(ActionDiffusionConfig):
    """Settings of `DiffusionPolicy`."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {},
        "lowdim": {"dims": (256, 512, 1024), "step_width": 256, "batch_size": 256, "epochs": 5000},
        "small": {
            "dims": (64, 128, 256),
            "step_width": 64,
            "blocks": 1,
            "inference_steps": 10,
            "lr": 1e-3,
            "warmup": 100,
            "epochs": 20,
        },
    }
    preset: str = "paper"
    """Preset of settings. `paper`: Chi et al. for images. `lowdim`: Chi et al. for vectors. `small`: ours, for vectors on a CPU."""
    epochs: int = Field(default=3050, ge=1)
    batch_size: int = Field(default=64, ge=1)


@final
class DiffusionPolicy(Policy):
    """a ~ p(a | o), sampled by denoising all H actions from the oldest observation on, including those before the present step.

    The loss is ‖ε̂ − ε‖²; see `ActionDiffusion`. Each image is encoded by its own ResNet-18; vector observations are
    concatenated with the features.

    Differs from Chi et al.: the cosine of the learning rate decays from the first update on, by epochs, or by updates with
    `updates`; the average of the weights (EMA) begins two updates earlier.
    """

    name = "diffusion"
    Config = DiffusionConfig
    STOCHASTIC = True
    STEERABLE = "cost and constraint"

    def __init__(self, config: DiffusionConfig, spec: TaskSpec):
        super().__init__(config, spec)
        self.model = ActionDiffusion(config, spec)

    def loss(self, batch: Window, *, generator: torch.Generator) -> tuple[Scalar, Scalars]:
        """Return the mean squared error of the network's prediction from noised actions."""
        loss = self.model.loss(batch, generator=generator)
        return loss, {"denoising_mse": loss}

    def act(self, obs: WindowObs, *, generator: torch.Generator, steering: Steering | None = None) -> Plans:
        """Sample actions (B H A), one sequence for each row. `steering` guides the denoising."""
        return self.model.sample(obs, generator=generator, steering=steering)
