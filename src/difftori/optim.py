"""The end of every update: a guarded Adam step on named networks, and the soft update of their targets."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from difftori.errors import CheckpointError, NonFiniteError
from difftori.types import Scalar

MAX_SKIPS = 10
"""Number of consecutive steps skipped for NaN or Inf before training stops."""


class GuardedOptimizer:
    """Adam over `networks`, with the norm of the gradient clipped over all of them together.

    Networks without parameters are left out. `clip_norm` is inf by default, which means no clipping. `beta1` is the decay rate
    of Adam's average gradient, by default 0.9. Only the parameters of `networks` receive gradients.
    A step with a gradient that is not finite is skipped and counted: weights and Adam's state do not change. `MAX_SKIPS`
    consecutive skips raise NonFiniteError with the names of the networks: on the CPU at once, on a GPU at the next `check`, so
    that no step waits for the GPU.
    """

    def __init__(
        self, networks: Mapping[str, nn.Module], lr: float, clip_norm: float = math.inf, *, beta1: float = 0.9
    ):
        self.networks = {name: network for name, network in networks.items() if list(network.parameters())}
        self.parameters = [p for network in self.networks.values() for p in network.parameters()]
        self.clip_norm = clip_norm
        self.adam = torch.optim.Adam(self.parameters, lr=lr, betas=(beta1, 0.999), fused=True)
        self._skips: _Skips | None = None  # on the device of the gradients, which is known at the first step

    @property
    def skipped(self) -> int:
        """Number of skipped steps. Reads from the device."""
        return 0 if self._skips is None else int(self._skips.total)

    @property
    def consecutive_skips(self) -> int:
        """Number of skipped steps since the last valid one. Reads from the device."""
        return 0 if self._skips is None else int(self._skips.latest)

    def gradient(self, loss: Scalar, *, retain_graph: bool = False) -> list[Tensor]:
        """∂loss/∂parameters, zero for parameters that the loss does not depend on."""
        return list(torch.autograd.grad(loss, self.parameters, retain_graph=retain_graph, materialize_grads=True))

    def restricted(self, loss: Scalar) -> Scalar:
        """The loss with derivatives for `networks` only, for example so that a critic is not trained to raise its own value."""
        gradient = self.gradient(loss)
        pull = torch.stack([(part * p).sum() for part, p in zip(gradient, self.parameters, strict=True)]).sum()
        return loss.detach() + pull - pull.detach()

    def step(self, gradient: Sequence[Tensor]) -> Scalar:
        """Clip and step. Returns the norm before clipping, NaN or Inf if the step was skipped."""
        norms = torch.stack(torch._foreach_norm(list(gradient)))  # noqa: SLF001 (one fused call for all of them)
        norm = torch.linalg.vector_norm(norms)
        invalid = ~(norm < torch.inf)  # also true for NaN
        self._skips = self._skips or _Skips.none(norms)
        on_cpu, skip = norm.device.type == "cpu", None
        if on_cpu and not invalid:  # reading is free
            self._skips.latest.zero_()
        else:
            skip = invalid.float()
            self._skips.count(skip, torch.where(invalid, norms, self._skips.norms))
        if on_cpu:
            self.check()
        for parameter, part in zip(self.parameters, gradient, strict=True):
            parameter.grad = part
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        # Otherwise Adam refuses to be recorded; with it, it warns when it is not.
        self.adam.param_groups[0]["capturable"] = norm.is_cuda and torch.cuda.is_current_stream_capturing()
        # Where Adam's kernel looks up whether to leave everything as it is.
        self.adam.found_inf = skip  # pyright: ignore[reportAttributeAccessIssue]
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        return norm

    def check(self) -> None:
        """Raise NonFiniteError after `MAX_SKIPS` consecutive skipped steps. Reads from the device."""
        if self._skips is not None and self._skips.longest >= MAX_SKIPS:
            raise NonFiniteError(self._describe(self._skips.norms.tolist()))

    def changing_state(self) -> list[Tensor]:
        """The tensors that `step` changes in place, after the first step."""
        adam = [part for state in self.adam.state.values() for part in state.values()]
        return [*self.parameters, *adam, *(self._skips.tensors() if self._skips is not None else ())]

    def by_network(self, gradient: Sequence[Tensor]) -> dict[str, Tensor]:
        """The gradient of each network as one vector."""
        parts = iter(gradient)
        return {
            name: torch.cat([next(parts).flatten() for _ in network.parameters()])
            for name, network in self.networks.items()
        }

    def state_dict(self) -> dict:
        """Adam's state and the counters, without the networks, for a checkpoint."""
        return {"adam": self.adam.state_dict(), "skipped": self.skipped, "consecutive_skips": self.consecutive_skips}

    def load_state_dict(self, state: dict) -> None:
        """Restore a saved state. Raises CheckpointError if it belongs to other networks."""
        try:
            self.adam.load_state_dict(state["adam"])
            skipped, consecutive = float(state["skipped"]), float(state["consecutive_skips"])
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"the optimizer's checkpoint belongs to other networks, or another version of difftori wrote it: {error!r}. "
                "Fix: resume with the version named in versions.json, or start a new run"
            ) from error
        self._skips = _Skips.none(self.parameters[0].new_zeros(len(self.parameters)))
        self._skips.total += skipped
        self._skips.latest += consecutive

    def _describe(self, norms: Sequence[float]) -> str:
        owners = [name for name, network in self.networks.items() for _ in network.parameters()]
        broken = dict.fromkeys(name for name, norm in zip(owners, norms, strict=True) if not math.isfinite(norm))
        return (
            f"NaN or Inf in {MAX_SKIPS} consecutive updates, in the gradients of {', '.join(broken) or 'no single network'}. The "
            "weights are those of the last valid update. Fix: lower lr, or check the rewards and observations."
        )


@dataclass
class _Skips:
    """Counts of skipped steps, on the device of the gradients, and the norms (P) of the last skipped gradient by parameter."""

    total: Scalar
    latest: Scalar
    longest: Scalar
    norms: Tensor

    @classmethod
    def none(cls, norms: Tensor) -> "_Skips":
        """No step was skipped."""
        return cls(norms.new_zeros(()), norms.new_zeros(()), norms.new_zeros(()), torch.zeros_like(norms))

    def count(self, skip: Scalar, norms: Tensor) -> None:
        """Count a step. `skip`: 1 if it is skipped, otherwise 0. `norms`: of the last skipped gradient."""
        self.total += skip
        self.latest.add_(1).mul_(skip)
        torch.maximum(self.longest, self.latest, out=self.longest)
        self.norms.copy_(norms)

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [self.total, self.latest, self.longest, self.norms]


@torch.no_grad()
def soft_update(targets: Iterable[Tensor], sources: Iterable[Tensor], rate: float) -> None:
    """θ⁻ ← (1 − rate)·θ⁻ + rate·θ (Polyak averaging)."""
    if averaged := list(targets):
        torch._foreach_lerp_(averaged, list(sources), rate)  # noqa: SLF001 (one fused call for all of them)
