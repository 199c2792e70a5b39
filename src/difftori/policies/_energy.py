"""Energy functions of actions, their training, and the search for actions of low energy. Shared by `ibc` and `ibc-base`.

The code uses the score f(s, a) = −E(s, a), which is high for the expert's actions. It is a function of n variables: the
executed actions, in units of the training data's range. Candidates are (K B n): K for each of B rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias, final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from difftori.models.images import Images
from difftori.policies._learning import ChiLearning
from difftori.types import Count, Latents, Points, Scalar

Candidates: TypeAlias = Float[Tensor, "K B n"]
Scores: TypeAlias = Float[Tensor, "K B"]
Bounds: TypeAlias = Float[Tensor, "n"]

SMALL: dict[str, Any] = {
    "hidden": (256, 256, 256),
    "num_negatives": 64,
    "samples": 256,
    "lr": 1e-3,
    "warmup": 0,
    "batch_size": 64,
    "epochs": 100,
}
"""Settings for a CPU."""
ACTING = 2**15
"""Most candidates scored in one batch at inference, without gradients. Larger batches are not faster."""


class EnergyConfig(ChiLearning):
    """Settings of both energy-based policies. The defaults are those of Diffusion Policy's comparison."""

    batch_size: int = Field(default=128, ge=1)
    hidden: tuple[int, ...] = Field(default=(1024, 1024, 1024, 1024), min_length=1)
    """Widths of the energy's hidden layers."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout probability of the hidden layers during training."""
    at_once: int = Field(default=2**18, ge=1)
    """Most candidates, over all rows, scored in one batch. Larger training batches are split and computed twice, to bound the memory."""
    images: Images = Images()
    """Image encoder."""


@final
class EnergyNetwork(nn.Module):
    """f(s, a): an MLP with ReLU on features (B F) and actions (K B n), with dropout if a generator is given.

    The first layer's product with the features is computed once for all candidates of a row.
    """

    def __init__(self, features: int, variables: int, hidden: Sequence[int], dropout: float):
        super().__init__()
        self.dropout = dropout
        self.features = features
        self.first = nn.Linear(features + variables, hidden[0])
        self.middle = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in pairwise(hidden))
        self.last = nn.Linear(hidden[-1], 1)

    def forward(self, features: Latents, candidates: Candidates, *, generator: torch.Generator | None = None) -> Scores:
        """Score the candidates: (B F), (K B n) → (K B). Without a generator, dropout is off."""
        of_features, of_actions = self.first.weight.tensor_split((self.features,), 1)
        seen = F.linear(features, of_features, self.first.bias)
        values = self._dropped((seen + F.linear(candidates, of_actions)).relu(), generator)
        for layer in self.middle:
            values = self._dropped(layer(values).relu(), generator)
        return self.last(values).squeeze(-1)

    def in_parts(
        self, features: Latents, candidates: Candidates, *, at_once: int, generator: torch.Generator | None = None
    ) -> Scores:
        """Score the candidates in parts of at most `at_once`, counted over all rows.

        With gradients, every part is computed again in the backward pass, so that the memory is that of one part. The dropout
        masks depend on the number of parts.
        """
        learning = torch.is_grad_enabled()
        parts = _parts(candidates, at_once if learning else min(at_once, ACTING))
        if len(parts) == 1:
            return self(features, candidates, generator=generator)
        if not learning:
            return torch.cat([self(features, part, generator=generator) for part in parts])
        seeds: list[int | None] = [None] * len(parts)
        if generator is not None and self.dropout:
            seeds = torch.randint(2**62, (len(parts),), generator=generator, device=generator.device).tolist()
        scores = [
            checkpoint(self._part, features, part, seed, use_reentrant=False, preserve_rng_state=False)
            for part, seed in zip(parts, seeds, strict=True)
        ]
        return torch.cat([part for part in scores if part is not None])

    def slopes(self, features: Latents, candidates: Candidates, *, at_once: int = ACTING) -> Candidates:
        """Return ∂f/∂a (K B n) without a graph; non-finite values become zero."""
        found = []
        for part in _parts(candidates, at_once):
            with torch.enable_grad():
                points = part.detach().requires_grad_()
                found.append(torch.autograd.grad(self(features.detach(), points).sum(), points)[0])
        return torch.cat(found).nan_to_num(0.0, 0.0, 0.0)

    def steepness(self, features: Latents, candidates: Candidates, *, limit: float = 1.0) -> Scalar:
        """Return the mean of max(0, ‖∂f/∂a‖_∞ − `limit`)², a penalty for the loss. Computed for all candidates in one batch.

        Source: Florence et al. (2021) and their code.
        """
        points = candidates.detach().requires_grad_()
        (slopes,) = torch.autograd.grad(self(features, points).sum(), points, create_graph=True)
        return (slopes.abs().amax(-1) - limit).clamp_min(0).square().mean()

    def _part(self, features: Latents, part: Candidates, seed: int | None) -> Scores:
        """Score one part. It is computed again in the backward pass, with the same dropout mask from the same seed."""
        generator = None if seed is None else torch.Generator(part.device).manual_seed(seed)
        return self(features, part, generator=generator)

    def _dropped(self, values: Tensor, generator: torch.Generator | None) -> Tensor:
        """Apply dropout: zero the values with probability `dropout`, and divide the others by 1 − `dropout`."""
        if generator is None or not self.dropout:
            return values
        share = torch.rand(values.shape, generator=generator, dtype=values.dtype, device=values.device)
        return values.masked_fill(share < self.dropout, 0.0) / (1 - self.dropout)


