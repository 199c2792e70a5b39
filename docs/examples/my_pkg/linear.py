"""A policy in one file: all H actions as a linear function of the observation."""

import torch
from torch import nn
from torch.nn import functional as F

from difftori.interfaces import Policy, PolicyConfig
from difftori.types import flat_rows


class LinearConfig(PolicyConfig):
    """Settings of `Linear`; each docstring below becomes a line of --help."""

    lr: float = 1e-2
    epochs: int = 50
    bias: bool = True
    """Add a constant action."""


class Linear(Policy):
    """a = W s + b, trained on the mean of (a - a*)**2."""

    name = "linear"
    Config = LinearConfig

    def __init__(self, config, spec):
        super().__init__(config, spec)
        self.map = nn.Linear(spec.obs_dim, spec.horizon * spec.action_dim, bias=config.bias)

    def predict(self, obs):
        return self.map(flat_rows(obs)).unflatten(1, (self.spec.horizon, self.spec.action_dim))

    def loss(self, batch, *, generator):
        loss = F.mse_loss(self.predict(batch.obs), batch.actions)
        return loss, {"mse": loss.item()}

    @torch.no_grad()
    def act(self, obs, *, generator):
        return self.predict(obs)
