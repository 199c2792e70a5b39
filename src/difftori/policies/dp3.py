"""3D Diffusion Policy, DP3 (Ze et al., 2024, arXiv 2403.03954): diffusion conditioned on a point cloud."""

from typing import Any, ClassVar, final

import torch
from pydantic import Field

from difftori.interfaces import Policy
from difftori.models.diffusion import Prediction
from difftori.policies.action_diffusion import ActionDiffusion, ActionDiffusionConfig
from difftori.steering import Steering
from difftori.types import Plans, Scalar, Scalars, TaskSpec, Window, WindowObs


class DP3Config(ActionDiffusionConfig):
    """Settings of `DP3`, from its authors' code; see `ActionDiffusionConfig`."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {},
        "simple": {"dims": (128, 256, 384), "blocks": 1},
    }
    preset: str = "paper"
    """Preset of settings. `paper`: DP3. `simple`: its authors' Simple DP3, a smaller U-Net with one block at each depth."""
    prediction: Prediction = "sample"
    inference_steps: int | None = Field(default=10, ge=1)
    epochs: int = Field(default=3000, ge=1)
    batch_size: int = Field(default=128, ge=1)


@final
class DP3(Policy):
    """a ~ p(a | o) by denoising, where o is a point cloud, encoded by a small PointNet, and the robot's state.

    The network predicts the actions rather than the noise, and uses 10 inference steps (DDIM); see `ActionDiffusion`. Clouds,
    states and actions are normalised to [−1, 1] by the training data's range. It also runs without a cloud, on vectors or
    images; then it is Diffusion Policy with these settings.

    Differs from Ze et al. in the same points as `DiffusionPolicy` from Chi et al.: learning rate and average of the weights.
    """

    name = "dp3"
    Config = DP3Config
    WINDOW = (2, 4, 3)
    STOCHASTIC = True
    STEERABLE = "cost and constraint"

    def __init__(self, config: DP3Config, spec: TaskSpec):
        super().__init__(config, spec)
        self.model = ActionDiffusion(config, spec)

    def loss(self, batch: Window, *, generator: torch.Generator) -> tuple[Scalar, Scalars]:
        """Return the mean squared error of the network's prediction from noised actions."""
        loss = self.model.loss(batch, generator=generator)
        return loss, {"denoising_mse": loss}

    def act(self, obs: WindowObs, *, generator: torch.Generator, steering: Steering | None = None) -> Plans:
        """Sample actions (B H A), one sequence for each row. `steering` guides the denoising."""
        return self.model.sample(obs, generator=generator, steering=steering)
