"""DrQ-v2: deterministic actor-critic from augmented images with n-step returns (Yarats et al., 2021, arXiv 2107.09645)."""

import copy
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from difftori.agents.actor_critic import (
    ActorCriticConfig,
    Transition,
    bellman_loss,
    build_features,
    build_trunk,
    n_step,
)
from difftori.agents.calibration import calibration
from difftori.interfaces import ActingSchedule, Agent, LearningSchedule, Memory
from difftori.models.actor_critic import PolicyNetwork, TwinCritics
from difftori.models.encoders import random_shift
from difftori.models.nets import noise_like
from difftori.models.world_model import action_noise, with_noise
from difftori.optim import GuardedOptimizer, soft_update
from difftori.solver.compiled import maybe_compiled
from difftori.types import (
    Actions,
    AnyQValues,
    EnvSpec,
    Latents,
    Metrics,
    Observations,
    RowFlags,
    Rows,
    Scalar,
    Scalars,
    Segment,
)

_MAX_SHIFT = 4
_RELU_GAIN = 2.0**0.5
_EASY = ("cartpole-balance", "cartpole-balance-sparse", "cartpole-swingup", "cup-catch", "ball-in-cup-catch")
_EASY += ("finger-spin", "hopper-stand", "pendulum-swingup", "walker-stand", "walker-walk")

# For two CPU cores; `small` is for comparing variants by many runs.
_COMPACT: dict[str, Any] = {"width": 256, "batch_size": 128, "lr": 3e-4, "channels": 16}
_COMPACT |= {"seed_steps": 1000, "schedule_steps": 10_000}
_SMALL: dict[str, Any] = {**_COMPACT, "width": 128, "batch_size": 64, "lr": 1e-3, "channels": 8}


class DrQV2Config(ActorCriticConfig):
    """Settings of `DrQV2`. The defaults are the paper's (docs/reinforcement.md)."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"paper": {}, "compact": _COMPACT, "small": _SMALL}

    horizon: int = Field(default=3, ge=1)
    """n of the n-step return: the rewards that are summed before the value of the next state is added. The paper uses 1 for walker."""
    batch_size: int | None = Field(default=None, ge=1)
    """Transitions per update. Default: the paper's, 512 for walker's tasks, 256 otherwise."""
    seed_steps: int = Field(default=2000, ge=0)
    """Random agent steps before the first update. `updates_per_step` updates for each of them follow at once."""
    updates_per_step: float = Field(default=0.5, gt=0)
    """Updates per agent step after `seed_steps`. They are made at the end of an episode."""
    lr: float = Field(default=1e-4, gt=0)
    """Learning rate."""
    ema: float = Field(default=0.01, gt=0, le=1)
    """Rate of the target critics' soft update."""
    std_start: float = Field(default=1.0, ge=0)
    """Standard deviation of the exploration noise at the first agent step."""
    std_end: float = Field(default=0.1, ge=0)
    """Standard deviation of the exploration noise after `schedule_steps`, reached linearly."""
    schedule_steps: int | None = Field(default=None, ge=0)
    """Agent steps over which the exploration noise falls. Default: the paper's, 100,000 for its easy tasks, 2,000,000 for
    humanoid, 500,000 otherwise."""
    noise_clip: float = Field(default=0.3, ge=0)
    """Bound of the noise on the policy's actions in the losses."""


