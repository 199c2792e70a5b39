"""Behaviour cloning from point clouds, after ManiSkill2-Learn."""

from typing import final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from difftori.errors import ShapeError
from difftori.interfaces import Policy, PolicyConfig
from difftori.models.nets import mlp
from difftori.models.points import pooled
from difftori.policies._units import finite_box
from difftori.types import Latents, PartPlans, Scalar, Scalars, TaskSpec, Window, WindowObs


class BCPointNetConfig(PolicyConfig):
    """Settings of `BCPointNet`. ManiSkill2-Learn trains for 50,000 updates: `--updates 50000`."""

    lr: float = Field(default=3e-4, gt=0, allow_inf_nan=False)
    batch_size: int = Field(default=256, ge=1)
    clip_norm: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    point_layers: tuple[int, ...] = Field(default=(64, 128, 512), min_length=1)
    """Widths of the layers applied to each point; the last one is the number of features of a cloud."""
    hidden: tuple[int, ...] = (256,)
    """Widths of the hidden layers after the PointNet; ManiSkill2-Learn uses two of 256 for soft bodies."""


@final
class PointFeatures(nn.Module):
    """Clouds (… N C) → (… width): layers with LayerNorm and ReLU, applied to each point, then the maximum over points.

    PointNet (Qi et al., 2017) without its transforms. C is any number of columns: xyz, colours, masks.
    """

    def __init__(self, columns: int, widths: tuple[int, ...]):
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in zip((columns, *widths), widths, strict=False):
            # The normalisation has a bias, so the linear layer needs none.
            layers += [nn.Linear(inputs, outputs, bias=False), nn.LayerNorm(outputs, eps=1e-6), nn.ReLU()]
        self.points = nn.Sequential(*layers)

    def forward(self, clouds: Float[Tensor, "... N C"]) -> Float[Tensor, "... F"]:
        """Encode the clouds: (… N C) → (… F)."""
        return pooled(self.points, clouds)


@final
class BCPointNet(Policy):
    """[PointNet of each cloud, vector observations] → MLP → tanh: the executed actions, trained on their mean squared error.

    The clouds of all O observations share one PointNet; vector observations are concatenated unchanged. The last layer is
    initialised near zero, so that the untrained policy acts in the centre of the action box, which must be finite (BoxError).
    Raises ShapeError for a task without a point cloud, or with images.
    Source: ManiSkill2-Learn's BC (Gu et al., 2023), whose settings are the defaults.

    Differs from ManiSkill2-Learn: all observations are normalised to the training data's range, there only colours are.
    """

    name = "bc-pointnet"
    Config = BCPointNetConfig
    WINDOW = (1, 1, 1)
    NORMALIZES = "observations"
    FROM_PRESENT = True

    def __init__(self, config: BCPointNetConfig, spec: TaskSpec):
        super().__init__(config, spec)
        clouds = {name: entry.shape[-1] for name, entry in spec.obs.items() if len(entry.shape) == 2}
        others = {name: entry.shape for name, entry in spec.obs.items() if name not in clouds}
        strange = [name for name, shape in others.items() if len(shape) != 1]
        if strange or not clouds:
            raise ShapeError(
                "bc-pointnet needs at least one point cloud (points, columns), and otherwise vectors only; the task has "
                f"{ {name: entry.shape for name, entry in spec.obs.items()} }. Fix: choose another --obs, or another policy"
            )
        self.low: Tensor
        self.high: Tensor
        low, high = finite_box(spec, self.name)
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)
        self.clouds = nn.ModuleDict(
            {f"obs_{name}": PointFeatures(columns, config.point_layers) for name, columns in clouds.items()}
        )
        seen = len(clouds) * config.point_layers[-1] + sum(shape[0] for shape in others.values())
        self.net = mlp((spec.n_obs_steps * seen, *config.hidden, spec.n_action_steps * spec.action_dim))
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            last.weight.mul_(0.01)
            last.bias.zero_()

    def predict(self, obs: WindowObs) -> PartPlans:
        """Return the executed actions (B P A) in the task's units, with their graph."""
        raw = self.net(self._features(obs)).unflatten(1, (self.spec.n_action_steps, self.spec.action_dim))
        return (self.low + self.high) / 2 + (self.high - self.low) / 2 * raw.tanh()

    def loss(self, batch: Window, *, generator: torch.Generator) -> tuple[Scalar, Scalars]:
        """Return the mean squared error of the executed actions. `generator` is not used."""
        loss = F.mse_loss(self.predict(batch.obs), batch.actions[:, : self.spec.n_action_steps])
        return loss, {"action_mse": loss}

    @torch.no_grad()
    def act(self, obs: WindowObs, *, generator: torch.Generator) -> PartPlans:
        """Return the executed actions (B P A). Deterministic; `generator` is not used."""
        return self.predict(obs)

    def _features(self, obs: WindowObs) -> Latents:
        """Concatenate the features of all observations (B F)."""
        rows = []
        for name, values in obs.items():
            part = f"obs_{name}"
            rows.append((self.clouds[part](values) if part in self.clouds else values).flatten(1))
        return torch.cat(rows, -1)
