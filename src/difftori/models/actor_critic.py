"""Networks of agents without a model: the policy, twin critics, and actions of a squashed Gaussian policy."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from difftori.models.nets import mlp
from difftori.models.world_model import orthogonal
from difftori.types import AnyActions, AnyLatents, AnyQValues


def make_trunk(inputs: int, outputs: int) -> nn.Sequential:
    """Linear–LayerNorm–Tanh, which reduces features to a bounded vector: (… `inputs`) → (… `outputs`)."""
    return nn.Sequential(nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.Tanh())


class PolicyNetwork(nn.Module):
    """A trunk and an MLP of two hidden layers with ReLU: features (… F) → (… `outputs`). Initial weights are orthogonal.

    `trunk_dim` is the size of the trunk's output.
    """

    def __init__(self, trunk: nn.Module, trunk_dim: int, outputs: int, width: int):
        super().__init__()
        self.trunk = trunk
        self.head = mlp((trunk_dim, width, width, outputs))
        orthogonal(self)

    def forward(self, features: AnyLatents) -> Tensor:
        """(… F) → (… `outputs`)."""
        return self.head(self.trunk(features))


class TwinCritics(nn.Module):
    """Two Q-functions of features and actions, MLPs of two hidden layers with ReLU on a common trunk.

    `trunk_dim` is the size of the trunk's output. Initial weights are orthogonal, those of the MLPs with gain `gain`.
    """

    def __init__(self, trunk: nn.Module, trunk_dim: int, action_dim: int, width: int, *, gain: float = 1.0):
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(mlp((trunk_dim + action_dim, width, width, 1)) for _ in range(2))
        orthogonal(self.trunk)
        orthogonal(self.heads, gain)

    def forward(self, features: AnyLatents, action: AnyActions) -> AnyQValues:
        """(… F), (… A) → (2 …)."""
        joint = torch.cat((self.trunk(features), action), -1)
        return torch.stack([head(joint).squeeze(-1) for head in self.heads])


def bounded_log_std(raw: AnyActions, low: float, high: float) -> AnyActions:
    """Map any real numbers to (`low`, `high`) by a scaled tanh."""
    return low + 0.5 * (high - low) * (torch.tanh(raw) + 1.0)


def squashed_gaussian(mean: AnyActions, log_std: AnyActions, noise: AnyActions) -> tuple[AnyActions, Tensor]:
    """a = tanh(u) with u = mean + std·noise, (… A), and its log-density (…) (Haarnoja et al., 2018, Appendix C).

    log π(a) = Σ log N(u; mean, std²) − log(1 − tanh²(u)). The last logarithm is computed as 2 (log 2 − u − softplus(−2u)), which
    is finite and accurate for all u.
    """
    u = mean + log_std.exp() * noise
    gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2.0 * math.pi)
    squashing = 2.0 * (math.log(2.0) - u - F.softplus(-2.0 * u))
    return torch.tanh(u), (gaussian - squashing).sum(-1)
