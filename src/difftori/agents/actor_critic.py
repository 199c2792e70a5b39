"""Shared parts of agents without a model: settings, encoder, n-step transitions, the Bellman error."""

from typing import NamedTuple

import torch
from pydantic import Field
from torch import nn

from difftori.agents.latent_model import from_pixels
from difftori.agents.losses import CEILING
from difftori.interfaces import AgentConfig
from difftori.models.actor_critic import make_trunk
from difftori.models.encoders import PixelFeatures, Precision
from difftori.types import Actions, EnvSpec, Observations, QValues, Rows, Scalar, Segment


class ActorCriticConfig(AgentConfig):
    """Settings that agents without a model share."""

    horizon: int = Field(default=1, ge=1)
    """n of the n-step return: the rewards that are summed before the value of the next state is added."""
    priority_alpha: float = Field(default=0.0, ge=0, le=1)
    """Exponent α of the priorities of prioritised replay. 0: uniform replay."""
    width: int = Field(default=1024, ge=1)
    """Width of the two hidden layers of policy and critics."""
    feature_dim: int = Field(default=50, ge=1)
    """Size of the features of an image that policy and critics receive."""
    channels: int = Field(default=32, ge=1)
    """Channels of the pixel encoder's convolutions."""
    precision: Precision = "auto"
    """Precision of the pixel encoder's convolutions. bfloat16 is faster and accurate to three digits. `auto`: on a CUDA
    device bfloat16, and TF32 for the matrix products of updates; otherwise float32."""
    discount: float = Field(default=0.99, gt=0, le=1)
    """Discount γ per agent step."""


class Transition(NamedTuple):
    """n-step transitions of B rows: state, action, discounted sum of rewards, discount of the next state's value, next state."""

    obs: Observations
    actions: Actions
    rewards: Rows
    discounts: Rows
    next_obs: Observations


def n_step(segment: Segment, discount: float) -> Transition:
    """s_0, a_0, Σ_{t<m} γ^t r_t, γ^m and s_m, where m is the number of recorded steps of each row, at most T.

    The discount is zero if the episode terminated, and γ^m if it was truncated.
    """
    steps = segment.mask.sum(0)
    powers = discount ** torch.arange(len(segment.actions), device=segment.mask.device)
    return Transition(
        obs=segment.obs[0],
        actions=segment.actions[0],
        rewards=(powers[:, None] * segment.mask * segment.rewards).sum(0),
        discounts=discount**steps * ~segment.terminated.any(0),
        next_obs=segment.obs[steps.long(), torch.arange(len(steps), device=steps.device)],
    )


def bellman_loss(q: QValues, target: Rows, weights: Rows) -> tuple[Scalar, Rows]:
    """Σ_k (Q_k − y)², the weighted mean over rows, and new priorities mean_k |Q_k − y|."""
    errors = q - target
    priorities = errors.detach().abs().mean(0).clamp(max=CEILING)
    return (errors.square().sum(0) * weights).mean(), priorities


def build_features(config: ActorCriticConfig, spec: EnvSpec, *, offset: float) -> tuple[nn.Module, int]:
    """The convolutions of images /255 − `offset`, or nothing for states: (… *S) → (… F). And the number of features F."""
    if not from_pixels(spec):
        return nn.Identity(), spec.obs_shape[0]
    channels, height, width = spec.obs_shape
    encoder = PixelFeatures((channels, height, width), config.channels, offset, config.precision)
    return encoder, encoder.size


def build_trunk(config: ActorCriticConfig, spec: EnvSpec, size: int) -> tuple[nn.Module, int]:
    """The trunk of policy or critics, which reduces the `size` features of an image, and its output size. States have none."""
    if not from_pixels(spec):
        return nn.Identity(), size
    return make_trunk(size, config.feature_dim), config.feature_dim
