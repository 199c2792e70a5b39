"""SAC: soft actor-critic with automatic temperature (Haarnoja et al., 2018, arXiv 1812.05905)."""

import copy
import math
from typing import Any, ClassVar, NamedTuple, final

import torch
from pydantic import Field
from torch import nn

from difftori.agents.actor_critic import (
    ActorCriticConfig,
    Transition,
    bellman_loss,
    build_features,
    build_trunk,
    n_step,
)
from difftori.agents.calibration import calibration
from difftori.agents.latent_model import from_pixels
from difftori.interfaces import ActingSchedule, Agent, LearningSchedule, Memory
from difftori.models.actor_critic import PolicyNetwork, TwinCritics, bounded_log_std, squashed_gaussian
from difftori.models.nets import noise_like
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

_LOG_STD_MAX = 2.0


class _Source(NamedTuple):
    """Settings that differ between SAC's implementations for states (pytorch_sac) and for pixels (SAC-AE), of one author."""

    lr: float
    batch_size: int
    ema: float
    log_std_min: float
    actor_every: int
    temperature_beta1: float


_STATE, _PIXELS = _Source(1e-4, 1024, 0.005, -5.0, 1, 0.9), _Source(1e-3, 128, 0.01, -10.0, 2, 0.5)

# The sizes of Haarnoja et al. (2018), Table 1, and smaller ones for many runs on two CPU cores.
_COMPACT: dict[str, Any] = {"width": 256, "batch_size": 256, "lr": 3e-4, "channels": 16, "seed_steps": 1000}
_SMALL: dict[str, Any] = {"width": 128, "batch_size": 128, "lr": 1e-3, "channels": 8, "seed_steps": 1000}


class SACConfig(ActorCriticConfig):
    """Settings of `SAC`. The defaults are those of its implementations for DeepMind Control (docs/reinforcement.md)."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"paper": {}, "compact": _COMPACT, "small": _SMALL}

    batch_size: int | None = Field(default=None, ge=1)
    """Transitions per update. Default: 128 from pixels, 1024 from states."""
    lr: float | None = Field(default=None, gt=0)
    """Learning rate of policy and critics. Default: 1e-3 from pixels, 1e-4 from states."""
    ema: float | None = Field(default=None, gt=0, le=1)
    """Rate of the target critics' soft update. Default: 0.01 from pixels, 0.005 from states."""
    encoder_ema: float = Field(default=0.05, gt=0, le=1)
    """Rate of the soft update of the target critics' pixel encoder."""
    ema_every: int = Field(default=2, ge=1)
    """Updates between soft updates of the target critics."""
    init_temperature: float = Field(default=0.1, gt=0)
    """Initial temperature, the weight of the entropy against the reward."""
    temperature_lr: float = Field(default=1e-4, gt=0)
    """Learning rate of the temperature."""
    target_entropy: float | None = None
    """Entropy that the temperature aims at. Default: minus the number of action dimensions."""


class Temperature(nn.Module):
    """The temperature T > 0, stored as its logarithm."""

    def __init__(self, initial: float):
        super().__init__()
        self.log = nn.Parameter(torch.tensor(math.log(initial)))

    def forward(self) -> Scalar:
        """T."""
        return self.log.exp()


