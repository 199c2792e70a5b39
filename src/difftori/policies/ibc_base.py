"""Implicit behavioural cloning around a base: the energy of IBC, searched near another policy's actions."""

from functools import partial
from typing import Any, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor

from difftori.models.nets import noise_like
from difftori.models.window_encoder import WindowEncoder
from difftori.policies._energy import (
    SMALL,
    ActionScore,
    Candidates,
    DerivativeFree,
    EnergyConfig,
    Langevin,
    around,
    best,
    finite,
    info_nce,
    uniform,
)
from difftori.policies._units import normalized_bounds
from difftori.policies.refiner import Refiner, RefinerConfig
from difftori.types import Latents, Metrics, PartPlans, Plans, Points, Scalar, TaskSpec, Window, WindowObs


class IBCBaseConfig(EnergyConfig, RefinerConfig):
    """Settings of `IBCBase`. The energy is `ibc`'s; what is done with the base is ours: the paper does not say."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {},
        "small": SMALL,
    }
    preset: str = "paper"
    """`paper`: the sizes of `ibc`. `small`: for a CPU."""
    epochs: int = Field(300, ge=1)
    num_negatives: int = Field(1024, ge=4)
    """Actions that the expert's is contrasted with: the base's, and others in the shares below."""
    near_base: float = Field(0.5, ge=0, le=1)
    """Share of the negatives that lies around the base's action."""
    near_expert: float = Field(0.25, ge=0, le=1)
    """Share that lies around the expert's. The others are drawn uniformly."""
    negative_std: float = Field(0.3, gt=0)
    """How far around: σ of each negative is drawn uniformly up to this, in half-widths of the training data's range."""
    positive_noise: float = Field(1e-4, ge=0)
    """σ of Gaussian noise on the expert's action, in the same units."""
    inference: Literal["derivative-free", "gradient"] = "derivative-free"
    """How a better action is sought: among candidates around the base's, or by gradient steps from it, without noise."""
    samples: int = Field(1024, ge=2)
    """Candidates of each row when it acts, the base's action always among them."""
    search_steps: int = Field(5, ge=1)
    """How often derivative-free inference scores its candidates."""
    search_std: float = Field(0.05, ge=0)
    """σ of the first candidates around the base, and of their moves after the first resampling, in the same units."""
    search_shrink: float = Field(0.5, gt=0, le=1)
    """By what this is multiplied each time."""
    gradient_steps: int = Field(10, ge=1)
    """Steps of `gradient`, each at most a tenth of a half-width."""
    advantage: float = Field(0.0, ge=0)
    """The base's action is replaced only by one whose score is higher by this, in nats."""


@final
class IBCBase(Refiner):
    """â = the action of least energy E_θ(s, a) that is found near the base's, which is itself always a candidate.

    E is `ibc`'s, over all actions that are executed as one vector, and learned by InfoNCE: the expert's actions against
    the base's own, others around the base's and around the expert's, and uniform ones. If no candidate has less energy
    than the base's actions, they are returned bit for bit: refining can be declined.

    Wan et al. (2024) report IBC on a base and do not say how it was done; this is one fair reading.
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
        self.score = ActionScore(self.window.width, variables, config.hidden, config.dropout)
        self.search = DerivativeFree(config.search_steps, config.search_std, config.search_shrink)
        self.climb = Langevin(config.gradient_steps, noise=0.0)

    def loss(self, batch: Window, *, generator: torch.Generator) -> tuple[Scalar, Metrics]:
        """InfoNCE; how often the expert's action had the least energy, and how often less than the base's."""
        target = self._executed(batch.actions)
        base = self._executed(self.choose_base(batch, generator))
        noise = noise_like(target, generator)
        expert = target + self.settings.positive_noise * noise
        negatives = self._negatives(base, target, generator)
        candidates = torch.cat((expert.unsqueeze(0), base.unsqueeze(0), negatives))
        features = self.window(batch.obs, generator)
        scores = self.score.in_parts(features, candidates, at_once=self.settings.at_once, generator=generator)
        loss, found = info_nce(scores)
        over_base = (scores[0] > scores[1]).float().mean().item()
        return loss, {"info_nce": loss.item(), "expert_first": found, "expert_over_base": over_base}

    @torch.no_grad()
    def act(self, obs: WindowObs, base: Plans | None = None, *, generator: torch.Generator) -> PartPlans:
        """The executed actions (B P A): the base's, replaced where better ones were found."""
        assert base is not None
        executed = base[:, : self.spec.n_action_steps]
        features = self.window(obs)
        candidates = self._candidates(features, executed.flatten(1), generator)
        scores = finite(self.score.in_parts(features, candidates, at_once=self.settings.at_once))
        # Equal energies may differ by rounding, and the base counts as the better of equals.
        rounding = 32 * torch.finfo(scores.dtype).eps * scores[0].abs().clamp_min(1.0)
        better = scores.amax(0) > scores[0] + self.settings.advantage + rounding
        return torch.where(better[:, None, None], best(candidates, scores).reshape(executed.shape), executed)

    def _candidates(self, features: Latents, base: Points, generator: torch.Generator) -> Candidates:
        """The base's actions first, and what was found from them."""
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
        """All but the base's own action: around it, around the expert's, and uniform."""
        settings = self.settings
        count = settings.num_negatives - 1
        by_base = round(settings.near_base * count)
        by_expert = min(round(settings.near_expert * count), count - by_base)
        bounds = self.low, self.high
        near = torch.cat((base.expand(by_base, -1, -1), target.expand(by_expert, -1, -1)))
        draws = torch.rand((*near.shape[:2], 1), generator=generator, dtype=near.dtype, device=near.device)
        noise = noise_like(near, generator)
        near = (near + settings.negative_std * draws * noise).clamp(*bounds)
        return torch.cat((near, uniform(count - by_base - by_expert, len(base), *bounds, generator)))

    def _executed(self, actions: Plans) -> Points:
        """The actions of (B H A) that are executed, in one row each (B n)."""
        return actions[:, : self.spec.n_action_steps].flatten(1)
