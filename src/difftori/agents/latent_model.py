"""Shared parts of agents that plan in TD-MPC's latent model: settings, networks and schedules."""

from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from difftori.agents.losses import ModelCoefficients
from difftori.interfaces import AgentConfig
from difftori.models.encoders import Precision, make_encoder, random_shift
from difftori.models.world_model import WorldModel
from difftori.types import EnvSpec

_PIXELS, _STATE = {"lr": 3e-4, "batch_size": 256}, {"lr": 1e-3, "batch_size": 512}
_MAX_SHIFT = 4

# For two CPU cores, and for many runs from pixels on a GPU. docs/reinforcement.md has the measured loss of performance.
COMPACT: dict[str, Any] = {
    "latent_dim": 50,
    "width": 128,
    "encoder_width": 128,
    "channels": 16,
    "batch_size": 128,
    "horizon": 3,
    "seed_steps": 1000,
    "schedule_steps": 10_000,
}
# For comparing variants of an agent by many runs on two CPU cores.
SMALL: dict[str, Any] = {
    **COMPACT,
    "latent_dim": 32,
    "width": 64,
    "encoder_width": 64,
    "channels": 32,
    "batch_size": 64,
}
# A latent state too small for the observations, so the training objective of the model matters: objective mismatch.
NARROW: dict[str, Any] = {**SMALL, "latent_dim": 4}


class LatentModelConfig(AgentConfig):
    """Settings of TD-MPC's latent model. The defaults are the paper's (docs/reinforcement.md lists their sources)."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {},
        "compact": COMPACT,
        "small": SMALL,
        "narrow": NARROW,
    }

    batch_size: int | None = Field(default=None, ge=1)
    """Segments per update. Default: 256 from pixels, 512 from states."""
    latent_dim: int = Field(default=50, ge=1)
    """Size Z of the latent state."""
    width: int = Field(default=512, ge=1)
    """Width of the hidden layers, except the encoder's."""
    encoder_width: int = Field(default=256, ge=1)
    """Width of the state encoder's hidden layer."""
    channels: int = Field(default=32, ge=1)
    """Channels of the pixel encoder's convolutions."""
    precision: Precision = "auto"
    """Precision of the pixel encoder's convolutions. bfloat16 is faster and accurate to three digits. `auto`: on a CUDA
    device bfloat16, and TF32 for the matrix products of updates; otherwise float32."""
    lr: float | None = Field(default=None, gt=0)
    """Learning rate. Default: 3e-4 from pixels, 1e-3 from states."""
    discount: float = Field(default=0.99, gt=0, le=1)
    """Discount γ per agent step."""
    rho: float = Field(default=0.5, gt=0, le=1)
    """ρ of Eq. 3: the loss at step t of the segment has weight ρ^t."""
    consistency_coef: float = Field(default=2.0, ge=0)
    """Weight c_3 of the loss of the latent dynamics."""
    reward_coef: float = Field(default=0.5, ge=0)
    """Weight c_1 of the loss of the reward."""
    value_coef: float = Field(default=0.1, ge=0)
    """Weight c_2 of the loss of the action values."""
    reward_shapes_latent: bool = True
    """Train encoder and latent dynamics on the losses of reward and action values too, as in Eq. 3. Otherwise only the consistency
    loss trains them (and DiffTORI's policy-gradient term): a model for prediction that does not know the task."""
    clip_norm: float = Field(default=10.0, gt=0)
    """Largest norm of a gradient; longer ones are scaled down to it."""
    ema: float = Field(default=0.01, gt=0, le=1)
    """Rate of the target networks' soft update."""
    ema_every: int = Field(default=2, ge=1)
    """Updates between soft updates of the target networks."""
    std_start: float = Field(default=0.5, ge=0)
    """Standard deviation of the exploration noise at the first agent step."""
    std_end: float = Field(default=0.05, ge=0)
    """Standard deviation of the exploration noise after `schedule_steps`, reached linearly; also that of π's noise in the losses."""
    horizon_start: int = Field(default=1, ge=1)
    """Planning horizon at the first agent step; it grows linearly to `horizon` over `schedule_steps`."""
    schedule_steps: int = Field(default=25_000, ge=0)
    """Agent steps over which the exploration noise falls and the planning horizon grows."""

    @model_validator(mode="after")
    def _starts_below_the_horizon(self) -> "LatentModelConfig":
        if self.horizon_start > self.horizon:
            raise ValueError(f"horizon_start: {self.horizon_start} is above horizon, {self.horizon}. Fix: at most that")
        return self

    def plan_horizon(self, step: int) -> int:
        """The planning horizon H after `step` agent steps."""
        return min(self.horizon, int(self._scheduled(self.horizon_start, self.horizon, step)))

    def exploration_std(self, step: int) -> float:
        """Standard deviation of the exploration noise after `step` agent steps."""
        return self._scheduled(self.std_start, self.std_end, step)

    def coefficients(self) -> ModelCoefficients:
        """The weights of Eq. 3."""
        weights = (self.reward_coef, self.value_coef, self.consistency_coef)
        return ModelCoefficients(self.discount, self.rho, *weights, self.reward_shapes_latent)

    def learning(self, spec: EnvSpec) -> tuple[float, int]:
        """Learning rate and batch size. Default: those for the observation type."""
        default = _PIXELS if from_pixels(spec) else _STATE
        return self.lr or default["lr"], self.batch_size or int(default["batch_size"])

    def _scheduled(self, start: float | int, end: float | int, step: int) -> float:
        share = min(1.0, step / self.schedule_steps) if self.schedule_steps else 1.0
        return start + share * (end - start)


def from_pixels(spec: EnvSpec) -> bool:
    """Whether observations are images."""
    return len(spec.obs_shape) == 3


def build_encoder(config: LatentModelConfig, spec: EnvSpec) -> nn.Module:
    """An encoder of the environment's observations, (… *S) → (… Z)."""
    return make_encoder(
        spec.obs_shape,
        hidden=config.encoder_width,
        channels=config.channels,
        latent_dim=config.latent_dim,
        precision=config.precision,
    )


def build_model(config: LatentModelConfig, spec: EnvSpec) -> WorldModel:
    """Encoder, latent dynamics, reward, critics and policy prior."""
    return WorldModel(build_encoder(config, spec), spec.action_dim, latent_dim=config.latent_dim, width=config.width)


def trained_by_model_loss(model: WorldModel) -> dict[str, nn.Module]:
    """The networks that Eq. 3 trains: all except the policy prior."""
    return {"encoder": model.encoder, "dynamics": model.dynamics, "reward": model.reward_head, "q": model.critics}


def augmented(obs: Tensor, generator: torch.Generator) -> Tensor:
    """Images (T+1 B C H W) shifted at random, separately at each time step. States are unchanged."""
    if obs.dim() < 5:
        return obs
    return random_shift(obs, _MAX_SHIFT, generator)
