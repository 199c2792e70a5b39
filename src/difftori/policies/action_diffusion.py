"""What Diffusion Policy and DP3 share: a distribution over windows of H actions, given what was seen."""

from typing import Annotated, final

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from difftori.models.diffusion import DDIM, DDPM, NoiseSchedule, Prediction, Sampler, denoise
from difftori.models.images import Images
from difftori.models.nets import noise_like
from difftori.models.unet1d import UNet1D
from difftori.models.window_encoder import WindowEncoder
from difftori.policies._learning import ChiLearning
from difftori.types import Plans, RowCounts, Scalar, TaskSpec, Window, WindowObs


class ActionDiffusionConfig(ChiLearning):
    """Settings that both policies have. The defaults are those of Chi et al. (2023), which Ze et al. (2024) kept."""

    ema: float = Field(0.9999, ge=0, lt=1)
    dims: tuple[Annotated[int, Field(ge=8, multiple_of=8)], ...] = (512, 1024, 2048)
    """Channels of the U-Net at each depth, multiples of 8."""
    step_width: int = Field(128, ge=2, multiple_of=2)
    """Features of the noise step."""
    blocks: int = Field(2, ge=1)
    """Convolution blocks of the U-Net at each depth."""
    noise_steps: int = Field(100, ge=1)
    """K, steps of noise in training."""
    prediction: Prediction = "epsilon"
    """What the network says: the noise (`epsilon`), or the actions without it (`sample`)."""
    inference_steps: int | None = Field(None, ge=1)
    """Steps when it acts, without fresh noise (DDIM); unless given, all K with fresh noise (DDPM)."""
    images: Images = Images()
    """How images are seen."""


@final
class ActionDiffusion(nn.Module):
    """p(a | o): noise over all H actions at once, taken away step by step by a U-Net that is told what was seen.

    Rows never interact.
    """

    def __init__(self, config: ActionDiffusionConfig, spec: TaskSpec):
        super().__init__()
        self.plan_shape = spec.horizon, spec.action_dim
        self.window = WindowEncoder(spec, config.images)
        self.schedule = NoiseSchedule(config.noise_steps, config.prediction)
        self.sampler: Sampler = DDPM() if config.inference_steps is None else DDIM(config.inference_steps)
        self.sampler.pairs(config.noise_steps)  # refuses numbers that do not fit
        self.unet = UNet1D(
            spec.action_dim, self.window.width, dims=config.dims, step_width=config.step_width, blocks=config.blocks
        )

    def loss(self, batch: Window, *, generator: torch.Generator) -> Scalar:
        """E ‖U-Net(x_k, k, o) − target‖², each row at a step of its own; mean over rows, steps and dimensions.

        `generator` draws the crops of images, the noise, and k (Ho et al., 2020, Eq. 14).
        """
        clean = batch.actions
        features = self.window(batch.obs, generator)
        noise = noise_like(clean, generator)
        step = torch.randint(self.schedule.steps, (len(clean),), generator=generator, device=clean.device)
        predicted = self.unet(self.schedule.noised(clean, noise, step), step, features)
        return F.mse_loss(predicted, self.schedule.target(clean, noise))

    @torch.no_grad()
    def sample(self, obs: WindowObs, *, generator: torch.Generator) -> Plans:
        """Actions (B H A), one draw for each row."""
        features = self.window(obs)
        shape = len(features), *self.plan_shape
        noise = torch.randn(shape, generator=generator, dtype=features.dtype, device=features.device)

        def predicted(actions: Plans, step: RowCounts) -> Plans:
            return self.unet(actions, step, features)

        return denoise(predicted, self.schedule, self.sampler, noise, generator=generator)
