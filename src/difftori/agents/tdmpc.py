"""TD-MPC: sampling-based planning in a task-oriented latent model (Hansen, Wang and Su, 2022, arXiv 2203.04955)."""

import copy
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from difftori.agents._descent import Descent, follow
from difftori.errors import CheckpointError
from difftori.interfaces import Agent, AgentConfig, Memory
from difftori.models.encoders import Precision, make_encoder, random_shift
from difftori.models.world_model import WorldModel, action_noise
from difftori.planning import Planner, ReturnObjective
from difftori.solver import MPPI, Box, Detached, TrajectoryObjective
from difftori.solver.compiled import compiled_call
from difftori.types import (
    Actions,
    EnvSpec,
    Latents,
    Metrics,
    Observations,
    Plans,
    RowFlags,
    Rows,
    Scalar,
    Segment,
)

_PAPER_LR = {True: 3e-4, False: 1e-3}
_PAPER_BATCH = {True: 256, False: 512}
_SHIFT = 4
CEILING = 1e4
# For two CPU cores: what it costs in return is measured in docs/reinforcement.md.
_COMPACT: dict[str, Any] = {
    "latent_dim": 50,
    "width": 128,
    "encoder_width": 128,
    "batch_size": 128,
    "samples": 128,
    "elites": 16,
    "prior_samples": 8,
    "horizon": 3,
    "seed_steps": 1000,
    "schedule_steps": 10_000,
}

# For many runs on two CPU cores: comparisons of forms of one agent.
_SMALL: dict[str, Any] = {**_COMPACT, "latent_dim": 32, "width": 64, "encoder_width": 64, "batch_size": 64}


class TDMPCConfig(AgentConfig):
    """Settings of `TDMPC`; the defaults are the paper's (docs/reinforcement.md lists them beside their source)."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {},
        "compact": _COMPACT,
        "small": _SMALL,
        # Too narrow a latent for what is seen, so that it matters what the model is trained for: objective mismatch.
        "narrow": {**_SMALL, "latent_dim": 4},
    }

    batch_size: int | None = Field(None, ge=1)
    """Slices per update; 256 from pixels and 512 from states unless given."""
    latent_dim: int = Field(50, ge=1)
    """Z."""
    width: int = Field(512, ge=1)
    """Of every hidden layer but the encoder's."""
    encoder_width: int = Field(256, ge=1)
    """Hidden layer of the state encoder."""
    channels: int = Field(32, ge=1)
    """Of the pixel encoder's convolutions."""
    precision: Precision = "float32"
    """Of the pixel encoder's convolutions; bfloat16 is faster, and right to three digits."""
    lr: float | None = Field(None, gt=0)
    """Learning rate; 3e-4 from pixels and 1e-3 from states unless given."""
    discount: float = Field(0.99, gt=0, le=1)
    """γ."""
    rho: float = Field(0.5, gt=0, le=1)
    """ρ: the loss t steps into the slice weighs ρ^t."""
    consistency_coef: float = Field(2.0, ge=0)
    """c_3, of the latent dynamics."""
    reward_coef: float = Field(0.5, ge=0)
    """c_1, of the reward."""
    value_coef: float = Field(0.1, ge=0)
    """c_2, of the action values."""
    clip_norm: float = Field(10.0, gt=0)
    """Gradients longer than this are shortened to it."""
    ema: float = Field(0.01, gt=0, le=1)
    """Share of the online weights that the target model takes over,"""
    ema_every: int = Field(2, ge=1)
    """every so many updates."""
    std_start: float = Field(0.5, ge=0)
    """Exploration and least planning spread at the first decision, falling"""
    std_end: float = Field(0.05, ge=0)
    """linearly to this,"""
    horizon_start: int = Field(1, ge=1)
    """while the planning horizon grows from this to `horizon`,"""
    schedule_steps: int = Field(25_000, ge=0)
    """over so many decisions."""
    samples: int = Field(512, ge=1)
    """MPPI's samples an iteration."""
    prior_samples: int = Field(25, ge=0)
    """Rollouts of the prior among its candidates."""
    iterations: int = Field(6, ge=1)
    """MPPI's iterations."""
    elites: int = Field(64, ge=1)
    """Candidates that its next mean is made of."""
    temperature: float = Field(0.5, gt=0)
    """Of their weights exp(temperature · return)."""
    momentum: float = Field(0.1, ge=0, lt=1)
    """Share of the old mean in the new."""

    @model_validator(mode="after")
    def _elites_among_samples(self) -> "TDMPCConfig":
        if self.elites > self.samples:
            raise ValueError(f"elites: {self.elites} cannot be chosen of {self.samples} samples")
        return self


