"""Encoders of state or pixel observations (B *S) to latents (B Z)."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from difftori.errors import ShapeError
from difftori.models.nets import mlp
from difftori.types import AnyLatents, AnyObservations

Precision: TypeAlias = Literal["auto", "float32", "bfloat16"]
"""`auto`: bfloat16 on a CUDA device, otherwise float32."""


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
        self.convolutions = _convolutions(obs_shape[0], channels, kernels=(7, 5, 3, 3), strides=(2, 2, 2, 2))
        self.last = nn.Linear(_num_features(self.convolutions, obs_shape), latent_dim)

    def forward(self, obs: AnyObservations) -> AnyLatents:
        """(… C h w) → (… Z)."""
        return self.last(_convolved(self.convolutions, obs, 0.0, self.precision))


class PixelFeatures(nn.Module):
    """uint8 frames (B C h w) → /255 − `offset` → four 3×3 convolutions of strides 2, 1, 1, 1 with ReLU → flat features F.

    The encoder of SAC-AE (Yarats et al., 2019; offset 0) and DrQ-v2 (Yarats et al., 2021; offset 0.5). `size` is F: 39,200 for
    84 × 84 images and 32 `channels`. Memory layout and `precision` are those of `PixelEncoder`.
    """

    def __init__(self, obs_shape: tuple[int, int, int], channels: int, offset: float, precision: Precision):
        super().__init__()
        self.offset = offset
        self.precision: Precision = precision
        self.convolutions = _convolutions(obs_shape[0], channels, kernels=(3, 3, 3, 3), strides=(2, 1, 1, 1))
        self.size = _num_features(self.convolutions, obs_shape)

    def forward(self, obs: AnyObservations) -> AnyLatents:
        """(… C h w) → (… F)."""
        return _convolved(self.convolutions, obs, self.offset, self.precision)


def _convolutions(inputs: int, channels: int, *, kernels: Sequence[int], strides: Sequence[int]) -> nn.Sequential:
    """Convolutions with ReLU, in the channels-last memory format."""
    layers: list[nn.Module] = []
    for kernel, stride in zip(kernels, strides, strict=True):
        layers += [nn.Conv2d(inputs, channels, kernel, stride=stride), nn.ReLU()]
        inputs = channels
    network = nn.Sequential(*layers)
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (torch's stub lacks it)
    return network


def _num_features(convolutions: nn.Sequential, obs_shape: tuple[int, int, int]) -> int:
    try:
        with torch.no_grad():
            return math.prod(convolutions(torch.zeros(1, *obs_shape)).shape)
    except RuntimeError as error:
        raise ShapeError(
            f"images {obs_shape} are too small for the convolutions ({error}). Fix: use 84 × 84"
        ) from error


def _convolved(convolutions: nn.Sequential, obs: Tensor, offset: float, precision: Precision) -> Tensor:
    """The convolutions of obs/255 − offset, in the precision of the weights: (… C h w) → (… F)."""
    leading, dtype = obs.shape[:-3], next(convolutions.parameters()).dtype
    half = precision == "bfloat16" or (precision == "auto" and obs.is_cuda)
    images = obs.reshape(-1, *obs.shape[-3:]).contiguous(memory_format=torch.channels_last)
    images = images.to(torch.bfloat16 if half else dtype) / 255.0
    with torch.autocast(obs.device.type, torch.bfloat16) if half else nullcontext():
        features = convolutions(images - offset if offset else images)
    return features.to(dtype).flatten(1).reshape(*leading, -1)


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
    """Shift each image of (… C h w) by up to `pad` whole pixels, with repeated edges. The result is stored channels-last.

    Source: Yarats et al. (2021), "Mastering visual continuous control" (DrQ-v2); also used in TD-MPC.
    """
    leading, (height, width), device = images.shape[:-3], images.shape[-2:], images.device
    shifts = torch.randint(0, 2 * pad + 1, (2, math.prod(leading)), generator=generator, device=device) - pad
    down, right = shifts.view(2, *leading, 1)
    row = (down + torch.arange(height, device=device)).clamp(0, height - 1)
    column = (right + torch.arange(width, device=device)).clamp(0, width - 1)
    # Whole pixels of C bytes are copied, from wherever they are: no padded copy, no conversion to floats.
    which = torch.meshgrid(*(torch.arange(size, device=device) for size in leading), indexing="ij")
    pixels = images.movedim(-3, -1)
    shifted = pixels[(*(index[..., None, None] for index in which), row.unsqueeze(-1), column.unsqueeze(-2))]
    return shifted.movedim(-1, -3)
