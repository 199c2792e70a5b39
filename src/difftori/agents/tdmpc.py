"""TD-MPC: sampling-based planning in a task-oriented latent model (Hansen, Wang and Su, 2022, arXiv 2203.04955)."""

import copy
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from difftori.agents.latent_model import (
    COMPACT,
    NARROW,
    SMALL,
    LatentModelConfig,
    augmented,
    build_model,
    trained_by_model_loss,
)
from difftori.agents.losses import model_loss, prior_loss
from difftori.interfaces import ActingSchedule, Agent, LearningSchedule, Memory
from difftori.models.nets import nan_where_broken
from difftori.models.world_model import action_noise
from difftori.optim import GuardedOptimizer, soft_update
from difftori.planning import Planner, ReturnObjective
from difftori.solver import MPPI, Box, Detached
from difftori.solver.compiled import maybe_compiled
from difftori.steering import Steering
from difftori.types import Actions, EnvSpec, Latents, Observations, Plans, RowFlags, Rows, Scalar, Scalars, Segment

_FEW_SAMPLES = {"samples": 128, "elites": 16, "prior_samples": 8}


class TDMPCConfig(LatentModelConfig):
    """Settings of `TDMPC`: its latent model, and MPPI."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {},
        "compact": {**COMPACT, **_FEW_SAMPLES},
        "small": {**SMALL, **_FEW_SAMPLES},
        "narrow": {**NARROW, **_FEW_SAMPLES},
    }

    samples: int = Field(default=512, ge=1)
    """Action sequences that MPPI samples in each iteration."""
    prior_samples: int = Field(default=25, ge=0)
    """Rollouts of the policy prior that are added to MPPI's samples."""
    iterations: int = Field(default=6, ge=1)
    """Iterations of MPPI."""
    elites: int = Field(default=64, ge=1)
    """Number of best samples of MPPI, from which the next mean and standard deviation are computed."""
    temperature: float = Field(default=0.5, gt=0)
    """Factor of the return in the weights exp(temperature · return) of MPPI's elites."""
    momentum: float = Field(default=0.1, ge=0, lt=1)
    """Share of the old mean in MPPI's new mean."""

    @model_validator(mode="after")
    def _elites_among_samples(self) -> "TDMPCConfig":
        if self.elites > self.samples:
            raise ValueError(
                f"elites: {self.elites} cannot be chosen from {self.samples} samples. Fix: use elites ≤ samples"
            )
        return self