def _parts(candidates: Candidates, at_once: int) -> tuple[Tensor, ...]:
    return candidates.split(max(1, at_once // max(1, candidates.shape[1])))


def info_nce(scores: Scores) -> tuple[Scalar, Scalar]:
    """Return −log softmax of the first candidate's score, mean over rows, and the share of rows in which it is the highest.

    Source: van den Oord et al. (2018); Florence et al. (2021), Sec. 2.
    """
    loss = -scores.log_softmax(0)[0].mean()
    return loss, (scores.detach().argmax(0) == 0).float().mean()


def uniform(count: int, rows: Count, low: Bounds, high: Bounds, generator: torch.Generator) -> Candidates:
    """Sample `count` candidates for each row, uniformly between the bounds."""
    share = torch.rand((count, rows, len(low)), generator=generator, dtype=low.dtype, device=low.device)
    return low + (high - low) * share


def around(centre: Points, count: int, std: float, low: Bounds, high: Bounds, generator: torch.Generator) -> Candidates:
    """Sample `count` candidates N(centre, std²) for each row, clamped to the bounds."""
    return (centre + std * _normal((count, *centre.shape), centre, generator)).clamp(low, high)


def best(candidates: Candidates, scores: Scores) -> Points:
    """Return the candidate with the highest score in each row (B n). A non-finite score counts as the lowest."""
    index = finite(scores).argmax(0)
    return candidates.gather(0, index[None, :, None].expand(1, -1, candidates.shape[-1])).squeeze(0)


def finite(scores: Scores) -> Scores:
    """Replace non-finite scores by the lowest representable number."""
    return scores.where(scores.isfinite(), torch.finfo(scores.dtype).min)


@final
@dataclass(frozen=True)
class DerivativeFree:
    """Derivative-free search: resample the candidates by softmax(f), perturb them by N(0, std²), multiply std by `shrink`, repeat.

    `steps` is the number of times that candidates are scored, including the caller's selection among the last ones.
    Source: Florence et al. (2021) and their code.
    """

    steps: int
    std: float
    shrink: float

    def run(
        self,
        score: Callable[[Candidates], Scores],
        candidates: Candidates,
        low: Bounds,
        high: Bounds,
        *,
        generator: torch.Generator,
        keep: int = 0,
    ) -> Candidates:
        """Return the last candidates, inside the bounds.

        With `keep`, the first `keep` candidates stay unchanged at the front, followed by the best one so far. They take part in
        the resampling like all others.
        """
        std = self.std
        for _ in range(self.steps - 1):
            scores = score(candidates)
            kept = candidates[:0]
            if keep:
                kept = torch.cat((candidates[:keep], best(candidates, scores).unsqueeze(0)))
            chosen = _resampled(candidates, scores, generator)[len(kept) :]
            moved = (chosen + std * _normal(chosen.shape, chosen, generator)).clamp(low, high)
            candidates = torch.cat((kept, moved))
            std *= self.shrink
        return candidates


@final
@dataclass(frozen=True)
class Langevin:
    """Langevin steps a ← a + clip(λ_k (½ ∂f/∂a + noise·N(0, 1)), ±limit), with λ decaying from `first` to `last` as (1 − k/(N−1))².

    `noise` 0 gives gradient ascent. Source: Florence et al. (2021) and their code, whose constants are the defaults.
    """

    steps: int
    noise: float = 1.0
    first: float = 0.1
    last: float = 1e-5
    limit: float = 0.1

    def run(
        self,
        slopes: Callable[[Candidates], Candidates],
        candidates: Candidates,
        low: Bounds,
        high: Bounds,
        *,
        generator: torch.Generator,
    ) -> Candidates:
        """Return the candidates after all steps, inside the bounds. With `noise` 0, the generator is not used."""
        for step in range(self.steps):
            rate = self.last + (self.first - self.last) * (1 - step / max(1, self.steps - 1)) ** 2
            pull = 0.5 * slopes(candidates)
            if self.noise:
                pull = pull + self.noise * _normal(candidates.shape, candidates, generator)
            candidates = (candidates + (rate * pull).clamp(-self.limit, self.limit)).clamp(low, high)
        return candidates


def _resampled(candidates: Candidates, scores: Scores, generator: torch.Generator) -> Candidates:
    """Resample the candidates of each row with replacement, with probabilities softmax(scores)."""
    ends = finite(scores).softmax(0).cumsum(0).T.contiguous()  # (B K)
    uniform = torch.rand(ends.shape, generator=generator, dtype=ends.dtype, device=ends.device)
    index = torch.searchsorted(ends, uniform * ends[:, -1:]).clamp_max(len(scores) - 1).T
    return candidates.gather(0, index.unsqueeze(-1).expand_as(candidates))


def _normal(shape: Sequence[Count], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
