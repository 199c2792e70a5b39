"""The end of every update: a guarded optimizer step, and the soft update of target networks."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from difftori.errors import CheckpointError, NonFiniteError
from difftori.types import Scalar

MAX_SKIPS = 10
"""Number of consecutive steps skipped for NaN or Inf before training stops."""


class Guard:
    """Clips the gradient's norm and steps an optimizer, or skips the step if the gradient is NaN or Inf.

    `clip_norm` is inf by default, which means no clipping. A skipped step is counted and changes neither the weights nor the
    optimizer's state. On a GPU the decision is made there if the optimizer is fused (`waits`), so that no step waits for the GPU.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, clip_norm: float = math.inf):
        self.inner, self.clip_norm = optimizer, clip_norm
        self.parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self.skip: Scalar | None = None
        """Of the last step: 1 if it was skipped, 0 if not; None if it is known that it was not."""
        self._skips: _Skips | None = None  # on the device of the gradients, which is known at the first step

    @property
    def skipped(self) -> int:
        """Number of skipped steps. Reads from the device."""
        return 0 if self._skips is None else int(self._skips.total)

    @property
    def consecutive_skips(self) -> int:
        """Number of skipped steps since the last valid one. Reads from the device."""
        return 0 if self._skips is None else int(self._skips.latest)

    @property
    def failed(self) -> bool:
        """Whether `MAX_SKIPS` consecutive steps were skipped. Reads from the device."""
        return self._skips is not None and bool(self._skips.longest >= MAX_SKIPS)

    def waits(self, device: torch.device) -> bool:
        """Whether a step on this device waits for the gradient's norm. It does on a CPU, where that costs nothing, and with an optimizer that is not fused."""
        return device.type == "cpu" or not self.inner.defaults.get("fused")

    def apply(self, loss: Scalar | None = None) -> Scalar:
        """Clip the parameters' `grad` and step, unless the norm or `loss` is NaN or Inf. Returns the norm before clipping.

        Parameters whose `grad` is None do not change. Without any gradient, nothing happens, and the norm is 0.
        """
        stepped = [p for p in self.parameters if p.grad is not None]
        if not stepped:
            self.skip = None
            return self.parameters[0].new_zeros(())
        gradients = [p.grad for p in stepped if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))  # noqa: SLF001 (one fused call for all of them)
        norm = torch.linalg.vector_norm(norms)
        watched = norm if loss is None else norm + 0.0 * loss.detach().reshape(())  # Inf times 0 is NaN
        counts = self._skips = self._skips or _Skips.none(norms.new_zeros(len(self.parameters)))
        waits, skip = self.waits(norm.device), None
        if waits and math.isfinite(watched.item()):
            counts.latest.zero_()
        else:
            invalid = ~(watched < torch.inf)  # also true for NaN
            skip = invalid.to(norms)
            counts.count(skip, torch.where(invalid, self._of_all(norms), counts.norms))
        self.skip = skip
        if waits and skip is not None:
            return norm
        if self.clip_norm < math.inf:
            torch.nn.utils.clip_grads_with_norm_(stepped, self.clip_norm, norm)
        # Otherwise Adam refuses to be recorded; with it, it warns when it is not.
        recording = norm.is_cuda and torch.cuda.is_current_stream_capturing()
        for group in self.inner.param_groups:
            group["capturable"] = recording
        # Where Adam's kernel looks up whether to leave everything as it is.
        self.inner.found_inf = skip  # pyright: ignore[reportAttributeAccessIssue]
        self.inner.step()
        return norm

    def broken(self) -> list[int]:
        """The parameters, by number, whose gradients were NaN or Inf at the last skipped step. Reads from the device."""
        norms = [] if self._skips is None else self._skips.norms.tolist()
        return [number for number, norm in enumerate(norms) if not math.isfinite(norm)]

    def changing_state(self) -> list[Tensor]:
        """The tensors that a step changes in place, after the first step."""
        parts = [p for state in self.inner.state.values() for p in state.values() if isinstance(p, Tensor)]
        return [*self.parameters, *parts, *(self._skips.tensors() if self._skips is not None else ())]

    def state_dict(self) -> dict:
        """The optimizer's state and the counters, without the weights, for a checkpoint."""
        return {
            "optimizer": self.inner.state_dict(),
            "skipped": self.skipped,
            "consecutive_skips": self.consecutive_skips,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore a saved state. Raises CheckpointError if it belongs to other networks."""
        try:
            self.inner.load_state_dict(state["optimizer"])
            skipped, consecutive = float(state["skipped"]), float(state["consecutive_skips"])
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"the optimizer's checkpoint belongs to other networks, or another version of difftori wrote it: {error!r}. "
                "Fix: resume with the version named in versions.json, or start a new run"
            ) from error
        self._skips = _Skips.none(self.parameters[0].new_zeros(len(self.parameters)))
        self._skips.total += skipped
        self._skips.latest += consecutive

    def _of_all(self, norms: Tensor) -> Tensor:
        """The norms by parameter (P), zero for those without a gradient."""
        if len(norms) == len(self.parameters):
            return norms
        rows = iter(norms.unbind())
        return torch.stack([norms.new_zeros(()) if p.grad is None else next(rows) for p in self.parameters])


class GuardedOptimizer(Guard):
    """Adam over `networks`, with the norm of the gradient clipped over all of them together.

    Networks without parameters are left out. `beta1` is the decay rate of Adam's average gradient, by default 0.9. Only the
    parameters of `networks` receive gradients. `MAX_SKIPS` consecutive skips raise NonFiniteError with the names of the
    networks: on the CPU at once, on a GPU at the next `check`.
    """

    def __init__(
        self, networks: Mapping[str, nn.Module], lr: float, clip_norm: float = math.inf, *, beta1: float = 0.9
    ):
        self.networks = {name: network for name, network in networks.items() if list(network.parameters())}
        parameters = [p for network in self.networks.values() for p in network.parameters()]
        super().__init__(torch.optim.Adam(parameters, lr=lr, betas=(beta1, 0.999), fused=True), clip_norm)

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
        for parameter, part in zip(self.parameters, _separate(self.parameters, gradient), strict=True):
            parameter.grad = part
        norm = self.apply()
        if norm.device.type == "cpu":
            self.check()
        self.inner.zero_grad(set_to_none=True)
        return norm

    def check(self) -> None:
        """Raise NonFiniteError after `MAX_SKIPS` consecutive skipped steps. Reads from the device."""
        if self.failed:
            owners = [name for name, network in self.networks.items() for _ in network.parameters()]
            names = dict.fromkeys(owners[number] for number in self.broken())
            raise NonFiniteError(
                f"NaN or Inf in {MAX_SKIPS} consecutive updates, in the gradients of {', '.join(names) or 'no single network'}. The "
                "weights are those of the last valid update. Fix: lower lr, or check the rewards and observations."
            )

    def by_network(self, gradient: Sequence[Tensor]) -> dict[str, Tensor]:
        """The gradient of each network as one vector."""
        parts = iter(gradient)
        return {
            name: torch.cat([next(parts).flatten() for _ in network.parameters()])
            for name, network in self.networks.items()
        }


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


def _separate(parameters: Sequence[Tensor], gradient: Sequence[Tensor]) -> list[Tensor]:
    """The parts of a gradient in the memory layout of the parameters, and each in memory of its own.

    Otherwise, a fused step reads a transposed part wrongly, and clipping scales a shared one twice.
    """
    seen: set[int] = set()
    parts = []
    for parameter, part in zip(parameters, gradient, strict=True):
        alone = part.stride() == parameter.stride() and part.data_ptr() not in seen
        seen.add(part.data_ptr())
        parts.append(part if alone else torch.empty_like(parameter).copy_(part))
    return parts


@torch.no_grad()
def soft_update(targets: Iterable[Tensor], sources: Iterable[Tensor], rate: Scalar | float) -> None:
    """θ⁻ ← (1 − rate)·θ⁻ + rate·θ (Polyak averaging)."""
    if averaged := list(targets):
        # fused calls for all of them
        if not isinstance(rate, Tensor):
            torch._foreach_lerp_(averaged, list(sources), rate)  # noqa: SLF001
            return
        change = torch._foreach_sub(list(sources), averaged)  # noqa: SLF001
        torch._foreach_mul_(change, rate)  # noqa: SLF001
        torch._foreach_add_(averaged, change)  # noqa: SLF001
