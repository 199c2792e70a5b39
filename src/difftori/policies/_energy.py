"""Energies of actions, how they are learned, and how actions of low energy are found: what IBC's policies share.

All is written for the score f(s, a) = −E(s, a), which is high where the expert would act, over n variables: the actions
that are executed, in units of the training data's range. Candidates are (K B n): K of each of B rows.
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
from difftori.types import Latents, Points, Scalar

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
"""Candidates that are scored at once where no gradient is wanted; more fill a machine no better."""


class EnergyConfig(ChiLearning):
    """Settings that both policies have. The defaults are those of Diffusion Policy's comparison."""

    batch_size: int = Field(128, ge=1)
    hidden: tuple[int, ...] = Field((1024, 1024, 1024, 1024), min_length=1)
    """Widths of the energy's hidden layers."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Share of the hidden values that is dropped in training."""
    at_once: int = Field(2**18, ge=1)
    """Candidates of all rows that are scored at once. Training on more computes everything twice, to bound the memory."""
    images: Images = Images()
    """How images are seen."""


@final
class ActionScore(nn.Module):
    """f(s, a): an MLP with ReLU of features (B F) and actions (K B n), with dropout where a generator is given.

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
        """(B F), (K B n) → (K B). Without a generator nothing is dropped."""
        of_features, of_actions = self.first.weight.tensor_split((self.features,), 1)
        seen = F.linear(features, of_features, self.first.bias)
        values = self._dropped((seen + F.linear(candidates, of_actions)).relu(), generator)
        for layer in self.middle:
            values = self._dropped(layer(values).relu(), generator)
        return self.last(values).squeeze(-1)

    def in_parts(
        self, features: Latents, candidates: Candidates, *, at_once: int, generator: torch.Generator | None = None
    ) -> Scores:
        """The same, `at_once` rows and candidates together: with a gradient, every part is computed twice.

        So the memory is that of one part. What is dropped depends on how many parts there are.
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
        """∂f/∂a (K B n) without a graph; zero where it is not finite."""
        found = []
        for part in _parts(candidates, at_once):
            with torch.enable_grad():
                points = part.detach().requires_grad_()
                found.append(torch.autograd.grad(self(features.detach(), points).sum(), points)[0])
        return torch.cat(found).nan_to_num(0.0, 0.0, 0.0)

    def steepness(self, features: Latents, candidates: Candidates, *, limit: float = 1.0) -> Scalar:
        """Mean of max(0, ‖∂f/∂a‖_∞ − `limit`)², to be added to the loss. Computed at once.

        Source: Florence et al. (2021) and their code.
        """
        points = candidates.detach().requires_grad_()
        (slopes,) = torch.autograd.grad(self(features, points).sum(), points, create_graph=True)
        return (slopes.abs().amax(-1) - limit).clamp_min(0).square().mean()

    def _part(self, features: Latents, part: Candidates, seed: int | None) -> Scores:
        """One part. It is computed again in the backward pass, and draws the same from the same seed."""
        generator = None if seed is None else torch.Generator(part.device).manual_seed(seed)
        return self(features, part, generator=generator)

    def _dropped(self, values: Tensor, generator: torch.Generator | None) -> Tensor:
        """Without a share `dropout` of the values, the others greater by as much."""
        if generator is None or not self.dropout:
            return values
        draws = torch.rand(values.shape, generator=generator, dtype=values.dtype, device=values.device)
        return values.masked_fill(draws < self.dropout, 0.0) / (1 - self.dropout)


def _parts(candidates: Candidates, at_once: int) -> tuple[Tensor, ...]:
    return candidates.split(max(1, at_once // max(1, candidates.shape[1])))


def info_nce(scores: Scores) -> tuple[Scalar, float]:
    """−log softmax of the first candidate's score, mean over rows; and the share of rows where it is the highest.

    Source: van den Oord et al. (2018); Florence et al. (2021), Sec. 2.
    """
    loss = -scores.log_softmax(0)[0].mean()
    return loss, (scores.detach().argmax(0) == 0).float().mean().item()


def uniform(count: int, rows: int, low: Bounds, high: Bounds, generator: torch.Generator) -> Candidates:
    """So many candidates of each row, anywhere between the bounds."""
    draws = torch.rand((count, rows, len(low)), generator=generator, dtype=low.dtype, device=low.device)
    return low + (high - low) * draws


def around(centre: Points, count: int, std: float, low: Bounds, high: Bounds, generator: torch.Generator) -> Candidates:
    """So many candidates N(centre, std²) of each row, kept between the bounds."""
    return (centre + std * _normal((count, *centre.shape), centre, generator)).clamp(low, high)


def best(candidates: Candidates, scores: Scores) -> Points:
    """The candidate of highest score in each row (B n); a score that is not finite counts as the lowest."""
    index = finite(scores).argmax(0)
    return candidates.gather(0, index[None, :, None].expand(1, -1, candidates.shape[-1])).squeeze(0)


def finite(scores: Scores) -> Scores:
    """Scores, the lowest number there is for those that are not finite."""
    return scores.where(scores.isfinite(), torch.finfo(scores.dtype).min)


@final
@dataclass(frozen=True)
class DerivativeFree:
    """Resample the candidates by softmax(f), move them by N(0, std²), `shrink` std, and so on.

    `steps` counts how often candidates are scored, the caller's choice among the last ones included.
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
        """The last candidates, between the bounds; with `keep`, behind the first so many, unmoved, and the best so far.

        Those that are kept are not told from others in the resampling.
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
    """a ← a + clip(λ_k (½ ∂f/∂a + noise·N(0, 1)), ±limit), λ falling from `first` to `last` as (1 − k/(N−1))².

    With `noise` 0 it climbs. Source: Florence et al. (2021) and their code, whose constants are the defaults.
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
        """The candidates after all steps, between the bounds. Nothing is drawn without noise."""
        for step in range(self.steps):
            rate = self.last + (self.first - self.last) * (1 - step / max(1, self.steps - 1)) ** 2
            pull = 0.5 * slopes(candidates)
            if self.noise:
                pull = pull + self.noise * _normal(candidates.shape, candidates, generator)
            candidates = (candidates + (rate * pull).clamp(-self.limit, self.limit)).clamp(low, high)
        return candidates


def _resampled(candidates: Candidates, scores: Scores, generator: torch.Generator) -> Candidates:
    """As many candidates again, drawn with replacement by softmax(scores), row by row."""
    ends = finite(scores).softmax(0).cumsum(0).T.contiguous()  # (B K)
    uniform = torch.rand(ends.shape, generator=generator, dtype=ends.dtype, device=ends.device)
    index = torch.searchsorted(ends, uniform * ends[:, -1:]).clamp_max(len(scores) - 1).T
    return candidates.gather(0, index.unsqueeze(-1).expand_as(candidates))


def _normal(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
