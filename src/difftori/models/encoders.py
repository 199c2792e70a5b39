"""Encoders of state or pixel observations (B *S) to latents (B Z)."""

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from difftori.errors import ShapeError
from difftori.models.nets import mlp
from difftori.types import AnyLatents, AnyObservations

Precision: TypeAlias = Literal["float32", "bfloat16"]


class StateEncoder(nn.Module):
    """MLP S → `hidden` → Z with ELU, the state encoder of TD-MPC (Hansen et al., 2022). Any leading dimensions."""

    def __init__(self, obs_dim: int, hidden: int, latent_dim: int):
        super().__init__()
        self.layers = mlp((obs_dim, hidden, latent_dim), nn.ELU)

    def forward(self, obs: AnyObservations) -> AnyLatents:
        """(… S) → (… Z)."""
        return self.layers(obs)


class PixelEncoder(nn.Module):
    """uint8 frames (B C h w) → /255 → four convolutions, kernels 7, 5, 3, 3 of stride 2 with ReLU → Z (Hansen et al., 2022).

    Images are stored channels-last, which was 1.5 times as fast on the measured CPU. `precision` "bfloat16" was 2.8 times as
    fast, and its results differ in the third digit. The latents have the precision of the weights.
    """

    def __init__(self, obs_shape: tuple[int, int, int], channels: int, latent_dim: int, precision: Precision):
        super().__init__()
        self.precision: Precision = precision
        layers: list[nn.Module] = []
        inputs = obs_shape[0]
        for kernel in (7, 5, 3, 3):
            layers += [nn.Conv2d(inputs, channels, kernel, stride=2), nn.ReLU()]
            inputs = channels
        self.convolutions = nn.Sequential(*layers)
        self.convolutions.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (torch's stub lacks it)
        with torch.no_grad():
            size = math.prod(self.convolutions(torch.zeros(1, *obs_shape)).shape)
        self.last = nn.Linear(size, latent_dim)

    def forward(self, obs: AnyObservations) -> AnyLatents:
        """(… C h w) → (… Z)."""
        leading = obs.shape[:-3]
        images = obs.reshape(-1, *obs.shape[-3:]).contiguous(memory_format=torch.channels_last)
        images = images.to(self.last.weight.dtype) / 255.0
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            features = self.convolutions(images)
        return self.last(features.to(self.last.weight.dtype).flatten(1)).reshape(*leading, -1)


def make_encoder(
    obs_shape: tuple[int, ...], *, hidden: int, channels: int, latent_dim: int, precision: Precision = "float32"
) -> nn.Module:
    """Create the encoder for an observation shape: (S,) states or (C, h, w) pixels. Raises ShapeError for other shapes.

    `hidden` is the width of the state encoder. `channels` and `precision` (default: float32) are those of the convolutions.
    """
    if len(obs_shape) == 1:
        return StateEncoder(obs_shape[0], hidden, latent_dim)
    if len(obs_shape) == 3:
        return PixelEncoder((obs_shape[0], obs_shape[1], obs_shape[2]), channels, latent_dim, precision)
    raise ShapeError(f"observations of shape {obs_shape} have no encoder. Fix: use states (S,) or pixels (C, h, w)")


def random_shift(images: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    """Shift each of B images (B C h w) by up to `pad` whole pixels, with repeated edges. Returns floats of the same shape.

    Source: Yarats et al. (2021), "Mastering visual continuous control" (DrQ-v2); also used in TD-MPC.
    """
    rows, _, height, width = images.shape
    padded = F.pad(images.float(), (pad, pad, pad, pad), mode="replicate")
    shifts = torch.randint(0, 2 * pad + 1, (2, rows), generator=generator, device=images.device)
    down = shifts[0, :, None] + torch.arange(height, device=images.device)
    right = shifts[1, :, None] + torch.arange(width, device=images.device)
    row = torch.arange(rows, device=images.device)[:, None, None, None]
    channel = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
    return padded[row, channel, down[:, None, :, None], right[:, None, None, :]]