class TDMPC(Agent):
    """MPPI over R, d and a terminal Q, all trained together on segments of T steps (Hansen et al., 2022, Algorithms 1–2).

    Differs from paper: the terminal value uses the prior's action without noise.
    """

    name = "tdmpc"
    STEERABLE = "cost"
    Config = TDMPCConfig

    def __init__(self, config: TDMPCConfig, spec: EnvSpec):
        super().__init__(config, spec)
        self.settings = config
        self.model = build_model(config, spec)
        self.target = copy.deepcopy(self.model).requires_grad_(False)
        lr, self.batch_size = config.learning(spec)
        self.optimizer = GuardedOptimizer(trained_by_model_loss(self.model), lr, config.clip_norm)
        self.prior_optimizer = GuardedOptimizer({"prior": self.model.policy}, lr, config.clip_norm)
        self.updates = 0

    # Acting

    @torch.no_grad()
    def act(
        self,
        obs: Observations,
        memory: Memory | None = None,
        *,
        first: RowFlags,
        step: int,
        explore: bool,
        generator: torch.Generator,
        std: Scalar | None = None,
        steering: Steering | None = None,
    ) -> tuple[Actions, Memory]:
        """The first action of an elite sampled by weight, with MPPI's standard deviation as noise if `explore` is set.

        `steering`: a cost of the planned actions, in [−1, 1], that is added to the objective.
        """
        s, latent = self.settings, self.model.encode(obs)
        horizon = s.plan_horizon(step)
        mean = self._shifted(memory, first, latent)[:, :horizon]
        candidates = self._prior_plans(latent, horizon, generator)
        functions = (self.model.next, self.model.reward, self.model.value)
        objective = ReturnObjective(*functions, latent, horizon, self.spec.action_dim, s.discount, stacked=True)
        planner = self._planner(s.exploration_std(step) if std is None else std)
        solve = planner.plan if steering is None else partial(steering.plan, planner)
        plan = solve(objective, mean, candidates=candidates, generator=generator)
        spread, elites, weights = plan.solution.state.memory
        # An elite by its weight: the shortest of exponential waiting times. torch.multinomial would wait for the device, to check
        # the weights.
        waits = -torch.rand(weights.shape, generator=generator, dtype=weights.dtype, device=weights.device).log()
        sampled = (weights / waits).argmax(1, keepdim=True)
        shape = (obs.shape[0], horizon, self.spec.action_dim)
        action = elites.gather(1, sampled.unsqueeze(-1).expand(-1, -1, elites.shape[-1])).reshape(shape)[:, 0]
        if explore:
            noise = torch.randn(action.shape, generator=generator, device=action.device)
            action = action + spread.reshape(shape)[:, 0] * noise
        padded = F.pad(plan.actions, (0, 0, 0, s.horizon - horizon))
        action = nan_where_broken(action.clamp(-1.0, 1.0), latent)
        return action, {"plan": padded}

    def schedule(self, step: int) -> ActingSchedule:
        """The planning horizon, and the least standard deviation of MPPI."""
        return ActingSchedule(self.settings.plan_horizon(step), self.settings.exploration_std(step))

    def _planner(self, min_std: float | Scalar) -> Planner:
        s = self.settings
        mppi = MPPI(
            samples=s.samples,
            elites=s.elites,
            temperature=s.temperature,
            momentum=s.momentum,
            min_std=min_std,
        )
        return Planner(mppi, Detached(), Box(-1.0, 1.0), s.iterations, tolerance=0.0, compile=self.compiles)

    def _prior_plans(self, latent: Latents, horizon: int, generator: torch.Generator) -> Tensor | None:
        """Noisy rollouts of the prior, (K B H A)."""
        count = self.settings.prior_samples
        if not count:
            return None
        shape = (count, latent.shape[0], horizon, self.spec.action_dim)
        noise = action_noise(shape, self.settings.std_end, like=latent, generator=generator)
        return self.model.rollout(latent.expand(count, *latent.shape), noise)

    def _shifted(self, memory: Memory | None, first: RowFlags, latent: Latents) -> Plans:
        """The last plan shifted by one step, with zeros at its end. Rows without a plan are zero, (B T A)."""
        zeros = latent.new_zeros(latent.shape[0], self.settings.horizon, self.spec.action_dim)
        if memory is None:
            return zeros
        later = torch.cat([memory["plan"][:, 1:], zeros[:, :1]], 1)
        return torch.where(first[:, None, None], zeros, later)

    # Learning

    def update(self, segment: Segment, *, generator: torch.Generator) -> tuple[Rows, Scalars]:
        """One update: a step on Eq. 3, one of the policy prior, and the soft update of the target."""
        s, model = self.settings, self.model
        obs = augmented(segment.obs, generator)

        noise = action_noise(segment.actions.shape, s.std_end, like=segment.actions, generator=generator)
        td = maybe_compiled(self.compiles, model_loss, model, self.target, segment, obs, noise, s.coefficients())
        grad_norm = self.optimizer.step(self.optimizer.gradient(td.total))

        shape = (*td.latents.shape[:-1], self.spec.action_dim)
        noise = action_noise(shape, s.std_end, like=td.latents, generator=generator)
        prior = maybe_compiled(self.compiles, prior_loss, model, td.latents, segment.mask, noise, s.rho)
        prior_norm = self.prior_optimizer.step(self.prior_optimizer.gradient(prior))

        self.updates += 1
        if self.updates % s.ema_every == 0:
            soft_update(self.target.parameters(), model.parameters(), s.ema)
        norms = {"prior_grad_norm": prior_norm, "grad_norm": grad_norm}
        return td.priorities, {**td.metrics, "prior_loss": prior.detach(), **norms}

    def learning_schedule(self) -> LearningSchedule:
        """Whether the soft update is due."""
        return LearningSchedule((self.updates + 1) % self.settings.ema_every == 0)

    # Resuming

    @property
    def optimizers(self) -> dict[str, GuardedOptimizer]:
        """The optimizers of all networks."""
        return {"optimizer": self.optimizer, "prior_optimizer": self.prior_optimizer}
