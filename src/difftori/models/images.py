"""Encoder of images: random crops, ResNet-18 from scratch with group normalisation, spatial softmax."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from difftori.errors import ShapeError
from difftori.types import Latents

IMAGE_WIDTH = 64
"""Features of an image."""
SMALLEST = 33
"""Pixels along a side, after cropping, below which a ResNet leaves a single place, and so nothing to tell places by."""


@final
@dataclass(frozen=True)
class Images:
    """How images are seen; unless given, as Diffusion Policy sees them (Chi et al., 2023)."""

    crop: float | None = None
    """Share of height and width that is seen: anywhere in training, in the middle afterwards. Unless given 0.9 (84 → 76
    pixels, 240 → 216), and 0.875 of images of 96 (→ 84); 1: all."""
    width: int = 64
    """Channels of the network's first stage, a multiple of 16; 64 is ResNet-18."""
    keypoints: int = 32
    """Places that are looked for."""

    def __post_init__(self):
        share = 1.0 if self.crop is None else self.crop
        if self.width < 16 or self.width % 16 or self.keypoints < 1 or not 0 < share <= 1:
            raise ShapeError(
                f"images: {self}: crop must lie in (0, 1], width be a multiple of 16, and keypoints 1 or more"
            )

    def seen(self, side: int) -> int:
        """Pixels of a side that remain."""
        share = self.crop if self.crop is not None else 0.875 if side == 96 else 0.9
        return round(share * side)


class ResidualBlock(nn.Module):
    """ReLU(F(x) + W x), F: 3×3 → norm → ReLU → 3×3 → norm; W, 1×1 → norm, only where the shape changes (He et al., 2016)."""

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
    """The convolutions of ResNet-18 (He et al., 2016): (N `channels` h w) → (N 8·`width` h/32 w/32).

    GroupNorm, 16 channels to a group, stands for BatchNorm, which does not go with averaged weights (Chi et al., 2023).
    Convolutions start from He's normal distribution, fan-out.
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
    """Where K keypoints are expected: (N C h w) → (N 2K), x and y of each in [−1, 1].

    A 1×1 convolution makes K maps, a softmax over all places makes each a distribution, and its mean is what is read.
    Source: Finn et al. (2016); temperature 1 as in robomimic.
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
    """A part of each image, `height` × `width`: anywhere, drawn for each image, or without `generator` the middle."""
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
    (Chi et al., 2023), which is robomimic's (Mandlekar et al., 2021) with GroupNorm.
    """

    def __init__(self, shape: tuple[int, ...], images: Images):
        super().__init__()
        self.size = images.seen(shape[0]), images.seen(shape[1])
        if min(self.size) < SMALLEST:
            raise ShapeError(
                f"images of {shape}, of which {self.size} is seen: the network needs {SMALLEST} pixels of each side at least; "
                "show larger ones, or crop less"
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
        """(… h w C) → (… 64), of a part drawn from `generator`, or without one of the middle."""
        leading = images.shape[:-3]
        parts = cropped(images.reshape(-1, *images.shape[-3:]), *self.size, generator)
        return self.layers(2 * parts.permute(0, 3, 1, 2) - 1).reshape(*leading, IMAGE_WIDTH)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // 16, channels)
