"""Small networks that several models and policies share."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from difftori.errors import ShapeError
from difftori.types import Latents


def mlp(
    sizes: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU, *, layer_norm: bool = False
) -> nn.Sequential:
    """Create linear layers with `activation` (default: ReLU) between them: (… sizes[0]) → (… sizes[-1]).

    The last layer has no activation. With `layer_norm` (default: False), LayerNorm follows every layer except the last,
    before the activation. Raises `ShapeError` for fewer than two sizes, or a size below 1.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ShapeError(f"mlp sizes {list(sizes)}. Fix: pass at least an input and an output size, each 1 or more")
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes[:-1]):
        layers.append(nn.Linear(inputs, outputs))
        if layer_norm:
            layers.append(nn.LayerNorm(outputs))
        layers.append(activation())
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def nan_where_broken(actions: Tensor, latent: Latents) -> Tensor:
    """The actions (B …), NaN in rows whose latent state (B Z) is not finite: a solve from there would return its start as if it were a plan."""
    sound = latent.isfinite().all(-1)
    return actions.where(sound.view(-1, *(1,) * (actions.ndim - 1)), torch.nan)


def small_init_(network: nn.Sequential) -> nn.Linear:
    """Initialise the last layer of a network with small weights, so that its initial outputs are small. Return that layer."""
    last = network[-1]
    assert isinstance(last, nn.Linear)
    nn.init.normal_(last.weight, std=0.1 / last.in_features**0.5)
    return last


def noise_like(like: Tensor, generator: torch.Generator) -> Tensor:
    """Sample N(0, I) with the shape, dtype and device of a tensor."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def softplus_inverse(value: float) -> Tensor:
    """Return x with softplus(x) = `value` > 0, a scalar."""
    return torch.tensor(value).expm1().log()
