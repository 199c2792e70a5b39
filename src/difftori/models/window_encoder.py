"""Encoder of windows: the last O observations by name, normalised → features (B F), for vectors, clouds and images."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from difftori.errors import ShapeError
from difftori.models.images import IMAGE_WIDTH, ImageEncoder, Images
from difftori.models.nets import mlp
from difftori.types import EntrySpec, Latents, TaskSpec, WindowObs

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
    (B O N C) pass a `PointNet` step by step, images (B O h w C) in [0, 1] a `ImageEncoder`, one for each entry.
    Raises ShapeError for an entry that is none of these.
    """

    def __init__(self, spec: TaskSpec, images: Images | None = None):
        super().__init__()
        kinds = {name: _kind(name, entry) for name, entry in spec.obs.items()}
        self.parts = nn.ModuleDict()
        self.width = 0
        for name, entry in spec.obs.items():
            size = entry.shape[-1]
            if kinds[name] == "cloud":
                self.parts[f"obs_{name}"] = PointNet(size)
                size = CLOUD_WIDTH
            elif kinds[name] == "image":
                self.parts[f"obs_{name}"] = ImageEncoder(entry.shape, images or Images())
                size = IMAGE_WIDTH
            elif "cloud" in kinds.values():
                self.parts[f"obs_{name}"] = mlp((size, CLOUD_WIDTH, CLOUD_WIDTH))
                size = CLOUD_WIDTH
            self.width += spec.n_obs_steps * size

    def forward(self, obs: WindowObs, crops: torch.Generator | None = None) -> Latents:
        """By name (B O …) → (B F).

        In training, `crops` draws the part of each image that is seen; without it, it is the middle. Without images
        nothing is drawn.
        """
        rows = []
        for name, values in obs.items():
            key = f"obs_{name}"
            if key in self.parts:
                part = self.parts[key]
                values = part(values, crops) if isinstance(part, ImageEncoder) else part(values)
            rows.append(values.flatten(1))
        return torch.cat(rows, -1)


def _kind(name: str, entry: EntrySpec) -> str:
    """What an entry is, by its shape at one step and its dtype."""
    kinds = {(1, "float32"): "vector", (2, "float32"): "cloud", (3, "uint8"): "image"}
    kind = kinds.get((len(entry.shape), entry.dtype))
    if kind is None:
        raise ShapeError(
            f"observations: the entry {name!r} of shape {entry.shape} and dtype {entry.dtype} is neither a vector (S) nor a "
            "cloud (N C) of float32 nor an image (height width channels) of uint8; leave it out"
        )
    return kind
