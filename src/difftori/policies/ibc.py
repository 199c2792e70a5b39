"""Implicit behavioural cloning (Florence et al., 2021): the action of least energy, the energy learned by contrast."""

from functools import partial
from typing import Any, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor

from difftori.interfaces import Policy
from difftori.models.nets import noise_like
from difftori.models.window_encoder import WindowEncoder
from difftori.policies._energy import (
    SMALL,
    ActionScore,
    Candidates,
    DerivativeFree,
    EnergyConfig,
    Langevin,
    best,
    info_nce,
    uniform,
)
from difftori.policies._units import normalized_bounds
from difftori.types import Latents, Metrics, PartPlans, Scalar, TaskSpec, Window, WindowObs


class IBCConfig(EnergyConfig):
    """Settings of `IBC`. The defaults are those of Diffusion Policy's comparison, for states with 3,050 epochs."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {},
        "langevin": {
            "negatives": "langevin",
            "inference": "langevin",
            "num_negatives": 8,
            "samples": 512,
            "margin": 0.05,
            "gradient_penalty": 1.0,
            "dropout": 0.0,
            "optimizer": "adam",
            "lr": 1e-3,
            "lr_schedule": "constant",
            "warmup": 0,
            "weight_decay": 0.0,
            "beta1": 0.9,
            "batch_size": 512,
        },
        "small": SMALL,
    }
    preset: str = "paper"
    """`paper`: Diffusion Policy's. `langevin`: negatives and acting by gradients, as Florence et al. have them. `small`:
    for a CPU."""
    epochs: int = Field(3050, ge=1)
    negatives: Literal["uniform", "langevin"] = "uniform"
    """What the expert's action is contrasted with: actions drawn uniformly, or moved from there by Langevin steps."""
    num_negatives: int = Field(1024, ge=1)
    """How many."""
    positive_noise: float = Field(1e-4, ge=0)
    """σ of Gaussian noise on the expert's action, in half-widths of the training data's range."""
    gradient_penalty: float = Field(0.0, ge=0)
    """Weight of a penalty on slopes of the energy above 1, which Langevin steps need. It is computed for all
    candidates at once."""
    margin: float = Field(0.0, ge=0)
    """Actions are considered so far beyond the training data's range on each side, as a share of the range."""
    inference: Literal["derivative-free", "langevin"] = "derivative-free"
    """How the action of least energy is sought: by resampling, or by noisy gradient steps."""
    samples: int = Field(1024, ge=1)
    """Candidates of each row when it acts."""
    search_steps: int = Field(5, ge=1)
    """How often derivative-free inference scores its candidates."""
    search_std: float = Field(0.03, ge=0)
    """How far it moves them after the first resampling, in half-widths of the training data's range."""
    search_shrink: float = Field(0.5, gt=0, le=1)
    """By what this is multiplied each time."""
    langevin_steps: int = Field(100, ge=1)
    """Langevin steps, in training and in acting."""


@final
class IBC(Policy):
    """â = argmin_a E_θ(s, a), E learned by telling the expert's action from others (InfoNCE).

        L = −log [ e^{−E(s, a*)} / (e^{−E(s, a*)} + Σ_j e^{−E(s, a_j)}) ]

    (Florence et al., 2021, "Implicit Behavioral Cloning", Sec. 2.) The energy is an MLP of the features of what was
    seen and of the actions to execute, all as one vector; by default that is one action. Actions are sought inside the box and the
    training data's range, among candidates that begin uniform.

    Differs from Diffusion Policy's IBC: moves shrink by half each time, as in Florence et al.; the candidate of least
    energy is executed, theirs is drawn by softmax(−E). Differs from Florence et al.: a plain MLP; no second chain.
    """

    name = "ibc"
    Config = IBCConfig
    WINDOW = (2, 2, 1)
    STOCHASTIC = True
    FROM_PRESENT = True

    def __init__(self, config: IBCConfig, spec: TaskSpec):
        super().__init__(config, spec)
        self.settings = config
        self.low: Tensor
        self.high: Tensor
        low, high = normalized_bounds(spec, margin=config.margin)
        self.register_buffer("low", low.repeat(spec.n_action_steps), persistent=False)
        self.register_buffer("high", high.repeat(spec.n_action_steps), persistent=False)
        self.window = WindowEncoder(spec, config.images)
        variables = spec.n_action_steps * spec.action_dim
        self.score = ActionScore(self.window.width, variables, config.hidden, config.dropout)
        self.search = DerivativeFree(config.search_steps, config.search_std, config.search_shrink)
        self.chain = Langevin(config.langevin_steps)

    def loss(self, batch: Window, *, generator: torch.Generator) -> tuple[Scalar, Metrics]:
        """InfoNCE, with the penalty on steep energies; and how often the expert's action had the least energy."""
        settings = self.settings
        features = self.window(batch.obs, generator)
        target = batch.actions[:, : self.spec.n_action_steps].flatten(1)
        noise = noise_like(target, generator)
        negatives = self._uniform(settings.num_negatives, len(target), generator)
        if settings.negatives == "langevin":
            negatives = self._moved(features, negatives, generator)
        candidates = torch.cat(((target + settings.positive_noise * noise).unsqueeze(0), negatives))
        scores = self.score.in_parts(features, candidates, at_once=settings.at_once, generator=generator)
        loss, found = info_nce(scores)
        metrics = {"info_nce": loss.item(), "expert_first": found}
        if settings.gradient_penalty:
            penalty = self.score.steepness(features, candidates)
            loss, metrics["gradient_penalty"] = loss + settings.gradient_penalty * penalty, penalty.item()
        return loss, metrics

    @torch.no_grad()
    def act(self, obs: WindowObs, *, generator: torch.Generator) -> PartPlans:
        """The executed actions (B P A) of least energy that were found."""
        features = self.window(obs)
        candidates = self._uniform(self.settings.samples, len(features), generator)
        score = partial(self.score.in_parts, features, at_once=self.settings.at_once)
        if self.settings.inference == "langevin":
            candidates = self._moved(features, candidates, generator)
        else:
            candidates = self.search.run(score, candidates, self.low, self.high, generator=generator)
        found = best(candidates, score(candidates))
        return found.unflatten(1, (self.spec.n_action_steps, self.spec.action_dim))

    def _moved(self, features: Latents, candidates: Candidates, generator: torch.Generator) -> Candidates:
        """The candidates after the Langevin steps, without a graph."""
        slopes = partial(self.score.slopes, features)
        return self.chain.run(slopes, candidates, self.low, self.high, generator=generator)

    def _uniform(self, count: int, rows: int, generator: torch.Generator) -> Candidates:
        return uniform(count, rows, self.low, self.high, generator)
