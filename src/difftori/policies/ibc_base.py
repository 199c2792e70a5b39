"""Implicit behavioural cloning on a base policy: the energy of IBC, searched around the base's actions."""

from functools import partial
from typing import Any, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor

from difftori.models.nets import noise_like
from difftori.models.window_encoder import WindowEncoder
from difftori.policies._energy import (
    SMALL,
    Candidates,
    DerivativeFree,
    EnergyConfig,
    EnergyNetwork,
    Langevin,
    around,
    best,
    finite,
    info_nce,
    uniform,
)
from difftori.policies._units import normalized_bounds
from difftori.policies.refiner import Refiner, RefinerConfig
from difftori.types import Latents, PartPlans, Plans, Points, Scalar, Scalars, TaskSpec, Window, WindowObs


class IBCBaseConfig(EnergyConfig, RefinerConfig):
    """Settings of `IBCBase`. The energy is that of `ibc`; the use of the base is our interpretation, because the paper does not describe it."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {},
        "small": SMALL,
    }
    preset: str = "paper"
    """Preset of settings. `paper`: the sizes of `ibc`. `small`: for a CPU."""
    epochs: int = Field(default=300, ge=1)
    num_negatives: int = Field(default=1024, ge=4)
    """Number of negative samples per row: the base's action, and others in the shares `--near-base` and `--near-expert`."""
    near_base: float = Field(default=0.5, ge=0, le=1)
    """Share of the negative samples around the base's action."""
    near_expert: float = Field(default=0.25, ge=0, le=1)
    """Share of the negative samples around the expert's action. The remaining ones are uniform."""
    negative_std: float = Field(default=0.3, gt=0)
    """Largest standard deviation σ of the negative samples around an action, in half-widths of the training data's range. The σ of
    each one is sampled uniformly up to this value."""
    positive_noise: float = Field(default=1e-4, ge=0)
    """Standard deviation σ of Gaussian noise on the expert's action, in half-widths of the training data's range."""
    inference: Literal["derivative-free", "gradient"] = "derivative-free"
    """Search for a better action: among candidates around the base's action (`derivative-free`), or by gradient steps from it,
    without noise (`gradient`)."""
    samples: int = Field(default=1024, ge=2)
    """Number of candidates of each row at inference, always including the base's action."""
    search_steps: int = Field(default=5, ge=1)
    """Number of times that derivative-free inference scores its candidates."""
    search_std: float = Field(default=0.05, ge=0)
    """Standard deviation of the initial candidates around the base's action, and of their perturbation after the first resampling, in
    half-widths of the training data's range."""
    search_shrink: float = Field(default=0.5, gt=0, le=1)
    """Factor on `--search-std` after each resampling."""
    gradient_steps: int = Field(default=10, ge=1)
    """Number of steps of `--inference gradient`, each at most a tenth of a half-width of the training data's range."""
    advantage: float = Field(default=0.0, ge=0)
    """Energy difference, in nats, that is required to replace the base's action."""


@final
class IBCBase(Refiner):
    """â = the action of least energy E_θ(s, a) found near the base's action, which is always a candidate.

    E is that of `ibc`, over all executed actions as one vector, trained with InfoNCE: the expert's actions against the base's
    own, others around the base's and around the expert's, and uniform ones. If no candidate has less energy than the base's
    actions, they are returned bit for bit: the policy can decline to refine.

    Wan et al. (2024) report IBC on a base policy and do not describe it; this is our interpretation.
    """

    name = "ibc-base"
    Config = IBCBaseConfig
    STOCHASTIC = True

    def __init__(self, config: IBCBaseConfig, spec: TaskSpec):
        super().__init__(config, spec)
        self.settings = config
        self.low: Tensor
        self.high: Tensor
        low, high = normalized_bounds(spec)
        self.register_buffer("low", low.repeat(spec.n_action_steps), persistent=False)
        self.register_buffer("high", high.repeat(spec.n_action_steps), persistent=False)
        self.window = WindowEncoder(spec, config.images)
        variables = spec.n_action_steps * spec.action_dim
        self.score = EnergyNetwork(self.window.width, variables, config.hidden, config.dropout)
        self.search = DerivativeFree(config.search_steps, config.search_std, config.search_shrink)
        self.climb = Langevin(config.gradient_steps, noise=0.0)

    def loss(self, batch: Window, *, generator: torch.Generator) -> tuple[Scalar, Scalars]:
        """Return the InfoNCE loss. Metrics: the shares of rows whose expert action has the least energy, and less than the base's."""
        target = self._executed(batch.actions)
        base = self._executed(self.choose_base(batch, generator))
        noise = noise_like(target, generator)
        expert = target + self.settings.positive_noise * noise
        negatives = self._negatives(base, target, generator)
        candidates = torch.cat((expert.unsqueeze(0), base.unsqueeze(0), negatives))
        features = self.window(batch.obs, generator)
        scores = self.score.in_parts(features, candidates, at_once=self.settings.at_once, generator=generator)
        loss, found = info_nce(scores)
        over_base = (scores[0] > scores[1]).float().mean()
        return loss, {"info_nce": loss, "expert_first": found, "expert_over_base": over_base}

    @torch.no_grad()
    def act(self, obs: WindowObs, base: Plans | None = None, *, generator: torch.Generator) -> PartPlans:
        """Return the executed actions (B P A): the base's, replaced in rows where a better candidate was found."""
        assert base is not None
        executed = base[:, : self.spec.n_action_steps]
        features = self.window(obs)
        candidates = self._candidates(features, executed.flatten(1), generator)
        scores = finite(self.score.in_parts(features, candidates, at_once=self.settings.at_once))
        # Equal energies may differ by rounding; in a tie, the base's action is used.
        rounding = 32 * torch.finfo(scores.dtype).eps * scores[0].abs().clamp_min(1.0)
        better = scores.amax(0) > scores[0] + self.settings.advantage + rounding
        return torch.where(better[:, None, None], best(candidates, scores).reshape(executed.shape), executed)

    def _candidates(self, features: Latents, base: Points, generator: torch.Generator) -> Candidates:
        """Return the candidates, the base's actions first."""
        bounds, settings = (self.low, self.high), self.settings
        if settings.inference == "gradient":
            slopes = partial(self.score.slopes, features)
            return torch.cat(
                (base.unsqueeze(0), self.climb.run(slopes, base.unsqueeze(0), *bounds, generator=generator))
            )
        others = around(base, settings.samples - 1, settings.search_std, *bounds, generator)
        score = partial(self.score.in_parts, features, at_once=settings.at_once)
        return self.search.run(score, torch.cat((base.unsqueeze(0), others)), *bounds, generator=generator, keep=1)

    def _negatives(self, base: Points, target: Points, generator: torch.Generator) -> Candidates:
        """Sample the negatives except the base's own action: around it, around the expert's, and uniform."""
        settings = self.settings
        count = settings.num_negatives - 1
        by_base = round(settings.near_base * count)
        by_expert = min(round(settings.near_expert * count), count - by_base)
        bounds = self.low, self.high
        near = torch.cat((base.expand(by_base, -1, -1), target.expand(by_expert, -1, -1)))
        share = torch.rand((*near.shape[:2], 1), generator=generator, dtype=near.dtype, device=near.device)
        noise = noise_like(near, generator)
        near = (near + settings.negative_std * share * noise).clamp(*bounds)
        return torch.cat((near, uniform(count - by_base - by_expert, len(base), *bounds, generator)))

    def _executed(self, actions: Plans) -> Points:
        """Return the executed part of actions (B H A) as one vector per row (B n)."""
        return actions[:, : self.spec.n_action_steps].flatten(1)
