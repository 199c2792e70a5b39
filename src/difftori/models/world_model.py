"""The task-oriented latent model of TD-MPC (Hansen et al., 2022, Eqs. 4–8), also used by DiffTORI."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from difftori.models.nets import mlp
from difftori.types import AnyActions, AnyLatents, AnyObservations, AnyPlans, AnyQValues, AnyValues, Count


class Critics(nn.Module):
    """K independent Q-functions of (state, action), each Linear–LayerNorm–Tanh–Linear–ELU–Linear, initially zero."""

    def __init__(self, state_dim: int, action_dim: int, width: int, count: int = 2):
        super().__init__()
        self.members = nn.ModuleList(_critic(state_dim + action_dim, width) for _ in range(count))

    def forward(self, state: AnyLatents, action: AnyActions) -> AnyQValues:
        """(… Z), (… A) → (K …)."""
        joint = torch.cat((state, action), -1)
        return torch.stack([member(joint).squeeze(-1) for member in self.members])


def _critic(inputs: int, width: int) -> nn.Sequential:
    critic = nn.Sequential(
        nn.Linear(inputs, width), nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, width), nn.ELU(), nn.Linear(width, 1)
    )
    orthogonal(critic)
    zero_init_(critic)
    return critic


class ObservationCritics(nn.Module):
    """Q̃_φ(o, a): twin critics of observations, each with its own encoder (Wan et al., 2024, Section 3.2)."""

    def __init__(self, encoders: Iterable[nn.Module], action_dim: int, *, latent_dim: int, width: int):
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.heads = nn.ModuleList(Critics(latent_dim, action_dim, width, 1) for _ in self.encoders)

    def forward(self, obs: AnyObservations, action: AnyActions) -> AnyQValues:
        """(… *S), (… A) → (K …)."""
        return torch.cat([head(encode(obs), action) for encode, head in zip(self.encoders, self.heads, strict=True)])


class WorldModel(nn.Module):
    """Encoder h, latent dynamics d, reward R, twin critics Q and policy prior π, for latents of `latent_dim` Z.

    Every method takes any leading dimensions (…). Initial weights are orthogonal; those of the last layers of R and Q are zero.
    """

    def __init__(self, encoder: nn.Module, action_dim: int, *, latent_dim: int, width: int):
        super().__init__()
        joint = latent_dim + action_dim
        self.encoder = encoder
        self.dynamics = mlp((joint, width, width, latent_dim), nn.ELU)
        self.reward_head = mlp((joint, width, width, 1), nn.ELU)
        self.policy = mlp((latent_dim, width, width, action_dim), nn.ELU)
        for network in (self.encoder, self.dynamics, self.reward_head, self.policy):
            orthogonal(network)
        zero_init_(self.reward_head)
        self.critics = Critics(latent_dim, action_dim, width)

    def encode(self, obs: AnyObservations) -> AnyLatents:
        """z = h(o): (… *S) → (… Z)."""
        return self.encoder(obs)

    def next(self, latent: AnyLatents, action: AnyActions) -> AnyLatents:
        """d(z, a): (… Z), (… A) → (… Z)."""
        return self.dynamics(torch.cat((latent, action), -1))

    def reward(self, latent: AnyLatents, action: AnyActions) -> AnyValues:
        """R(z, a): (… Z), (… A) → (…)."""
        return self.reward_head(torch.cat((latent, action), -1)).squeeze(-1)

    def q(self, latent: AnyLatents, action: AnyActions) -> AnyQValues:
        """Q_k(z, a): (… Z), (… A) → (K …)."""
        return self.critics(latent, action)

    def min_q(self, latent: AnyLatents, action: AnyActions) -> AnyValues:
        """min_k Q_k(z, a): (… Z), (… A) → (…)."""
        return self.critics(latent, action).amin(0)

    def prior(self, latent: AnyLatents, noise: AnyActions | None = None) -> AnyActions:
        """π(z), plus `noise` (… A) if it is not None, clipped to [−1, 1]: (… Z) → (… A).

        The derivative is that of π, also where the noisy action is clipped, as in TD-MPC's release.
        """
        action = torch.tanh(self.policy(latent))
        return action if noise is None else with_noise(action, noise)

    def value(self, latent: AnyLatents) -> AnyValues:
        """min_k Q_k(z, π(z)): (… Z) → (…)."""
        return self.min_q(latent, self.prior(latent))

    def rollout(self, latent: AnyLatents, noise: AnyPlans) -> AnyPlans:
        """The prior's actions over H steps of the model, with `noise` (… H A): (… Z) → (… H A)."""
        actions = []
        for step, step_noise in enumerate(noise.unbind(-2)):
            if step:
                latent = self.next(latent, actions[-1])
            actions.append(self.prior(latent, step_noise))
        return torch.stack(actions, -2)


def action_noise(
    shape: Sequence[Count], std: float, *, like: Tensor, generator: torch.Generator | None, limit: float = 0.3
) -> Tensor:
    """Sample N(0, std²) clipped to ±`limit` (default: 0.3), of this shape, with the device and dtype of `like`."""
    noise = torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
    return (std * noise).clamp(-limit, limit)


def with_noise(action: AnyActions, noise: AnyActions) -> AnyActions:
    """`action` + `noise` (… A), clipped to [−1, 1], with the derivative 1 by `action`, also where it is clipped."""
    return action + ((action + noise).clamp(-1.0, 1.0) - action).detach()


def orthogonal(network: nn.Module, linear_gain: float = 1.0) -> None:
    """Initialise linear layers and convolutions with orthogonal weights and zero biases; convolutions with the gain of ReLU.

    `linear_gain`: gain of the linear layers, by default 1.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            gain = nn.init.calculate_gain("relu") if isinstance(module, nn.Conv2d) else linear_gain
            # In a separate tensor, because the initialiser does not accept channels-last weights of convolutions.
            module.weight.data.copy_(nn.init.orthogonal_(torch.empty(module.weight.shape), gain))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def zero_init_(network: nn.Sequential) -> None:
    """Initialise the last layer with zeros, so that the network's initial output is 0."""
    last = network[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
