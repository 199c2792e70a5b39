"""Implicit behavioural cloning (Florence et al., 2021): the action of least energy, with a contrastive loss for the energy."""

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
    Candidates,
    DerivativeFree,
    EnergyConfig,
    EnergyNetwork,
    Langevin,
    best,
    info_nce,
    uniform,
)
from difftori.policies._units import normalized_bounds
from difftori.types import Count, Latents, PartPlans, Scalar, Scalars, TaskSpec, Window, WindowObs


class IBCConfig(EnergyConfig):
    """Settings of `IBC`. The defaults are those of Diffusion Policy's comparison from states, with 3,050 epochs."""

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
    """Preset of settings. `paper`: Diffusion Policy's. `langevin`: negatives and inference by Langevin steps, as in Florence et al.
    `small`: for a CPU."""
    epochs: int = Field(default=3050, ge=1)
    negatives: Literal["uniform", "langevin"] = "uniform"
    """Negative samples of the contrastive loss: uniform actions, or uniform actions after Langevin steps."""
    num_negatives: int = Field(default=1024, ge=1)
    """Number of negative samples per row."""
    positive_noise: float = Field(default=1e-4, ge=0)
    """Standard deviation σ of Gaussian noise on the expert's action, in half-widths of the training data's range."""
    gradient_penalty: float = Field(default=0.0, ge=0)
    """Weight of a penalty on slopes of the energy above 1, which Langevin steps require. Computed for all candidates in one
    batch."""
    margin: float = Field(default=0.0, ge=0)
    """Width by which the bounds of actions exceed the training data's range on each side, as a share of the range."""
    inference: Literal["derivative-free", "langevin"] = "derivative-free"
    """Search for the action of least energy: by resampling (`derivative-free`), or by noisy gradient steps (`langevin`)."""
    samples: int = Field(default=1024, ge=1)
    """Number of candidates of each row at inference."""
    search_steps: int = Field(default=5, ge=1)
    """Number of times that derivative-free inference scores its candidates."""
    search_std: float = Field(default=0.03, ge=0)
    """Standard deviation of the perturbation after the first resampling, in half-widths of the training data's range."""
    search_shrink: float = Field(default=0.5, gt=0, le=1)
    """Factor on `--search-std` after each resampling."""
    langevin_steps: int = Field(default=100, ge=1)
    """Number of Langevin steps, in training and at inference."""


@final
class IBC(Policy):
    """â = argmin_a E_θ(s, a). E is trained to distinguish the expert's action from others (InfoNCE).

        L = −log [ e^{−E(s, a*)} / (e^{−E(s, a*)} + Σ_j e^{−E(s, a_j)}) ]

    (Florence et al., 2021, "Implicit Behavioral Cloning", Sec. 2.) The energy is an MLP on the features of the observations
    and the executed actions as one vector; by default, one action is executed. The search is inside the action box and the
    training data's range. Its candidates are initially uniform.

    Differs from Diffusion Policy's IBC: perturbations shrink by half each time, as in Florence et al.; the candidate of least
    energy is executed, theirs is sampled from softmax(−E). Differs from Florence et al.: a plain MLP; no second chain.
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
        self.score = EnergyNetwork(self.window.width, variables, config.hidden, config.dropout)
        self.search = DerivativeFree(config.search_steps, config.search_std, config.search_shrink)
        self.chain = Langevin(config.langevin_steps)

    def loss(self, batch: Window, *, generator: torch.Generator) -> tuple[Scalar, Scalars]:
        """Return the InfoNCE loss plus the gradient penalty. Metrics: the share of rows whose expert action has the least energy."""
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
        metrics = {"info_nce": loss, "expert_first": found}
        if settings.gradient_penalty:
            penalty = self.score.steepness(features, candidates)
            loss, metrics["gradient_penalty"] = loss + settings.gradient_penalty * penalty, penalty
        return loss, metrics

    @torch.no_grad()
    def act(self, obs: WindowObs, *, generator: torch.Generator) -> PartPlans:
        """Return the executed actions (B P A) with the least energy found."""
        features = self.window(obs)
        candidates = self._uniform(self.settings.samples, features.shape[0], generator)
        score = partial(self.score.in_parts, features, at_once=self.settings.at_once)
        if self.settings.inference == "langevin":
            candidates = self._moved(features, candidates, generator)
        else:
            candidates = self.search.run(score, candidates, self.low, self.high, generator=generator)
        found = best(candidates, score(candidates))
        return found.unflatten(1, (self.spec.n_action_steps, self.spec.action_dim))

    def _moved(self, features: Latents, candidates: Candidates, generator: torch.Generator) -> Candidates:
        """Return the candidates after the Langevin steps, without a graph."""
        slopes = partial(self.score.slopes, features)
        return self.chain.run(slopes, candidates, self.low, self.high, generator=generator)

    def _uniform(self, count: int, rows: Count, generator: torch.Generator) -> Candidates:
        return uniform(count, rows, self.low, self.high, generator)
