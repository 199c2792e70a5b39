"""Encoder of windows: the last O observations by name, normalised → features (B F), for vectors and point clouds."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from difftori.models.nets import mlp
from difftori.types import Latents, TaskSpec, WindowObs

CLOUD_WIDTH = 64
"""Features of a cloud, and of a vector beside one."""


class PointNet(nn.Module):
    """Clouds (… N C) → features (… `width`): a layer-normed MLP 64, 128, 256 of each point, the maximum over points, a linear layer.

    Source: DP3 (Ze et al., 2024), which found it better than deeper point networks.
    """

    def __init__(self, columns: int, width: int = CLOUD_WIDTH):
        super().__init__()
        layers: list[nn.Module] = []
        inputs = columns
        for outputs in (64, 128, 256):
            layers += [nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.ReLU()]
            inputs = outputs
        self.points = nn.Sequential(*layers)
        self.last = nn.Sequential(nn.Linear(inputs, width), nn.LayerNorm(width))

    def forward(self, clouds: Float[Tensor, "... N C"]) -> Float[Tensor, "... F"]:
        """(… N C) → (… F)."""
        return self.last(self.points(clouds).amax(-2))


class WindowEncoder(nn.Module):
    """Normalised observations by name → one row of features (B `width`), entry after entry, oldest first in each.

    Vectors (B O S) stand in the row as they are; beside a cloud each passes S → 64 → 64 first, as in DP3. Clouds
    (B O N C) pass a `PointNet` step by step.
    """

    def __init__(self, spec: TaskSpec):
        super().__init__()
        clouds = [name for name, entry in spec.obs.items() if len(entry.shape) == 2]
        self.parts = nn.ModuleDict()
        self.width = 0
        for name, entry in spec.obs.items():
            size = entry.shape[-1]
            if name in clouds:
                self.parts[f"obs_{name}"] = PointNet(size)
                size = CLOUD_WIDTH
            elif clouds:
                self.parts[f"obs_{name}"] = mlp((size, CLOUD_WIDTH, CLOUD_WIDTH))
                size = CLOUD_WIDTH
            self.width += spec.observe * size

    def forward(self, obs: WindowObs) -> Latents:
        """By name (B O …) → (B F)."""
        rows = []
        for name, values in obs.items():
            part = f"obs_{name}"
            rows.append((self.parts[part](values) if part in self.parts else values).flatten(1))
        return torch.cat(rows, -1)