@final
class DrQV2(Agent):
    """A deterministic policy with scheduled noise, twin critics, and random shifts of images (Yarats et al., 2021).

    Policy and critics share convolutions, which only the critics' loss trains; the target critics use the same ones. From states,
    there are no convolutions, trunks or shifts.
    """

    name = "drqv2"
    SHORT_SEGMENTS = True
    Config = DrQV2Config

    def __init__(self, config: DrQV2Config, spec: EnvSpec):
        super().__init__(config, spec)
        self.settings = config
        task = spec.task
        self.batch_size = config.batch_size or (512 if task.startswith("walker-") else 256)
        self.schedule_steps = _schedule_steps(task) if config.schedule_steps is None else config.schedule_steps
        self.encoder, size = build_features(config, spec, offset=0.5)
        self.actor = PolicyNetwork(*build_trunk(config, spec, size), spec.action_dim, config.width)
        trunk = build_trunk(config, spec, size)
        self.critics = TwinCritics(*trunk, spec.action_dim, config.width, gain=_RELU_GAIN)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.optimizer = GuardedOptimizer({"encoder": self.encoder, "critics": self.critics}, config.lr)
        self.actor_optimizer = GuardedOptimizer({"actor": self.actor}, config.lr)
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
    ) -> tuple[Actions, Memory]:
        """The policy's action, with noise of the scheduled standard deviation if `explore` is set."""
        action = self._policy(self.encoder(obs))
        if explore:
            scale = self.exploration_std(step) if std is None else std
            action = action + scale * noise_like(action, generator)
        return action.clamp(-1.0, 1.0), {}

    def schedule(self, step: int) -> ActingSchedule:
        """The standard deviation of the noise."""
        return ActingSchedule((), self.exploration_std(step))

    def exploration_std(self, step: int) -> float:
        """Standard deviation of the exploration noise after `step` agent steps."""
        share = min(1.0, step / self.schedule_steps) if self.schedule_steps else 1.0
        return self.settings.std_start + share * (self.settings.std_end - self.settings.std_start)

    def _policy(self, features: Latents) -> Actions:
        return torch.tanh(self.actor(features))

    # Learning

    def update(self, segment: Segment, *, generator: torch.Generator) -> tuple[Rows, Scalars]:
        """One update: a step of the critics and the encoder, one of the policy, and the soft update of the target critics."""
        s, batch = self.settings, n_step(segment, self.settings.discount)
        batch = batch._replace(obs=_shifted(batch.obs, generator), next_obs=_shifted(batch.next_obs, generator))

        noise = self._noise(batch.actions, generator)
        arguments = (self, batch, segment.weights, noise)
        loss, priorities, features, q = maybe_compiled(self.compiles, DrQV2.critic_loss, *arguments)
        grad_norm = self.optimizer.step(self.optimizer.gradient(loss))

        noise = self._noise(batch.actions, generator)
        actor_loss = maybe_compiled(self.compiles, DrQV2.actor_loss, self, features, noise)
        actor_grad_norm = self.actor_optimizer.step(self.actor_optimizer.gradient(actor_loss))

        self.updates += 1
        soft_update(self.target_critics.parameters(), self.critics.parameters(), s.ema)
        return priorities, {
            "critic_loss": loss.detach(),
            "q": q,
            "actor_loss": actor_loss.detach(),
            "grad_norm": grad_norm,
            "actor_grad_norm": actor_grad_norm,
        }

    def critic_loss(self, batch: Transition, weights: Rows, noise: Actions) -> tuple[Scalar, Rows, Latents, Scalar]:
        """Σ_k (Q_k(s, a) − y)² with y = Σ_t γ^t r_t + γ^n min Q⁻(s′, π(s′) + noise); new priorities, features of s, mean of Q."""
        with torch.no_grad():
            next_features = self.encoder(batch.next_obs)
            action = with_noise(self._policy(next_features), noise)
            target = batch.rewards + batch.discounts * self.target_critics(next_features, action).amin(0)
        features = self.encoder(batch.obs)
        q = self.critics(features, batch.actions)
        return *bellman_loss(q, target, weights), features.detach(), q.detach().mean()

    def actor_loss(self, features: Latents, noise: Actions) -> Scalar:
        """−min Q(s, π(s) + noise), the mean over rows."""
        return -self.critics(features, with_noise(self._policy(features), noise)).amin(0).mean()

    def _noise(self, like: Actions, generator: torch.Generator) -> Actions:
        """Clipped noise of the standard deviation that is scheduled at this number of updates."""
        std = self.exploration_std(self._trained_steps())
        return action_noise(like.shape, std, like=like, generator=generator, limit=self.settings.noise_clip)

    def _trained_steps(self) -> int:
        """The number of agent steps to which the number of updates corresponds."""
        return int(self.updates / self.settings.updates_per_step)

    def learning_schedule(self) -> LearningSchedule | None:
        """Nothing once the noise has fallen to its end. Before, an update is not recorded, because the next one has less noise."""
        return LearningSchedule(()) if self._trained_steps() >= self.schedule_steps else None

    def q(self, obs: Observations, actions: Actions) -> AnyQValues:
        """Q_k(s, a): (B *S), (B A) → (2 B)."""
        return self.critics(self.encoder(obs), actions)

    def value_calibration(self, obs: Observations, actions: Actions, returns: Rows) -> Metrics:
        """Compare Q with the discounted returns that followed."""
        return calibration(self.q, obs, actions, returns)

    # Resuming

    @property
    def optimizers(self) -> dict[str, GuardedOptimizer]:
        """The optimizers of all networks."""
        return {"optimizer": self.optimizer, "actor_optimizer": self.actor_optimizer}


def _shifted(obs: Tensor, generator: torch.Generator) -> Tensor:
    """Images (B C h w) shifted at random. States are unchanged."""
    return random_shift(obs, _MAX_SHIFT, generator) if obs.dim() == 4 else obs


def _schedule_steps(task: str) -> int:
    if task in _EASY:
        return 100_000
    return 2_000_000 if task.startswith("humanoid-") else 500_000
