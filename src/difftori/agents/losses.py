"""Losses that agents share: those of the latent model (Eq. 3), of critics of observations, and of the policy prior.

A segment has T steps of B rows; latents are (T+1 B Z), observations (T+1 B *S). Step t has weight ρ^t and padded steps have
weight zero. Each row's terms are bounded by `CEILING`, and losses that train the model are divided by T, as in TD-MPC's
release. Source: Hansen, Wang and Su (2022), Eqs. 7–12; Wan et al. (2024), Eqs. 3 and 6.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from difftori.models.world_model import WorldModel
from difftori.types import Rows, Scalar, Segment

CEILING = 1e4
"""Upper bound of each row's terms and priorities. TD-MPC's release also sets the gradient of such a term to zero, which ends the
learning of rewards above some 50 per step; here a term keeps the direction of its gradient (see `_bounded`)."""


class ModelCoefficients(NamedTuple):
    """γ, ρ, and the weights c_1 (reward), c_2 (value) and c_3 (consistency) of Eq. 3.

    `shapes_latent`: whether the losses of reward and value train encoder and dynamics.
    """

    discount: float
    rho: float
    reward: float
    value: float
    consistency: float
    shapes_latent: bool = True


class ModelLoss(NamedTuple):
    """Eq. 3 on a batch: the scalar, new priorities (B), the latents (T+1 B Z) and h(s') (T B Z) without a graph, and scalars to log."""

    total: Scalar
    priorities: Rows
    latents: Tensor
    next_latents: Tensor
    metrics: dict[str, Scalar]


def model_loss(
    model: WorldModel, target: WorldModel, segment: Segment, obs: Tensor, noise: Tensor, c: ModelCoefficients
) -> ModelLoss:
    """Eq. 3: Σ_t ρ^t (c_1‖R − r‖² + c_2‖Q − (r + γ Q⁻(z', π(z')))‖² + c_3‖d(z, a) − h⁻(s')‖²), the weighted mean over rows.

    `noise` (T B A) is added to π's action in the target.
    """
    with torch.no_grad():
        target_latents, next_latents = target.encode(obs[1:]), model.encode(obs[1:])
        target_values = bellman_targets(model, target, segment, next_latents, noise, c.discount)
    latents = [model.encode(obs[0])]
    for action in segment.actions:
        latents.append(model.next(latents[-1], action))
    path = torch.stack(latents)
    weight = step_weights(segment, c.rho)
    start = path[:-1] if c.shapes_latent else path[:-1].detach()
    q = model.q(start, segment.actions)
    consistency = (weight * (path[1:] - target_latents).square().mean(-1)).sum(0)
    reward = (weight * (model.reward(start, segment.actions) - segment.rewards).square()).sum(0)
    errors = q - target_values
    value = (weight * errors.square().sum(0)).sum(0)
    rows = c.consistency * _bounded(consistency) + c.reward * _bounded(reward) + c.value * _bounded(value)
    total = (rows * segment.weights).mean() / len(segment.actions)
    priorities = (weight * errors.detach().abs().sum(0)).sum(0).clamp(max=CEILING)
    metrics = {
        "consistency_loss": consistency.mean(),
        "reward_loss": reward.mean(),
        "value_loss": value.mean(),
        "q": q.mean(),
    }
    scalars = {name: m.detach() for name, m in metrics.items()}
    return ModelLoss(total, priorities, path.detach(), next_latents, scalars)


def bellman_targets(
    model: WorldModel, target: WorldModel, segment: Segment, next_latents: Tensor, noise: Tensor, discount: float
) -> Tensor:
    """r + γ min Q⁻(z', π(z') + noise) at z' = h(s') (T B Z), without the second term after a terminated step, (T B)."""
    action = model.prior(next_latents, noise)
    return segment.rewards + discount * (~segment.terminated).float() * target.min_q(next_latents, action)


def critic_loss(
    critics: Callable[[Tensor, Tensor], Tensor],
    target: Callable[[Tensor, Tensor], Tensor],
    segment: Segment,
    obs: Tensor,
    next_action: Tensor,
    discount: float,
    rho: float,
    coef: float,
) -> Scalar:
    """coef · Σ_t ρ^t Σ_k (Q_k(o, a) − (r + γ min Q⁻(o', a')))², the weighted mean over rows.

    `critics` and `target`: (… *S), (… A) → (K …). `next_action` a' (N B A) of the first N ≤ T steps, which the sum extends over.
    """
    steps = len(next_action)
    with torch.no_grad():
        not_done = (~segment.terminated[:steps]).float()
        next_values = target(obs[1 : steps + 1], next_action).amin(0)
        values = segment.rewards[:steps] + discount * not_done * next_values
    errors = (critics(obs[:steps], segment.actions[:steps]) - values).square().sum(0)
    rows = _bounded((step_weights(segment, rho)[:steps] * errors).sum(0))
    return coef * (rows * segment.weights).mean() / len(segment.actions)


def prior_loss(model: WorldModel, latents: Tensor, mask: Tensor, noise: Tensor, rho: float) -> Scalar:
    """−Σ_t ρ^t min Q(z_t, π(z_t)), the mean over rows, as far as their episodes go: `mask` (T B) is the segment's.

    `latents` (T+1 B Z) get no gradient; `noise` (T+1 B A) is added to π.
    """
    powers = rho ** torch.arange(len(latents), device=latents.device)
    action = model.prior(latents, noise)
    present = torch.cat([torch.ones_like(mask[:1]), mask])
    return -(powers * (present * model.min_q(latents, action)).mean(-1)).sum()


def _bounded(terms: Rows) -> Rows:
    """Terms (B) ≥ 0, at most `CEILING`: larger ones are scaled to it by a factor that has no gradient."""
    return terms * (CEILING / terms.detach().clamp(min=CEILING))


def step_weights(segment: Segment, rho: float) -> Tensor:
    """ρ^t, zero for padding, (T B)."""
    powers = rho ** torch.arange(len(segment.actions), device=segment.mask.device)
    return powers[:, None] * segment.mask
