"""Max pooling over the points of clouds, for the encoders that apply the same layers to each point."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

_CLOUDS_AT_ONCE = 2
"""Number of clouds whose activations are computed together on the CPU, so that they stay in its cache."""


def pooled(layers: nn.Sequential, clouds: Float[Tensor, "... N C"]) -> Float[Tensor, "... F"]:
    """Return `layers(clouds).amax(-2)`: layers that are applied to each point (C → F), then the maximum over the N points.

    On the CPU, only points that attain the maximum of a feature have a graph, PointNet's critical points (Qi et al., 2017, section
    4.3), at most F of each cloud; the gradient of all others is zero. The values are those of the plain computation, the gradients
    up to rounding. Of points that are equal, one gets the gradient of all.
    """
    # Traced for an export, sizes are symbols, which must not be split.
    traced = torch.compiler.is_compiling() or any(isinstance(size, torch.SymInt) for size in clouds.shape)
    if clouds.device.type != "cpu" or traced or not clouds.numel() or is_functorch_wrapped_tensor(clouds):
        return layers(clouds).amax(-2)
    rows = clouds.reshape(-1, *clouds.shape[-2:])
    graph = torch.is_grad_enabled() and (clouds.requires_grad or any(p.requires_grad for p in layers.parameters()))
    found = _critical(layers, rows) if graph else _in_parts(layers, rows)
    return found.reshape(*clouds.shape[:-2], -1)


def _in_parts(layers: nn.Sequential, rows: Float[Tensor, "B N C"]) -> Float[Tensor, "B F"]:
    return torch.cat([layers(part).amax(-2) for part in rows.split(_CLOUDS_AT_ONCE)])


def _critical(layers: nn.Sequential, rows: Float[Tensor, "B N C"]) -> Float[Tensor, "B F"]:
    with torch.no_grad():
        best = torch.cat([layers(part).argmax(-2) for part in rows.split(_CLOUDS_AT_ONCE)])  # (B F)
        chosen = torch.zeros(rows.shape[:2], dtype=torch.bool).scatter_(1, best, True)
        place = (chosen.flatten().cumsum(0) - 1).view(chosen.shape)  # of each chosen point among all
    return layers(rows[chosen]).gather(0, place.gather(1, best))
