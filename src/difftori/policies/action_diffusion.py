"""What Diffusion Policy and DP3 share: a distribution over windows of H actions, given what was seen."""

from typing import Annotated, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from difftori.data.normalize import Normalizer
from difftori.errors import BoxError
from difftori.models.diffusion import DDIM, DDPM, NoiseSchedule, Prediction, Sampler, denoise
from difftori.models.nets import noise_like
from difftori.models.pictures import Pictures
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
    pictures: Pictures = Pictures()
    """How pictures are seen."""


@final
class ActionDiffusion(nn.Module):
    """p(a | o): noise over all H actions at once, taken away step by step by a U-Net that is told what was seen.

    Actions are normalised to [−1, 1] by the training data's range, or by the box where nothing was measured, which then
    must be finite (`BoxError`). Rows never interact.
    """

    def __init__(self, config: ActionDiffusionConfig, spec: TaskSpec):
        super().__init__()
        self.low: Tensor
        self.high: Tensor
        self.register_buffer("low", torch.tensor(spec.low), persistent=False)
        self.register_buffer("high", torch.tensor(spec.high), persistent=False)
        if spec.moments is None and not (self.low.isfinite().all() and self.high.isfinite().all()):
            raise BoxError(
                f"diffusion: actions are normalised by the box [{spec.low}, {spec.high}], which is not finite: give finite "
                "bounds, or measured data"
            )
        self.plan_shape = spec.horizon, spec.action_dim
        self.normalizer = Normalizer.of(spec)
        self.window = WindowEncoder(spec, config.pictures)
        self.schedule = NoiseSchedule(config.noise_steps, config.prediction)
        self.sampler: Sampler = DDPM() if config.inference_steps is None else DDIM(config.inference_steps)
        self.sampler.pairs(config.noise_steps)  # refuses numbers that do not fit
        self.unet = UNet1D(
            spec.action_dim, self.window.width, dims=config.dims, step_width=config.step_width, blocks=config.blocks
        )

    def loss(self, batch: Window, *, generator: torch.Generator) -> Scalar:
        """E ‖U-Net(x_k, k, o) − target‖², each row at a step of its own; mean over rows, steps and dimensions.

        `generator` draws the crops of pictures, the noise, and k (Ho et al., 2020, Eq. 14).
        """
        window = self.normalizer(batch)
        clean = window.actions
        features = self.window(window.obs, generator)
        noise = noise_like(clean, generator)
        step = torch.randint(self.schedule.steps, (len(clean),), generator=generator, device=clean.device)
        said = self.unet(self.schedule.noised(clean, noise, step), step, features)
        return F.mse_loss(said, self.schedule.target(clean, noise))

    @torch.no_grad()
    def sample(self, obs: WindowObs, *, generator: torch.Generator) -> Plans:
        """Actions (B H A) in the task's units, inside the box, one draw for each row."""
        features = self.window(self.normalizer.normalize_obs(obs))
        shape = len(features), *self.plan_shape
        noise = torch.randn(shape, generator=generator, dtype=features.dtype, device=features.device)

        def said(actions: Plans, step: RowCounts) -> Plans:
            return self.unet(actions, step, features)

        unit = denoise(said, self.schedule, self.sampler, noise, generator=generator)
        return self.normalizer.denormalize_actions(unit).clamp(self.low, self.high)
