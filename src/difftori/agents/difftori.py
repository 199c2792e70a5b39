"""DiffTORI for reinforcement learning: actions are optimised, and learning differentiates through it (Wan et al., 2024, Section 3.2)."""

import copy
from typing import Literal, final

import torch
from pydantic import Field, field_validator
from torch import Tensor

from difftori import presets
from difftori.agents.calibration import calibration
from difftori.agents.latent_model import (
    LatentModelConfig,
    augmented,
    build_encoder,
    build_model,
    from_pixels,
    trained_by_model_loss,
)
from difftori.agents.losses import critic_loss, model_loss, prior_loss
from difftori.errors import ConfigError, SolverError
from difftori.interfaces import ActingSchedule, Agent, LearningSchedule, Memory
from difftori.models.nets import nan_where_broken, noise_like
from difftori.models.world_model import ObservationCritics, WorldModel, action_noise
from difftori.optim import GuardedOptimizer, soft_update
from difftori.planning import ActionReturnObjective, Plan, Planner, ReturnObjective
from difftori.solver import (
    Adjoint,
    Box,
    Detached,
    Implicit,
    ProjectedGradient,
    TrajectoryObjective,
    Truncated,
    Unrolled,
)
from difftori.solver.compiled import maybe_compiled
from difftori.steering import Steering
from difftori.types import (
    Actions,
    AnyObservations,
    EnvSpec,
    Latents,
    Metrics,
    Observations,
    Plans,
    RowFlags,
    Rows,
    Scalar,
    Scalars,
    Segment,
)

_MAX_ROWS = 256
"""Number of states whose plans are differentiated together at the end of an episode."""
_COMPILED_ROWS = 64
"""If compiled, the number of rows is a multiple of this, because every new shape is compiled separately."""
_BOX = Box(-1.0, 1.0)
_STEERED_STEPS = 6
"""Smallest number of steps of a solve with an added cost: the default of `plan_steps`."""


