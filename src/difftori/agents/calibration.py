"""Compares the values that critics of observations estimate with the returns that followed."""

from collections.abc import Callable

import torch
from torch import Tensor

from difftori.types import Actions, Metrics, Observations, Rows

_MAX_ROWS = 256


@torch.no_grad()
def calibration(
    critics: Callable[[Tensor, Tensor], Tensor], obs: Observations, actions: Actions, returns: Rows
) -> Metrics:
    """The mean of min_k Q_k(o, a), that of the discounted returns (N), and their correlation. `critics`: (N *S), (N A) → (K N)."""
    batches = zip(obs.split(_MAX_ROWS), actions.split(_MAX_ROWS), strict=True)
    value = torch.cat([critics(o, a).amin(0) for o, a in batches])
    both = torch.stack([value.double(), returns.double()])
    # One agent step has no correlation, nor have constant returns: 0.
    correlation = torch.corrcoef(both)[0, 1].nan_to_num().item() if len(returns) > 1 else 0.0
    return {
        "obs_q": value.mean().item(),
        "discounted_return": returns.mean().item(),
        "obs_q_correlation": correlation,
    }
