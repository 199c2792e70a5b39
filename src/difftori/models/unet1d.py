"""A 1-D U-Net over the steps of a plan, conditioned on the noise step and on observation features."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from difftori.errors import ShapeError
from difftori.types import Latents, Plans, RowCounts

GROUPS = 8
"""Number of groups of channels in GroupNorm."""


def step_features(step: RowCounts, width: int) -> Latents:
    """Return sin(k·ω_i) and cos(k·ω_i), concatenated, ω_i = 10000^(−i / (w/2 − 1)) for i < w/2: (B) → (B `width`).

    Source: Vaswani et al. (2017), with the frequencies of Diffusion Policy.
    """
    half = width // 2
    share = torch.arange(half, dtype=torch.float32, device=step.device) / max(half - 1, 1)
    angle = step[:, None] * torch.exp(-math.log(10_000) * share)
    return torch.cat((angle.sin(), angle.cos()), -1)


def convolution_block(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """Create convolution → GroupNorm → Mish with unchanged length: (B `inputs` L) → (B `outputs` L)."""
    return nn.Sequential(
        nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2), nn.GroupNorm(GROUPS, outputs), nn.Mish()
    )


class FiLMBlock(nn.Module):
    """x → block₂(γ ⊙ block₁(x) + δ) + W x with (γ, δ) = Linear(Mish(condition)), one γ and one δ per channel.

    Source: Perez et al. (2018), FiLM, as in Diffusion Policy. There is no W if the number of channels does not change.
    """

    def __init__(self, inputs: int, outputs: int, condition: int, kernel: int):
        super().__init__()
        self.first = convolution_block(inputs, outputs, kernel)
        self.film = nn.Sequential(nn.Mish(), nn.Linear(condition, 2 * outputs))
        self.second = convolution_block(outputs, outputs, kernel)
        self.past = nn.Identity() if inputs == outputs else nn.Conv1d(inputs, outputs, 1)

    def forward(self, x: Float[Tensor, "B C L"], condition: Latents) -> Float[Tensor, "B D L"]:
        """(B C L) → (B D L)."""
        scale, bias = self.film(condition)[..., None].chunk(2, 1)
        return self.second(scale * self.first(x) + bias) + self.past(x)


class _Level(nn.Module):
    """FiLM blocks at one length, followed by a change of length (none at the deepest level)."""

    def __init__(self, inputs: int, outputs: int, condition: int, kernel: int, blocks: int, resize: nn.Module):
        super().__init__()
        sizes = [inputs] + [outputs] * blocks
        self.blocks = nn.ModuleList(FiLMBlock(a, b, condition, kernel) for a, b in pairwise(sizes))
        self.resize = resize

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Apply the blocks without the change of length. The result is the skip connection."""
        for block in self.blocks:
            x = block(x, condition)
        return x


@final
class UNet1D(nn.Module):
    """Noisy actions (B H A), noise steps (B) and features (B F) → prediction (B H A).

    Convolutions are along H. There are `blocks` FiLM blocks (default: 2) at each of the `dims` in the encoder, which halves the
    length between them (stride 2), in the middle, and in the decoder, which has skip connections from the encoder. The
    condition is [MLP of the step's `step_features`, features].

    H is arbitrary: a halved length is rounded up, and a doubled length is cut to that of the encoder. If H is divisible by
    the halvings, this is Diffusion Policy's network (Chi et al., 2023), with the same parameters; as there, the finest level
    of the encoder has no skip connection. `blocks` = 1 is the smaller network of Simple DP3 (Ze et al., 2024).
    Raises ShapeError for `dims` that are not multiples of 8, an odd `step_width` or an even `kernel`.
    """

    def __init__(
        self,
        action_dim: int,
        features: int,
        *,
        dims: Sequence[int] = (512, 1024, 2048),
        step_width: int = 128,
        kernel: int = 5,
        blocks: int = 2,
    ):
        super().__init__()
        if not dims or any(size < 1 or size % GROUPS for size in dims):
            raise ShapeError(f"U-Net of dims {list(dims)}. Fix: pass at least one, each a multiple of {GROUPS}")
        if step_width % 2 or step_width < 2 or kernel % 2 == 0 or blocks < 1:
            raise ShapeError(
                f"U-Net with step_width {step_width}, kernel {kernel}, blocks {blocks}: step_width must be even, kernel odd, "
                "and blocks at least 1"
            )
        self.step_width = step_width
        self.step = nn.Sequential(
            nn.Linear(step_width, 4 * step_width), nn.Mish(), nn.Linear(4 * step_width, step_width)
        )
        condition, depth = step_width + features, len(dims)
        sizes = [action_dim, *dims]
        self.down = nn.ModuleList()
        for level, (inputs, outputs) in enumerate(pairwise(sizes)):
            halve = nn.Conv1d(outputs, outputs, 3, stride=2, padding=1) if level + 1 < depth else nn.Identity()
            self.down.append(_Level(inputs, outputs, condition, kernel, blocks, halve))
        deepest = dims[-1]
        self.middle = _Level(deepest, deepest, condition, kernel, blocks, nn.Identity())
        self.up = nn.ModuleList()
        for inputs, outputs in reversed(list(pairwise(dims))):
            double = nn.ConvTranspose1d(inputs, inputs, 4, stride=2, padding=1)
            self.up.append(_Level(2 * outputs, inputs, condition, kernel, blocks, double))
        self.last = nn.Sequential(convolution_block(dims[0], dims[0], kernel), nn.Conv1d(dims[0], action_dim, 1))

    def forward(self, actions: Plans, step: RowCounts, features: Latents) -> Plans:
        """(B H A), (B), (B F) → (B H A)."""
        condition = torch.cat((self.step(step_features(step, self.step_width)), features), -1)
        x = actions.transpose(1, 2)
        skips: list[Tensor] = []
        for level in self.down:
            skips.append(level(x, condition))
            x = level.get_submodule("resize")(skips[-1])
        x = self.middle(x, condition)
        for level in self.up:
            x = level(torch.cat((x, skips.pop()), 1), condition)
            x = level.get_submodule("resize")(x)[..., : skips[-1].shape[-1]]
        return self.last(x).transpose(1, 2)