class DiffTORIConfig(LatentModelConfig):
    """Settings of `DiffTORI`: TD-MPC's latent model, the planner, and the policy-gradient term of Eq. 6."""

    pg: Literal["off", "replay", "per-episode"] = "per-episode"
    """Schedule of the policy-gradient term c_0·(−min Q̃(s, a(θ))) of Eq. 6. `off`: without the term (the ablation of Figure
    5). `replay`: in every update, on the first states of the segments, Eq. 6 as written. `per-episode`: one step at the end
    of an episode on the gradient summed over its states, as released. Differs from paper: `replay` is not the default,
    because it measured worse (docs/reinforcement.md)."""
    pg_optimizer: Literal["own", "shared"] = "own"
    """Optimizer of the policy-gradient term. `own`: a separate Adam, as released. `shared`: its gradient is added to that of
    Eq. 3, as written; needs `pg: replay`."""
    pg_coef: float = 1.0
    """Weight c_0 of the policy-gradient term. Negative: the sign-flipped control. With `pg_optimizer: own` it has hardly any effect."""
    pg_lr: float | None = Field(default=None, gt=0)
    """Learning rate of the policy-gradient term's own optimizer. Default: that of the model."""
    pg_clip_norm: float = Field(default=100.0, gt=0)
    """Largest norm of the policy-gradient term's gradient. The default is the release's, for a sum over an episode."""
    pg_batch: int = Field(default=64, ge=1)
    """States per step of the policy-gradient term with `pg: replay`: the first ones of the batch."""
    pg_every: int = Field(default=1, ge=1)
    """Updates between steps of the policy-gradient term with `pg: replay`."""
    pg_after: int = Field(default=0, ge=0)
    """Updates before the first step of the policy-gradient term."""
    pg_networks: tuple[Literal["encoder", "dynamics", "reward", "q"], ...] = ("encoder", "dynamics", "reward", "q")
    """Networks that the policy-gradient term trains."""

    planner: Literal["fast", "reference"] = "fast"
    """`fast`: spectral projected gradient in the box. `reference`: the release's Levenberg–Marquardt, truncated after 5 steps."""
    plan_steps: int = Field(default=6, ge=1)
    """Steps of the fast planner for inference."""
    pg_steps: int = Field(default=4, ge=1)
    """Steps of the fast planner when its plan is differentiated."""
    adjoint: Literal["unrolled", "truncated", "implicit"] = "unrolled"
    """How the fast planner is differentiated: through all steps, through the last five, or at the optimum (implicitly)."""
    terminal: Literal["prior", "action"] = "prior"
    """Action in the terminal value γ^H Q(z_H, ·). `prior`: π(z_H), as released. `action`: a_H is optimised too, as in Eq. 4."""
    init: Literal["prior", "zero", "previous"] = "prior"
    """Initial guess of a solve: the rollout of the prior, zeros, or the last plan shifted by one step (the prior's rollout if there is none)."""
    init_std: float = Field(default=0.05, ge=0)
    """Standard deviation of the noise on the prior's rollout, clipped at 0.3, also in evaluation, as released."""
    explore: bool = True
    """Add noise with TD-MPC's schedule to training actions. Differs from paper: the release has noise on the initial guess only."""
    q_target: Literal["prior", "planner"] = "prior"
    """Next action in the Bellman target of Q̃: that of π, as released, or that of the planner, which acts."""
    obs_q_coef: float = Field(default=0.1, ge=0)
    """Weight of the Bellman error of Q̃ in the loss. 0, with `pg: off`: without Q̃, an update takes about as long as TD-MPC's."""
    obs_q_steps: int | None = Field(default=None, ge=1)
    """First steps of each segment on which Q̃ is trained. Default: all from states, one from images, because Q̃'s encoders are
    most of the arithmetic of an update; from states, one step cost no return (docs/reinforcement-studies.md)."""

    @field_validator("pg_networks")
    @classmethod
    def _at_least_one(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names:
            raise ValueError("pg_networks is empty. Fix: name at least one network, or set pg: off")
        return names


@final
class DiffTORI(Agent):
    """Optimisation-based agent: a(θ) = argmax of Eq. 4, trained with L = L_TD-MPC + c_0·(−min Q̃_φ(s, a(θ))) (Eq. 6).

    Model, targets and policy prior are TD-MPC's. Q̃_φ takes observations and is trained by Bellman updates. Q̃_φ and the prior
    receive no gradient from the last term, which trains encoder, dynamics, R and Q through the solve.
    """

    name = "difftori"
    Config = DiffTORIConfig

    def __init__(self, config: DiffTORIConfig, spec: EnvSpec):
        super().__init__(config, spec)
        _check(config, spec)
        self.settings = config
        # Costs are added to the objective of gradient steps; plans of the release's solver are projected.
        self.STEERABLE = "none" if config.planner == "reference" else "cost and constraint"
        self.model = build_model(config, spec)
        self.target = copy.deepcopy(self.model).requires_grad_(False)
        encoders = (build_encoder(config, spec), build_encoder(config, spec))
        self.obs_critics = ObservationCritics(
            encoders, spec.action_dim, latent_dim=config.latent_dim, width=config.width
        )
        self.obs_q_steps = config.obs_q_steps or (1 if from_pixels(spec) else config.horizon)
        self.obs_target = copy.deepcopy(self.obs_critics).requires_grad_(False)
        lr, self.batch_size = config.learning(spec)
        networks = trained_by_model_loss(self.model)
        trained = {**networks, "obs_q": self.obs_critics} if config.obs_q_coef else networks
        self.optimizer = GuardedOptimizer(trained, lr, config.clip_norm)
        self.prior_optimizer = GuardedOptimizer({"prior": self.model.policy}, lr, config.clip_norm)
        chosen = {name: network for name, network in networks.items() if name in config.pg_networks}
        self.pg_optimizer = GuardedOptimizer(chosen, config.pg_lr or lr, config.pg_clip_norm)
        self.updates = 0

    def update(self, segment: Segment, *, generator: torch.Generator) -> tuple[Rows, Scalars]:
        """One update of Eq. 6: steps of the model and critics, of the prior π, and of the policy-gradient term; then soft updates.

        Q̃(o, a) are critics of observations. Q(z, a) are the critics inside the latent model. With `pg: per-episode`, the default, as
        released, the term is in `end_episode` instead.
        """
        s, model = self.settings, self.model
        obs = augmented(segment.obs, generator)

        # the loss of the latent model, L_TD-MPC (Eq. 3), and the Bellman error of Q̃
        noise = action_noise(segment.actions.shape, s.std_end, like=segment.actions, generator=generator)
        td = maybe_compiled(self.compiles, model_loss, model, self.target, segment, obs, noise, s.coefficients())
        loss, metrics = td.total, dict(td.metrics)
        if s.obs_q_coef:
            next_action = self._next_action(td.next_latents[: self.obs_q_steps], generator)
            critics, weights = (self.obs_critics, self.obs_target), (s.discount, s.rho, s.obs_q_coef)
            bellman = maybe_compiled(self.compiles, critic_loss, *critics, segment, obs, next_action, *weights)
            loss, metrics["obs_q_loss"] = loss + bellman, bellman.detach()

        # policy-gradient term c_0·(−min Q̃(s, a(θ))): its gradient goes through the solve, here in the same step as Eq. 3
        states = segment.obs[0, : s.pg_batch]
        if s.pg_optimizer == "shared" and self._pg_due(self.updates + 1):
            pg = self.policy_gradient_loss(states, generator)
            loss = loss + s.pg_coef * self.pg_optimizer.restricted(pg)
            metrics["pg_loss"] = pg.detach()
        metrics["grad_norm"] = self.optimizer.step(self.optimizer.gradient(loss))

        # π maximises min Q at the same latents
        shape = (*td.latents.shape[:-1], self.spec.action_dim)
        noise = action_noise(shape, s.std_end, like=td.latents, generator=generator)
        prior = maybe_compiled(self.compiles, prior_loss, model, td.latents, segment.mask, noise, s.rho)
        metrics["prior_grad_norm"] = self.prior_optimizer.step(self.prior_optimizer.gradient(prior))
        metrics["prior_loss"] = prior.detach()

        self.updates += 1
        if self.updates % s.ema_every == 0:
            soft_update(self.target.parameters(), model.parameters(), s.ema)
            soft_update(self.obs_target.parameters(), self.obs_critics.parameters(), s.ema)

        # the same term in a step of its own, with the updated weights
        if s.pg_optimizer == "own" and self._pg_due(self.updates):
            pg = self.policy_gradient_loss(states, generator)
            metrics["pg_grad_norm"] = self.pg_optimizer.step(self.pg_optimizer.gradient(s.pg_coef * pg))
            metrics["pg_loss"] = pg.detach()
        return td.priorities, metrics

    def policy_gradient_loss(self, obs: Observations, generator: torch.Generator, count: int | None = None) -> Scalar:
        """−min Q̃(s, a(θ)) averaged over the first `count` states of (B *S), or all, differentiable through the solve.

        Rows whose solve is not finite count as zero.
        """
        return self._value_loss(obs, self._differentiable_plan(obs, generator), count)

    def end_episode(self, obs: Observations, *, generator: torch.Generator) -> Scalars:
        """The released schedule: one step of the term on its gradient summed over an episode's states (L *S).

        The release solves while it acts. The weights do not change within an episode, so the sum is the same, except for
        `pg_steps` in place of `plan_steps`.
        """
        s = self.settings
        if s.pg != "per-episode" or self.updates == 0 or self.updates < s.pg_after or not len(obs):
            return {}
        total, sum_of_losses = [], 0.0
        for part in obs.split(_MAX_ROWS):
            loss = self.policy_gradient_loss(self._padded_rows(part), generator, len(part)) * len(part)
            gradient = self.pg_optimizer.gradient(s.pg_coef * loss)
            sum_of_losses = sum_of_losses + loss.detach()
            total = [a + b for a, b in zip(total, gradient, strict=True)] if total else gradient
        return {"pg_loss": torch.as_tensor(sum_of_losses / len(obs)), "pg_grad_norm": self.pg_optimizer.step(total)}

    def _value_loss(self, obs: Observations, plan: Plan, count: int | None = None) -> Scalar:
        value = self.obs_critics(obs, plan.actions[:, 0]).amin(0)
        return -torch.where(plan.solution.finite, value, torch.zeros_like(value))[:count].sum() / (count or len(value))

    def _pg_due(self, update: int) -> bool:
        """Whether this update, counted from 1, includes a step of the term with `pg: replay`."""
        s = self.settings
        return s.pg == "replay" and update >= s.pg_after and update % s.pg_every == 0

    def learning_schedule(self) -> LearningSchedule:
        """What is due, and the planning horizon of the policy-gradient term."""
        s, now, due = self.settings, self.updates, self.updates + 1
        horizons = (self._horizon(now), self._horizon(due)) if self._pg_due(due) else ()
        episode = self._horizon(now) if s.pg == "per-episode" and now > 0 and now >= s.pg_after else None
        return LearningSchedule((due % s.ema_every == 0, horizons), episode)

    def _padded_rows(self, obs: AnyObservations) -> AnyObservations:
        """If compiled, repeat the last row up to a multiple of 64 rows."""
        missing = -len(obs) % _COMPILED_ROWS if self.compiles else 0
        return torch.cat([obs, obs[-1:].expand(missing, *obs.shape[1:])]) if missing else obs

    @torch.no_grad()
    def _next_action(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        """a' of the Bellman target of Q̃ at h(o') (T B Z): π(h(o')) with noise, or the planner's action, (T B A)."""
        latent, shape = latents.flatten(0, 1), (*latents.shape[:2], self.spec.action_dim)
        if self.settings.q_target == "prior":
            noise = action_noise((len(latent), shape[-1]), self.settings.std_end, like=latent, generator=generator)
            return self.model.prior(latent, noise).view(shape)
        horizon = self.settings.horizon
        start = self._start(latent, horizon, generator)
        return self.plan(latent, horizon, start, Detached(), self.settings.plan_steps).actions[:, 0].view(shape)

    # Planning

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
        """The first action of the best plan, for all environments in one solve.

        `steering`: a cost and constraints of the planned actions, in [−1, 1], that are added to the objective.
        """
        s, latent = self.settings, self.model.encode(obs)
        horizon = s.plan_horizon(step)
        start = self._start(latent, horizon, generator)
        if s.init == "previous" and memory is not None:
            start = torch.where(first[:, None, None], start, memory["plan"][:, : start.shape[1]])
        if steering is None:
            plan = self.plan(latent, horizon, start, Detached(), s.plan_steps)
        else:
            planner = Planner(ProjectedGradient(), Detached(), _BOX, max(s.plan_steps, _STEERED_STEPS), tolerance=0.0)
            plan = steering.plan(planner, self.objective(latent, horizon), start)
        action = plan.actions[:, 0]
        if explore and s.explore:
            scale = s.exploration_std(step) if std is None else std
            action = action + scale * noise_like(action, generator)
        later = plan.shifted()
        # All plans of a run have one size in memory.
        last = later[:, -1:].expand(-1, s.horizon + 1 - later.shape[1], -1)
        action = nan_where_broken(action.clamp(-1.0, 1.0), latent)
        return action, {"plan": torch.cat([later, last], 1)}

    def schedule(self, step: int) -> ActingSchedule:
        """The planning horizon, and the standard deviation of the noise."""
        return ActingSchedule(self.settings.plan_horizon(step), self.settings.exploration_std(step))

    def plan(self, latent: Latents, horizon: int, start: Plans, adjoint: Adjoint, steps: int) -> Plan:
        """Solve Eq. 4 from `start`: actions (B H A), or (B H+1 A) if the last one is optimised too."""
        if self.settings.planner == "reference":
            release = presets.reference_rl(self.spec.task, _BOX)
            planner = release.acting() if isinstance(adjoint, Detached) else release
        else:
            solver = ProjectedGradient(exact_unrolling=True)
            planner = Planner(solver, adjoint, _BOX, steps, tolerance=0.0, compile=self.compiles)
        return planner.plan(self.objective(latent, horizon), start)

    def objective(self, latent: Latents, horizon: int) -> TrajectoryObjective:
        """Eq. 4 from `latent` (B Z), with π(z_H) or a_H in the terminal value."""
        model, size, discount = self.model, self.spec.action_dim, self.settings.discount
        if self.settings.terminal == "prior":
            functions = (model.next, model.reward, model.value)
            return ReturnObjective(*functions, latent, horizon, size, discount, stacked=True)
        return ActionReturnObjective(model.next, model.reward, model.min_q, latent, horizon + 1, size, discount)

    @torch.no_grad()
    def _start(self, latent: Latents, horizon: int, generator: torch.Generator) -> Plans:
        """The initial guess of solves: zeros, or the prior's rollout with noise."""
        shape = (latent.shape[0], horizon + (self.settings.terminal == "action"), self.spec.action_dim)
        if self.settings.init == "zero":
            return latent.new_zeros(shape)
        noise = action_noise(shape, self.settings.init_std, like=latent, generator=generator)
        return maybe_compiled(self.compiles, WorldModel.rollout, self.model, latent, noise)

    def _differentiable_plan(self, obs: Observations, generator: torch.Generator) -> Plan:
        """Plans as in `act`, differentiable, with the scheduled horizon at this number of updates."""
        s, latent = self.settings, self.model.encode(obs)
        horizon = self._horizon(self.updates)
        start = self._start(latent, horizon, generator)
        adjoints = {"unrolled": Unrolled(), "truncated": Truncated(5), "implicit": Implicit(linear="cg", products=12)}
        return self.plan(latent, horizon, start, adjoints[s.adjoint], s.pg_steps)

    def _horizon(self, updates: int) -> int:
        return self.settings.plan_horizon(int(updates / self.settings.updates_per_step))

    # Diagnostics

    def diagnose(self, segment: Segment, *, generator: torch.Generator) -> Metrics:
        """Compare the two gradients of Eq. 6 on a batch, and Q̃ at the actions of planner and prior, with the losses of Eq. 3 there.

        Per network: `ratio`, the norm of the term's gradient over TD-MPC's, and their `cosine`, before clipping. `free`: share of
        a_0's coordinates inside the box; `valid`: share of plans at a strict optimum; `gain`: Q̃(s, a(θ)) − Q̃(s, π(h(s)));
        `unsolved`: share of plans that are not finite. `consistency_loss`, `reward_loss`, `value_loss`: as in an update.
        Empty with `obs_q_coef: 0`.
        """
        s = self.settings
        if not s.obs_q_coef:
            return {}
        obs = augmented(segment.obs, generator)
        noise = action_noise(segment.actions.shape, s.std_end, like=segment.actions, generator=generator)
        td = maybe_compiled(self.compiles, model_loss, self.model, self.target, segment, obs, noise, s.coefficients())
        by_td = self.optimizer.by_network(self.optimizer.gradient(td.total))
        states = segment.obs[0, : s.pg_batch]
        plan = self._differentiable_plan(states, generator)
        networks = GuardedOptimizer(trained_by_model_loss(self.model), 1.0, s.pg_clip_norm)
        by_term = networks.by_network(networks.gradient(self._value_loss(states, plan)))
        metrics: Metrics = {name: value.item() for name, value in td.metrics.items() if name != "q"}
        for name, gradient in by_term.items():
            metrics[f"ratio/{name}"] = (gradient.norm() / by_td[name].norm().clamp_min(1e-12)).item()
            metrics[f"cosine/{name}"] = torch.cosine_similarity(gradient, by_td[name], 0).item()
        first = plan.actions[:, 0]
        with torch.no_grad():
            prior = self.model.prior(self.model.encode(states))
            gain = self.obs_critics(states, first).amin(0) - self.obs_critics(states, prior).amin(0)
        metrics["free"] = (first.abs() < 1 - 1e-6).float().mean().item()
        metrics["valid"] = plan.solution.gradient_valid.float().mean().item()
        metrics["gain"] = gain.mean().item()
        metrics["unsolved"] = 1.0 - plan.solution.finite.float().mean().item()
        return metrics

    def value_calibration(self, obs: Observations, actions: Actions, returns: Rows) -> Metrics:
        """Compare Q̃ of the observations and actions of an evaluation (N) with the discounted returns that followed."""
        return calibration(self.obs_critics, obs, actions, returns) if self.settings.obs_q_coef else {}

    # Resuming

    @property
    def optimizers(self) -> dict[str, GuardedOptimizer]:
        """The optimizers of all networks."""
        return {"optimizer": self.optimizer, "prior_optimizer": self.prior_optimizer, "pg_optimizer": self.pg_optimizer}


def _check(config: DiffTORIConfig, spec: EnvSpec) -> None:
    """Raise ConfigError for conflicting settings, or settings that the release does not define for this task."""
    if config.pg_optimizer == "shared" and config.pg != "replay":
        raise ConfigError(
            [f"pg_optimizer: shared needs pg: replay, not pg: {config.pg}. Fix: --pg replay, or --pg-optimizer own"]
        )
    if config.obs_q_coef == 0 and config.pg != "off":
        raise ConfigError([f"obs_q_coef: 0 leaves pg: {config.pg} no critic. Fix: --pg off, or --obs-q-coef 0.1"])
    if config.planner == "reference":
        try:
            presets.reference_rl(spec.task)
        except SolverError as error:
            raise ConfigError([f"planner: reference: {error}"]) from error
