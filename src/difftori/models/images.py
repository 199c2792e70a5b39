"""Image encoder: random crops, untrained ResNet-18 with group normalisation, spatial softmax."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from difftori.errors import ShapeError
from difftori.types import Latents

IMAGE_WIDTH = 64
"""Number of features of an image."""
SMALLEST = 33
"""Smallest side of a cropped image, in pixels. From smaller images, ResNet returns a single location, without positions."""


@final
@dataclass(frozen=True)
class Images:
    """Settings of the image encoder. Default: those of Diffusion Policy (Chi et al., 2023)."""

    crop: float | None = None
    """Cropped share of height and width, in (0, 1]: a random crop in training, the centre otherwise. 1: no crop. Default: 0.9
    (84 → 76 pixels, 240 → 216), and 0.875 for images of 96 pixels (→ 84)."""
    width: int = 64
    """Channels of the first stage of the ResNet, a multiple of 16. Default: 64, as in ResNet-18."""
    keypoints: int = 32
    """Number of keypoints of the spatial softmax. Default: 32."""

    def __post_init__(self):
        share = 1.0 if self.crop is None else self.crop
        if self.width < 16 or self.width % 16 or self.keypoints < 1 or not 0 < share <= 1:
            raise ShapeError(
                f"images: {self}: crop must be in (0, 1], width a multiple of 16, and keypoints at least 1"
            )

    def cropped_side(self, side: int) -> int:
        """Return the length of a side after cropping, in pixels."""
        share = self.crop if self.crop is not None else 0.875 if side == 96 else 0.9
        return round(share * side)


class ResidualBlock(nn.Module):
    """ReLU(F(x) + W x) with F: 3×3 → norm → ReLU → 3×3 → norm, and W: 1×1 → norm if the shape changes (He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            _norm(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            _norm(outputs),
        )
        self.past = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.past = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), _norm(outputs))

    def forward(self, x: Float[Tensor, "N C h w"]) -> Float[Tensor, "N D i j"]:
        """(N C h w) → (N D h/stride w/stride)."""
        return torch.relu(self.layers(x) + self.past(x))


def resnet18(channels: int, width: int = 64) -> nn.Sequential:
    """Create the convolutions of ResNet-18 (He et al., 2016): (N `channels` h w) → (N 8·`width` h/32 w/32).

    GroupNorm with 16 channels per group replaces BatchNorm, which does not work with EMA weights (Chi et al., 2023).
    Convolutions are initialised from He's normal distribution, fan-out.
    """
    stages: list[nn.Module] = [
        nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False),
        _norm(width),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
    ]
    inputs = width
    for outputs in (width, 2 * width, 4 * width, 8 * width):
        stages += [ResidualBlock(inputs, outputs, 1 if outputs == width else 2), ResidualBlock(outputs, outputs, 1)]
        inputs = outputs
    network = nn.Sequential(*stages)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return network


class SpatialSoftmax(nn.Module):
    """The expected positions of K keypoints: (N C h w) → (N 2K), x and y of each in [−1, 1].

    A 1×1 convolution computes K maps, a softmax over all locations converts each to a distribution, and the output is its
    mean. Source: Finn et al. (2016); temperature 1 as in robomimic.
    """

    def __init__(self, channels: int, keypoints: int):
        super().__init__()
        self.maps = nn.Conv2d(channels, keypoints, 1)

    def forward(self, x: Float[Tensor, "N C h w"]) -> Latents:
        """(N C h w) → (N 2K)."""
        share = self.maps(x).flatten(2).softmax(-1).unflatten(-1, x.shape[-2:])
        down, right = (torch.linspace(-1, 1, size, dtype=x.dtype, device=x.device) for size in x.shape[-2:])
        return torch.stack(((share.sum(-2) * right).sum(-1), (share.sum(-1) * down).sum(-1)), -1).flatten(1)


def cropped(
    images: Float[Tensor, "N h w C"], height: int, width: int, generator: torch.Generator | None = None
) -> Float[Tensor, "N i j C"]:
    """Crop each image to `height` × `width`: at a random position sampled from `generator`, or without it at the centre."""
    count, high, wide = images.shape[:3]
    room = high - height, wide - width
    if generator is None:
        top, left = room[0] // 2, room[1] // 2
        return images[:, top : top + height, left : left + width]
    first = [torch.randint(r + 1, (count, 1), generator=generator, device=images.device) for r in room]
    rows = first[0] + torch.arange(height, device=images.device)
    columns = first[1] + torch.arange(width, device=images.device)
    which = torch.arange(count, device=images.device)[:, None, None]
    return images[which, rows[:, :, None], columns[:, None, :]]


@final
class ImageEncoder(nn.Module):
    """Images in [0, 1] (… h w C) → crop → [−1, 1] → ResNet → spatial softmax → linear, ReLU → (… 64).

    `shape` is (h w C). Raises ShapeError for images that are too small. Source: Diffusion Policy's "hybrid" encoder
    (Chi et al., 2023), the encoder of robomimic (Mandlekar et al., 2021) with GroupNorm.
    """

    def __init__(self, shape: tuple[int, ...], images: Images):
        super().__init__()
        self.size = images.cropped_side(shape[0]), images.cropped_side(shape[1])
        if min(self.size) < SMALLEST:
            raise ShapeError(
                f"images of {shape}, cropped to {self.size}: the network needs at least {SMALLEST} pixels on each side. "
                "Fix: use larger images, or crop less"
            )
        self.layers = nn.Sequential(
            resnet18(shape[2], images.width),
            SpatialSoftmax(8 * images.width, images.keypoints),
            nn.Linear(2 * images.keypoints, IMAGE_WIDTH),
            nn.ReLU(),
        )
        self.layers.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (torch's stub lacks it)

    def forward(
        self, images: Float[Tensor, "... h w C"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "... F"]:
        """(… h w C) → (… 64). The crop is random, sampled from `generator`, or central without it."""
        leading = images.shape[:-3]
        parts = cropped(images.reshape(-1, *images.shape[-3:]), *self.size, generator)
        return self.layers(2 * parts.permute(0, 3, 1, 2) - 1).reshape(*leading, IMAGE_WIDTH)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // 16, channels)