@final
class SAC(Agent):
    """A squashed Gaussian policy that maximises return plus T times its entropy, with twin critics (Haarnoja et al., 2018).

    From pixels, the encoder is that of SAC-AE (Yarats et al., 2019) without the decoder: policy and critics share
    convolutions, which only the critics' loss trains.
    """

    name = "sac"
    SHORT_SEGMENTS = True
    Config = SACConfig

    def __init__(self, config: SACConfig, spec: EnvSpec):
        super().__init__(config, spec)
        self.settings = config
        self.source = _PIXELS if from_pixels(spec) else _STATE
        self.batch_size = config.batch_size or self.source.batch_size
        self.encoder, size = build_features(config, spec, offset=0.0)
        self.actor = PolicyNetwork(*build_trunk(config, spec, size), 2 * spec.action_dim, config.width)
        self.critics = TwinCritics(*build_trunk(config, spec, size), spec.action_dim, config.width)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.temperature = Temperature(config.init_temperature)
        lr, beta1 = config.lr or self.source.lr, self.source.temperature_beta1
        self.optimizer = GuardedOptimizer({"encoder": self.encoder, "critics": self.critics}, lr)
        self.actor_optimizer = GuardedOptimizer({"actor": self.actor}, lr)
        temperature = {"temperature": self.temperature}
        self.temperature_optimizer = GuardedOptimizer(temperature, config.temperature_lr, beta1=beta1)
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
        """An action sampled from the policy if `explore` is set, otherwise tanh of its mean."""
        mean, log_std = self._gaussian(self.encoder(obs))
        noise = noise_like(mean, generator) if explore else torch.zeros_like(mean)
        return torch.tanh(mean + log_std.exp() * noise), {}

    def schedule(self, step: int) -> ActingSchedule:
        """Nothing: the policy does not depend on the step."""
        return ActingSchedule((), 0.0)

    def _gaussian(self, features: Latents) -> tuple[Actions, Actions]:
        """Mean and log standard deviation of the policy before tanh."""
        mean, raw = self.actor(features).chunk(2, -1)
        return mean, bounded_log_std(raw, self.source.log_std_min, _LOG_STD_MAX)

    # Learning

    def update(self, segment: Segment, *, generator: torch.Generator) -> tuple[Rows, Scalars]:
        """One update: steps of the critics, of the policy and of the temperature, and the soft update of the target critics."""
        s, batch = self.settings, n_step(segment, self.settings.discount)
        self.updates += 1

        noise = noise_like(batch.actions, generator)
        loss, priorities, q = maybe_compiled(self.compiles, SAC.critic_loss, self, batch, segment.weights, noise)
        grad_norm = self.optimizer.step(self.optimizer.gradient(loss))
        metrics = {"critic_loss": loss.detach(), "q": q, "grad_norm": grad_norm}

        if self.updates % self.source.actor_every == 0:
            noise = noise_like(batch.actions, generator)
            loss, log_prob = maybe_compiled(self.compiles, SAC.actor_loss, self, batch.obs, noise)
            metrics["actor_grad_norm"] = self.actor_optimizer.step(self.actor_optimizer.gradient(loss))
            metrics |= {"actor_loss": loss.detach(), "entropy": -log_prob.mean()}

            loss = self.temperature_loss(log_prob)
            self.temperature_optimizer.step(self.temperature_optimizer.gradient(loss))
            metrics |= {"temperature": self.temperature().detach()}

        if self.updates % s.ema_every == 0:
            soft_update(self.target_encoder.parameters(), self.encoder.parameters(), s.encoder_ema)
            soft_update(self.target_critics.trunk.parameters(), self.critics.trunk.parameters(), s.encoder_ema)
            rate = s.ema or self.source.ema
            soft_update(self.target_critics.heads.parameters(), self.critics.heads.parameters(), rate)
        return priorities, metrics

    def critic_loss(self, batch: Transition, weights: Rows, noise: Actions) -> tuple[Scalar, Rows, Scalar]:
        """Σ_k (Q_k(s, a) − y)² with y = r + γ (min Q⁻(s′, a′) − T log π(a′|s′)) and a′ ~ π(s′); new priorities; the mean of Q."""
        with torch.no_grad():
            action, log_prob = squashed_gaussian(*self._gaussian(self.encoder(batch.next_obs)), noise)
            next_q = self.target_critics(self.target_encoder(batch.next_obs), action).amin(0)
            target = batch.rewards + batch.discounts * (next_q - self.temperature() * log_prob)
        q = self.critics(self.encoder(batch.obs), batch.actions)
        return *bellman_loss(q, target, weights), q.detach().mean()

    def actor_loss(self, obs: Observations, noise: Actions) -> tuple[Scalar, Rows]:
        """T log π(a|s) − min Q(s, a) with a ~ π(s), the mean over rows, and log π (B)."""
        with torch.no_grad():
            features = self.encoder(obs)
        action, log_prob = squashed_gaussian(*self._gaussian(features), noise)
        loss = self.temperature().detach() * log_prob - self.critics(features, action).amin(0)
        return loss.mean(), log_prob.detach()

    def temperature_loss(self, log_prob: Rows) -> Scalar:
        """−T (log π + H̄), the mean over rows: T rises while the entropy is below the target H̄."""
        target = self.settings.target_entropy
        wanted = -float(self.spec.action_dim) if target is None else target
        return -self.temperature() * (log_prob + wanted).mean()

    def q(self, obs: Observations, actions: Actions) -> AnyQValues:
        """Q_k(s, a): (B *S), (B A) → (2 B)."""
        return self.critics(self.encoder(obs), actions)

    def value_calibration(self, obs: Observations, actions: Actions, returns: Rows) -> Metrics:
        """Compare Q, which includes the entropy bonus, with the discounted returns that followed."""
        return calibration(self.q, obs, actions, returns)

    def learning_schedule(self) -> LearningSchedule:
        """Whether the policy is updated, and the target critics."""
        update = self.updates + 1
        return LearningSchedule((update % self.source.actor_every == 0, update % self.settings.ema_every == 0))

    # Resuming

    @property
    def optimizers(self) -> dict[str, GuardedOptimizer]:
        """The optimizers of all networks."""
        return {
            "optimizer": self.optimizer,
            "actor_optimizer": self.actor_optimizer,
            "temperature_optimizer": self.temperature_optimizer,
        }
