"""Plain networks that several models and policies share."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from difftori.errors import ShapeError


def mlp(
    sizes: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU, *, layer_norm: bool = False
) -> nn.Sequential:
    """Linear layers from `sizes[0]` to `sizes[-1]`, (… sizes[0]) → (… sizes[-1]), with `activation` between them.

    The last layer stands bare: what is read from it is the caller's affair. With `layer_norm`, every layer but the
    last is followed by LayerNorm before its activation. Raises `ShapeError` for fewer than two sizes or one below 1.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ShapeError(f"mlp sizes {list(sizes)}: give an input and an output size at least, each 1 or more")
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes[:-1]):
        layers.append(nn.Linear(inputs, outputs))
        if layer_norm:
            layers.append(nn.LayerNorm(outputs))
        layers.append(activation())
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def small_init_(network: nn.Sequential) -> nn.Linear:
    """Give a network a last layer of small weights, so that it says little at first; that layer."""
    last = network[-1]
    assert isinstance(last, nn.Linear)
    nn.init.normal_(last.weight, std=0.1 / last.in_features**0.5)
    return last


def noise_like(like: Tensor, generator: torch.Generator) -> Tensor:
    """N(0, I) in the shape, the type and on the device of a tensor."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
