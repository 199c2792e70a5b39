"""Behaviour cloning by a plain multilayer perceptron."""

from typing import final

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from difftori.interfaces import Policy, PolicyConfig
from difftori.models.nets import mlp
from difftori.models.pictures import Pictures
from difftori.models.window_encoder import WindowEncoder
from difftori.policies._units import Units
from difftori.types import Metrics, Plans, Scalar, TaskSpec, Window, WindowObs


class BCConfig(PolicyConfig):
    """Settings of `BC`. The sizes are ours: no source prescribes them for Table 8."""

    epochs: int = Field(500, ge=1)
    """Passes over the training set."""

    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers."""
    layer_norm: bool = False
    """Normalise each hidden layer before its activation."""
    pictures: Pictures = Pictures()
    """How pictures are seen."""


@final
class BC(Policy):
    """Features of what was seen → all H actions at once: â = centre + half-width·tanh(MLP(s)), trained on mean (â − a*)².

    Observations are normalised where the training data was measured. Actions (B H A) lie in the task's units inside the
    box, which must be finite (`BoxError`).
    The mean runs over rows, steps and action dimensions.
    """

    name = "bc"
    Config = BCConfig

    def __init__(self, config: BCConfig, spec: TaskSpec):
        super().__init__(config, spec)
        outputs = spec.horizon * spec.action_dim
        self.units = Units(spec, self.name)
        self.window = WindowEncoder(spec, config.pictures)
        self.net = mlp((self.window.width, *config.hidden, outputs), nn.ReLU, layer_norm=config.layer_norm)

    def predict(self, obs: WindowObs, crops: torch.Generator | None = None) -> Plans:
        """The controls (B H A), with their graph; `crops` as `WindowEncoder` has it."""
        raw = self.net(self.window(self.units.obs(obs), crops)).unflatten(1, (self.spec.horizon, self.spec.action_dim))
        return self.units.squashed(raw)

    def loss(self, batch: Window, *, generator: torch.Generator) -> tuple[Scalar, Metrics]:
        """Mean squared control error; `generator` draws the crops of pictures alone."""
        loss = F.mse_loss(self.predict(batch.obs, generator), batch.actions)
        return loss, {"control_mse": loss.item()}

    @torch.no_grad()
    def act(self, obs: WindowObs, *, generator: torch.Generator) -> Plans:
        """The controls (B H A); deterministic, draws nothing from `generator`."""
        return self.predict(obs).clamp(self.units.low, self.units.high)  # a rounding error may lead out
