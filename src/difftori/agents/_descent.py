"""One guarded Adam step on named networks: what every update of an agent ends with."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from difftori.errors import CheckpointError, NonFiniteError
from difftori.types import Scalar

MAX_SKIPS = 10
"""So many steps in a row may be passed over for NaN or Inf before training stops."""


class Descent:
    """Adam over `networks`, with the gradient's norm clipped over all of them together.

    A gradient or loss that is not finite leaves every weight as it is and is counted; `MAX_SKIPS` in a row raise
    NonFiniteError with the networks' names. Gradients go nowhere else: other tensors that the loss used keep theirs.
    """

    def __init__(self, networks: Mapping[str, nn.Module], lr: float, clip_norm: float):
        self.networks = dict(networks)
        self.parameters = [p for network in self.networks.values() for p in network.parameters()]
        self.clip_norm = clip_norm
        self.adam = torch.optim.Adam(self.parameters, lr=lr, fused=True)
        self.skipped, self.in_a_row = 0, 0

    def gradient(self, loss: Scalar, *, retain_graph: bool = False) -> list[Tensor]:
        """∂loss/∂parameters, zero where the loss does not depend on one."""
        return list(torch.autograd.grad(loss, self.parameters, retain_graph=retain_graph, materialize_grads=True))

    def step(self, gradient: Sequence[Tensor]) -> float:
        """Clip and step; the norm before clipping, NaN or Inf if the step was passed over."""
        norm = torch.nn.utils.get_total_norm(gradient)
        if not bool(norm.isfinite()):
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            if self.in_a_row >= MAX_SKIPS:
                raise NonFiniteError(self._blame(gradient))
            return norm.item()
        self.in_a_row = 0
        for parameter, part in zip(self.parameters, gradient, strict=True):
            parameter.grad = part
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        return norm.item()

    def by_network(self, gradient: Sequence[Tensor]) -> dict[str, Tensor]:
        """The gradient of each network as one vector."""
        parts = iter(gradient)
        return {
            name: torch.cat([next(parts).flatten() for _ in network.parameters()])
            for name, network in self.networks.items()
        }

    def state(self) -> dict:
        """All of it but the networks, for a checkpoint."""
        return {"adam": self.adam.state_dict(), "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load(self, state: dict) -> None:
        """Put a saved state back. Raises CheckpointError if it is of other networks."""
        try:
            self.adam.load_state_dict(state["adam"])
            self.skipped, self.in_a_row = int(state["skipped"]), int(state["in_a_row"])
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"the optimiser's checkpoint does not fit these networks: {error}") from error

    def _blame(self, gradient: Sequence[Tensor]) -> str:
        broken = [name for name, part in self.by_network(gradient).items() if not bool(part.isfinite().all())]
        return (
            f"NaN or Inf in {MAX_SKIPS} updates in a row, in the gradients of {', '.join(broken) or 'none alone'}. The "
            "weights are those of the last good update: lower lr, or look at the rewards and observations"
        )


@torch.no_grad()
def follow(targets: Iterable[Tensor], sources: Iterable[Tensor], rate: float) -> None:
    """θ⁻ ← (1 − rate)·θ⁻ + rate·θ (Polyak averaging)."""
    torch._foreach_lerp_(list(targets), list(sources), rate)  # noqa: SLF001 (one fused call for all of them)
