"""Window encoder: the last O normalised observations by name → features (B F), for vectors, point clouds and images."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from difftori.errors import ShapeError
from difftori.models.images import IMAGE_WIDTH, ImageEncoder, Images
from difftori.models.nets import mlp
from difftori.models.points import pooled
from difftori.types import EntrySpec, Latents, TaskSpec, WindowObs

CLOUD_WIDTH = 64
"""Number of features of a point cloud, and of a vector that is observed together with one."""


class PointNet(nn.Module):
    """Clouds (… N C) → features (… `width`): an MLP 64, 128, 256 with LayerNorm per point, max pooling, a linear layer.

    Source: DP3 (Ze et al., 2024), where it was better than deeper point networks.
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
        return self.last(pooled(self.points, clouds))


class WindowEncoder(nn.Module):
    """Normalised observations by name → features (B `width`): the entries concatenated, each with its oldest step first.

    Vectors (B O S) are unchanged; if there is a cloud, an MLP S → 64 → 64 encodes them first, as in DP3. A `PointNet` encodes
    each step of clouds (B O N C), and an `ImageEncoder` images (B O h w C) in [0, 1]. Each entry has its own encoder.
    Raises ShapeError for an entry of any other type.
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
        """Observations by name (B O …) → (B F).

        In training, the random crops of images are sampled from `crops`. Without it, images are cropped at the centre.
        Without images, nothing is sampled.
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
    """Return the type of an entry, determined by its shape at one step and its dtype."""
    kinds = {(1, "float32"): "vector", (2, "float32"): "cloud", (3, "uint8"): "image", (3, "float32"): "image"}
    kind = kinds.get((len(entry.shape), entry.dtype))
    if kind is None:
        raise ShapeError(
            f"observations: the entry {name!r} of shape {entry.shape} and dtype {entry.dtype} is neither a vector (S) nor a "
            "cloud (N C) of float32 nor an image (height width channels) of uint8 or float32. Fix: omit this entry"
        )
    return kind
