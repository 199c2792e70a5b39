"""Action diffusion, shared by Diffusion Policy and DP3: a distribution over sequences of H actions, conditioned on observations."""

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
from difftori.steering import Steering
from difftori.types import Plans, RowCounts, Scalar, TaskSpec, Window, WindowObs


class ActionDiffusionConfig(ChiLearning):
    """Settings of both diffusion policies. The defaults are those of Chi et al. (2023), also used by Ze et al. (2024)."""

    ema: float = Field(default=0.9999, ge=0, lt=1)
    dims: tuple[Annotated[int, Field(ge=8, multiple_of=8)], ...] = (512, 1024, 2048)
    """Number of channels of the U-Net at each depth, multiples of 8."""
    step_width: int = Field(default=128, ge=2, multiple_of=2)
    """Size of the embedding of the noise step."""
    blocks: int = Field(default=2, ge=1)
    """Number of convolution blocks of the U-Net at each depth."""
    noise_steps: int = Field(default=100, ge=1)
    """Number K of noise steps in training."""
    prediction: Prediction = "epsilon"
    """What the network predicts: the noise (`epsilon`), or the actions without noise (`sample`)."""
    inference_steps: int | None = Field(default=None, ge=1)
    """Number of DDIM steps at inference, without fresh noise (default: all K steps with fresh noise, DDPM)."""
    images: Images = Images()
    """Image encoder."""


@final
class ActionDiffusion(nn.Module):
    """p(a | o): starts from noise over all H actions and removes it step by step with a U-Net conditioned on the observations.

    Rows are independent of each other.
    """

    def __init__(self, config: ActionDiffusionConfig, spec: TaskSpec):
        super().__init__()
        self.plan_shape = spec.horizon, spec.action_dim
        self.past = spec.n_obs_steps - 1
        self.window = WindowEncoder(spec, config.images)
        self.schedule = NoiseSchedule(config.noise_steps, config.prediction)
        self.sampler: Sampler = DDPM() if config.inference_steps is None else DDIM(config.inference_steps)
        self.sampler.pairs(config.noise_steps)  # raises an error for invalid numbers of steps
        self.unet = UNet1D(
            spec.action_dim, self.window.width, dims=config.dims, step_width=config.step_width, blocks=config.blocks
        )

    def loss(self, batch: Window, *, generator: torch.Generator) -> Scalar:
        """Return E ‖U-Net(x_k, k, o) − target‖², with a random noise step for each row; mean over rows, steps and dimensions.

        `generator` samples the image crops, the noise, and k (Ho et al., 2020, Eq. 14).
        """
        clean = batch.actions
        features = self.window(batch.obs, generator)
        noise = noise_like(clean, generator)
        step = torch.randint(self.schedule.steps, (len(clean),), generator=generator, device=clean.device)
        predicted = self.unet(self.schedule.noised(clean, noise, step), step, features)
        return F.mse_loss(predicted, self.schedule.target(clean, noise))

    @torch.no_grad()
    def sample(self, obs: WindowObs, *, generator: torch.Generator, steering: Steering | None = None) -> Plans:
        """Sample actions (B H A), one sequence for each row.

        `steering`: the actions from the present step on are guided: each denoising step's estimate of them is projected, as by
        Zhu et al. (2023, arXiv 2305.08995, Eq. 12), but with the same weight at every noise level. Unlike gradients added to the mean
        (Janner et al., 2022, arXiv 2205.09991), this is stable for every weight.
        """
        features = self.window(obs)
        shape = features.shape[0], *self.plan_shape
        noise = torch.randn(shape, generator=generator, dtype=features.dtype, device=features.device)

        def predicted(actions: Plans, step: RowCounts) -> Plans:
            return self.unet(actions, step, features)

        def guided(actions: Plans, last: bool) -> Plans:
            assert steering is not None
            past, planned = actions[:, : self.past], actions[:, self.past :]
            return torch.cat((past, steering.projected(planned, final=last)), 1)

        guide = None if steering is None else guided
        return denoise(predicted, self.schedule, self.sampler, noise, generator=generator, guide=guide)
