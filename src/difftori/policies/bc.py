"""Behaviour cloning with a multilayer perceptron."""

from typing import Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from difftori.data.normalize import Normalizer, identity, min_max
from difftori.interfaces import Policy, PolicyConfig
from difftori.models.images import Images
from difftori.models.nets import mlp
from difftori.models.window_encoder import WindowEncoder
from difftori.policies._units import finite_box
from difftori.types import Plans, Scalar, Scalars, TaskSpec, Window, WindowObs


class BCConfig(PolicyConfig):
    """Settings of `BC`. The sizes are ours: no source gives them for Table 8."""

    epochs: int = Field(default=500, ge=1)
    """Number of passes over the training set."""

    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers."""
    layer_norm: bool = False
    """Apply layer normalisation before the activation of each hidden layer."""
    error_units: Literal["task", "range"] = "task"
    """Units of the squared error: those of the actions (`task`), or half the training data's range of each dimension (`range`), so
    that dimensions with small motions count as much as others."""
    images: Images = Images()
    """Image encoder."""


@final
class BC(Policy):
    """Behaviour cloning: â = centre + half-width·tanh(MLP(features of the observations)), trained on the mean of (â − a*)².

    Outputs all H actions at once. Actions (B H A) are in the task's units, inside the action box, which must be finite
    (`BoxError`). The mean is over rows, steps and action dimensions, in the units that `error_units` names.
    """

    name = "bc"
    Config = BCConfig
    NORMALIZES = "observations"

    def __init__(self, config: BCConfig, spec: TaskSpec):
        super().__init__(config, spec)
        outputs = spec.horizon * spec.action_dim
        self.low: Tensor
        self.high: Tensor
        low, high = finite_box(spec, self.name)
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)
        self.scale: Tensor
        scaled = Normalizer.of(spec, actions=min_max if config.error_units == "range" else identity).normalize_actions
        self.register_buffer(
            "scale", scaled(torch.ones(spec.action_dim)) - scaled(torch.zeros(spec.action_dim)), persistent=False
        )
        self.window = WindowEncoder(spec, config.images)
        self.net = mlp((self.window.width, *config.hidden, outputs), nn.ReLU, layer_norm=config.layer_norm)

    def predict(self, obs: WindowObs, crops: torch.Generator | None = None) -> Plans:
        """Return the actions (B H A), with their graph. `crops`: see `WindowEncoder`."""
        raw = self.net(self.window(obs, crops)).unflatten(1, (self.spec.horizon, self.spec.action_dim))
        return (self.low + self.high) / 2 + (self.high - self.low) / 2 * raw.tanh()

    def loss(self, batch: Window, *, generator: torch.Generator) -> tuple[Scalar, Scalars]:
        """Return the mean squared error of the actions. `generator` only samples the image crops."""
        loss = F.mse_loss(self.scale * self.predict(batch.obs, generator), self.scale * batch.actions)
        return loss, {"control_mse": loss}

    @torch.no_grad()
    def act(self, obs: WindowObs, *, generator: torch.Generator) -> Plans:
        """Return the actions (B H A). Deterministic; `generator` is not used."""
        return self.predict(obs)