class ModelLoss(NamedTuple):
    """Eq. 3 over a batch of slices: the scalar, the new priorities (B), the latents (T+1 B Z), and scalars to log."""

    total: Scalar
    priorities: Rows
    latents: Tensor
    metrics: dict[str, Scalar]


class TDMPC(Agent):
    """MPPI over R, d and a terminal Q, all learned together from slices of T steps (Hansen et al., 2022, Algorithms 1–2).

    Differs from paper: the terminal value takes the prior's action without its noise.
    """

    name = "tdmpc"
    Config = TDMPCConfig

    def __init__(self, config: TDMPCConfig, spec: EnvSpec):
        super().__init__(config, spec)
        self.settings = config
        self.from_pixels = len(spec.obs_shape) == 3
        self._make_networks()
        self.lr = config.lr or _PAPER_LR[self.from_pixels]
        self.batch_size = config.batch_size or _PAPER_BATCH[self.from_pixels]
        self.updates = 0
        self.descent = Descent(self._learned(), self.lr, config.clip_norm)
        self.prior_descent = Descent({"prior": self.model.policy}, self.lr, config.clip_norm)

    def _make_networks(self) -> None:
        """The model and its target."""
        s = self.settings
        self.model = WorldModel(self._encoder(), self.spec.action_dim, latent_dim=s.latent_dim, width=s.width)
        self.target = copy.deepcopy(self.model).requires_grad_(False)

    def _encoder(self) -> torch.nn.Module:
        s = self.settings
        return make_encoder(
            self.spec.obs_shape,
            hidden=s.encoder_width,
            channels=s.channels,
            latent_dim=s.latent_dim,
            precision=s.precision,
        )

    def _learned(self) -> dict[str, torch.nn.Module]:
        """The networks that Eq. 3 trains."""
        model = self.model
        return {"encoder": model.encoder, "dynamics": model.dynamics, "reward": model.reward_head, "q": model.critics}

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
    ) -> tuple[Actions, Memory]:
        """The first action of an elite drawn by its weight, with MPPI's own spread as noise when exploring."""
        latent = self.model.encode(obs)
        horizon, spread = self.plan_horizon(step), self.exploration(step)
        mean = self._shifted(memory, first, latent)[:, :horizon]
        candidates = self._prior_plans(latent, horizon, generator)
        steps = self.settings.iterations
        planner = Planner(self._mppi(spread), Detached(), Box(-1.0, 1.0), steps, tolerance=0.0, compile=self.compiles)
        plan = planner.plan(self.objective(latent, horizon), mean, candidates=candidates, generator=generator)
        std, elites, weights = plan.solution.state.memory
        drawn = torch.multinomial(weights, 1, generator=generator)
        shape = (len(obs), horizon, self.spec.action_dim)
        action = elites.gather(1, drawn.unsqueeze(-1).expand(-1, -1, elites.shape[-1])).reshape(shape)[:, 0]
        if explore:
            noise = torch.randn(action.shape, generator=generator, device=action.device)
            action = action + std.reshape(shape)[:, 0] * noise
        return action.clamp(-1.0, 1.0), {"plan": self._padded(plan.actions)}

    def objective(self, latent: Latents, horizon: int) -> TrajectoryObjective:
        """Σ_{t<H} γ^t R(z_t, a_t) + γ^H min Q(z_H, π(z_H)) from `latent` (B Z)."""
        model = self.model
        return ReturnObjective(
            model.next, model.reward, model.value, latent, horizon, self.spec.action_dim, self.settings.discount
        )

    def plan_horizon(self, step: int) -> int:
        """H of a plan made after `step` decisions."""
        s = self.settings
        return min(s.horizon, int(self._scheduled(s.horizon_start, s.horizon, step)))

    def exploration(self, step: int) -> float:
        """Standard deviation of exploration after `step` decisions."""
        return self._scheduled(self.settings.std_start, self.settings.std_end, step)

    def _scheduled(self, start: float | int, end: float | int, step: int) -> float:
        total = self.settings.schedule_steps
        share = min(1.0, step / total) if total else 1.0
        return start + share * (end - start)

    def _mppi(self, min_std: float) -> MPPI:
        s = self.settings
        return MPPI(samples=s.samples, elites=s.elites, temperature=s.temperature, momentum=s.momentum, min_std=min_std)

    def _prior_plans(self, latent: Latents, horizon: int, generator: torch.Generator) -> Tensor | None:
        count = self.settings.prior_samples
        if not count:
            return None
        shape = (count, len(latent), horizon, self.spec.action_dim)
        noise = action_noise(shape, self.settings.std_end, like=latent, generator=generator)
        return self.model.rollout(latent.expand(count, *latent.shape), noise)

    def _shifted(self, memory: Memory | None, first: RowFlags, latent: Latents) -> Plans:
        """The last plan one step later, zeros at its end; zeros where there is none, (B T A)."""
        zeros = latent.new_zeros(len(latent), self.settings.horizon, self.spec.action_dim)
        if memory is None:
            return zeros
        later = torch.cat([memory["plan"][:, 1:], zeros[:, :1]], 1)
        return torch.where(first[:, None, None], zeros, later)

    def _padded(self, actions: Plans) -> Tensor:
        return F.pad(actions, (0, 0, 0, self.settings.horizon - actions.shape[1]))

    # Learning

    def update(self, segment: Segment, *, generator: torch.Generator) -> tuple[Rows, Metrics]:
        """One step on Eq. 3, one of the prior, and the target model's share."""
        obs = self.augmented(segment.obs, generator)
        loss = self.loss(segment, obs, generator)
        norm = self.descent.step(self.descent.gradient(loss.total))
        prior = self._update_prior(loss.latents, generator)
        self.updates += 1
        if self.updates % self.settings.ema_every == 0:
            self._follow()
        metrics = {name: value.item() for name, value in loss.metrics.items()}
        return loss.priorities, {**metrics, **prior, "grad_norm": norm}

    def loss(self, segment: Segment, obs: Tensor, generator: torch.Generator) -> ModelLoss:
        """Eq. 3 on slices whose `obs` (T+1 B *S) are augmented."""
        noise = action_noise(segment.actions.shape, self.settings.std_end, like=segment.actions, generator=generator)
        return self._fast(TDMPC.model_loss, segment, obs, noise)

    def _fast(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """A method of this agent called, compiled if the agent is."""
        return compiled_call(function, self, *arguments) if self.compiles else function(self, *arguments)

    def model_loss(self, segment: Segment, obs: Tensor, noise: Tensor) -> ModelLoss:
        """Eq. 3: Σ_t ρ^t (c_1‖R − r‖² + c_2‖Q − (r + γ Q⁻(z', π(z')))‖² + c_3‖d(z, a) − h⁻(s')‖²), weighted and averaged.

        `noise` (T B A) is π's. The gradient is divided by T, and each row's terms are bounded, as in the release.
        """
        s, model = self.settings, self.model
        goal, value = self._targets(segment, obs[1:], noise)
        latents = [model.encode(obs[0])]
        for action in segment.actions:
            latents.append(model.next(latents[-1], action))
        path = torch.stack(latents)
        weight = self.step_weights(segment)
        q = model.q(path[:-1], segment.actions)
        consistency = (weight * (path[1:] - goal).square().mean(-1)).sum(0)
        reward = (weight * (model.reward(path[:-1], segment.actions) - segment.rewards).square()).sum(0)
        errors = q - value
        td = (weight * errors.square().sum(0)).sum(0)
        rows = (
            s.consistency_coef * consistency.clamp(max=CEILING)
            + s.reward_coef * reward.clamp(max=CEILING)
            + s.value_coef * td.clamp(max=CEILING)
        )
        total = (rows * segment.weights).mean() / len(segment.actions)
        priorities = (weight * errors.detach().abs().sum(0)).sum(0).clamp(max=CEILING)
        metrics = {
            "consistency_loss": consistency.mean(),
            "reward_loss": reward.mean(),
            "value_loss": td.mean(),
            "q": q.mean(),
        }
        return ModelLoss(total, priorities, path.detach(), {name: m.detach() for name, m in metrics.items()})

    @torch.no_grad()
    def _targets(self, segment: Segment, following: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """h⁻(s') (T B Z) and r + γ min Q⁻(h(s'), π(h(s'))) (T B), which a terminated step does without."""
        goal, online = self.target.encode(following), self.model.encode(following)
        action = self.model.prior(online, noise)
        going_on = (~segment.terminated).float()
        return goal, segment.rewards + self.settings.discount * going_on * self.target.least_q(online, action)

    def step_weights(self, segment: Segment) -> Tensor:
        """ρ^t, zero for padding, (T B)."""
        powers = self.settings.rho ** torch.arange(len(segment.actions), device=segment.mask.device)
        return powers[:, None] * segment.mask

    def augmented(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        """Pixels shifted at random, each time step by itself; states as they are. (T+1 B *S)."""
        if not self.from_pixels:
            return obs
        return random_shift(obs.flatten(0, 1), _SHIFT, generator).unflatten(0, obs.shape[:2])

    def _update_prior(self, latents: Tensor, generator: torch.Generator) -> Metrics:
        """π maximises min Q at the latents of the slice, which learn nothing from it."""
        shape = (*latents.shape[:-1], self.spec.action_dim)
        noise = action_noise(shape, self.settings.std_end, like=latents, generator=generator)
        loss = self._fast(TDMPC.prior_loss, latents, noise)
        norm = self.prior_descent.step(self.prior_descent.gradient(loss))
        return {"prior_loss": loss.item(), "prior_grad_norm": norm}

    def prior_loss(self, latents: Tensor, noise: Tensor) -> Scalar:
        """−Σ_t ρ^t min Q(z_t, π(z_t)), the mean over slices; `latents` (T+1 B Z), `noise` (T+1 B A)."""
        powers = self.settings.rho ** torch.arange(len(latents), device=latents.device)
        action = self.model.prior(latents, noise)
        return -(powers * self.model.least_q(latents, action).mean(-1)).sum()

    def _follow(self) -> None:
        follow(self.target.parameters(), self.model.parameters(), self.settings.ema)

    # Resuming

    def training_state(self) -> dict[str, Any]:
        """Optimisers and counters."""
        return {
            "descent": self.descent.state(),
            "prior_descent": self.prior_descent.state(),
            "updates": self.updates,
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Put it back. Raises CheckpointError if it is another agent's."""
        try:
            self.descent.load(state["descent"])
            self.prior_descent.load(state["prior_descent"])
            self.updates = int(state["updates"])
        except KeyError as error:
            raise CheckpointError(f"the checkpoint is not of {self.name!r}: it lacks {error}") from error
