"""DiffTORI for reinforcement learning: acting by an optimiser, and learning through it (Wan et al., 2024, Section 3.2)."""

import copy
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, final

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from difftori.agents._descent import Descent, follow
from difftori.agents.tdmpc import CEILING, TDMPC, ModelLoss, TDMPCConfig
from difftori.errors import ConfigError, SolverError
from difftori.interfaces import Memory
from difftori.models.nets import mlp
from difftori.models.world_model import Critics, action_noise, zero_init_
from difftori.planning import ActionReturnObjective, Planner, ReturnObjective
from difftori.solver import (
    Adjoint,
    Box,
    Detached,
    Implicit,
    ProjectedGradient,
    Solution,
    Truncated,
    Unrolled,
    presets,
)
from difftori.types import (
    Actions,
    AnyActions,
    AnyObservations,
    AnyQValues,
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

_ROWS_AT_ONCE, _ROWS_COMPILED = 256, 64
_MODEL = ("encoder", "dynamics", "reward", "q")


class DiffTORIConfig(TDMPCConfig):
    """Settings of `DiffTORI`: those of TD-MPC that it shares, and its own."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = TDMPCConfig.PRESETS

    pg: Literal["off", "replay", "per-step", "per-episode"] = "per-episode"
    """When c_0·(−min Q̃(s, a(θ))) of Eq. 6 is learned from. `off`: never, Figure 5's ablation. `replay`: with every update,
    on the slice's first states, Eq. 6 as written. `per-episode`: the gradient summed over an episode's states, one step at
    its end, as released. `per-step`: a step for each of them. Differs from paper: `replay` is not the default, because it
    measured worse (docs/reinforcement.md)."""
    pg_optimizer: Literal["own", "shared"] = "own"
    """`own`: an Adam of its own, as released. `shared`: added to Eq. 3's gradient, as written; `replay` only."""
    pg_coef: float = 1.0
    """c_0. Negative: the sign-flipped control. An own Adam hardly feels its size."""
    pg_lr: float | None = Field(None, gt=0)
    """Learning rate of the own Adam; that of the model unless given."""
    pg_clip_norm: float = Field(100.0, gt=0)
    """Bound of the term's gradient, the release's for a sum over an episode."""
    pg_batch: int = Field(64, ge=1)
    """States per step with `replay`, the slice's first so many."""
    pg_every: int = Field(1, ge=1)
    """Updates from one step to the next with `replay`."""
    pg_after: int = Field(0, ge=0)
    """Updates before the first."""
    pg_networks: tuple[Literal["encoder", "dynamics", "reward", "q", "correction"], ...] = _MODEL
    """What the term may move. `correction`: a score of (z, a) of its own, added to R in the planner's objective and nowhere
    else, so that the term has something to learn that Eq. 3 does not contradict; ours."""

    @field_validator("pg_networks")
    @classmethod
    def _something_to_move(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names:
            raise ValueError("name at least one network, or set pg: off")
        return names

    planner: Literal["fast", "reference"] = "fast"
    """`fast`: spectral projected gradient in the box. `reference`: the release's Levenberg–Marquardt, truncated after 5."""
    plan_steps: int = Field(6, ge=1)
    """Steps of the fast planner when acting."""
    pg_steps: int = Field(4, ge=1)
    """Steps of the fast planner when it is differentiated."""
    adjoint: Literal["unrolled", "truncated", "implicit"] = "unrolled"
    """How the fast planner is differentiated: exactly through its steps, through the last five, or through the optimum."""
    terminal: Literal["prior", "action"] = "prior"
    """γ^H Q(z_H, ·): `prior` takes π(z_H), as released; `action` optimises a_H too, as Eq. 4 has it."""
    init: Literal["prior", "zero", "previous"] = "prior"
    """Where a solve starts: the prior's rollout, zero, or the last plan one step later (the prior's where there is none)."""
    init_std: float = Field(0.05, ge=0)
    """Noise of the prior's rollout, clipped at .3, in evaluation too, as released."""
    explore: bool = True
    """Add noise of TD-MPC's schedule to training actions. Differs from paper: the release has none beyond the start's."""
    q_target: Literal["prior", "planner"] = "prior"
    """Whose next action Q̃'s Bellman target takes: π's, as released, or the planner's, which is the policy that acts."""
    obs_q_coef: float = Field(0.1, ge=0)
    """Weight of Q̃'s own Bellman error."""
    obs_q_lambda: float = Field(0.0, ge=0, le=1)
    """λ of Q̃'s target: 0 looks one step ahead, as released; 1 to the slice's end, so that Q̃ rises to the returns sooner; ours."""


class ObservationCritics(nn.Module):
    """Q̃_φ(o, a): twin critics in the observation space, each with an encoder of its own (Wan et al., 2024, Section 3.2)."""

    def __init__(self, encoders: Iterable[nn.Module], action_dim: int, *, latent_dim: int, width: int):
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.heads = nn.ModuleList(Critics(latent_dim, action_dim, width, 1) for _ in self.encoders)

    def forward(self, obs: AnyObservations, action: AnyActions) -> AnyQValues:
        """(… *S), (… A) → (K …)."""
        return torch.cat([head(encode(obs), action) for encode, head in zip(self.encoders, self.heads, strict=True)])


@final
class DiffTORI(TDMPC):
    """a(θ) = argmax of Eq. 4 acts, and is differentiated: L = L_TD-MPC + c_0·(−min Q̃_φ(s, a(θ))) (Eq. 6).

    Model, targets and prior are TD-MPC's. Q̃_φ lives in the observation space, learns by Bellman updates, and is held
    still, as the prior is, where the last term is differentiated through the solve into encoder, dynamics, R and Q.
    """

    name = "difftori"
    Config = DiffTORIConfig

    settings: DiffTORIConfig

    def __init__(self, config: DiffTORIConfig, spec: EnvSpec):
        super().__init__(config, spec)
        if config.pg_optimizer == "shared" and config.pg != "replay":
            raise ConfigError([f"pg_optimizer: shared needs pg: replay, not {config.pg!r}"])
        if config.pg_optimizer == "shared" and "correction" in config.pg_networks:
            raise ConfigError(["pg_optimizer: shared moves what Eq. 3 trains, and no correction; take own"])
        if config.planner == "reference":
            try:
                presets.reference_rl(spec.name.partition(":")[2])
            except SolverError as error:
                raise ConfigError([f"planner: reference: {error}"]) from error
        movable = super()._learned() | ({} if self.correction is None else {"correction": self.correction})
        networks = {name: network for name, network in movable.items() if name in config.pg_networks}
        self.pg_descent = Descent(networks, config.pg_lr or self.lr, config.pg_clip_norm)

    def _make_networks(self) -> None:
        """TD-MPC's, Q̃ and its target, and a correction of R where the term may move one."""
        super()._make_networks()
        s = self.settings
        twins = (self._encoder(), self._encoder())
        self.obs_critics = ObservationCritics(twins, self.spec.action_dim, latent_dim=s.latent_dim, width=s.width)
        self.obs_target = copy.deepcopy(self.obs_critics).requires_grad_(False)
        self.correction: nn.Sequential | None = None
        if "correction" in self.settings.pg_networks:
            inputs = self.settings.latent_dim + self.spec.action_dim
            self.correction = mlp((inputs, self.settings.width, 1), nn.ELU)
            zero_init_(self.correction)

    def _learned(self) -> dict[str, nn.Module]:
        return {**super()._learned(), "obs_q": self.obs_critics}

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
        """The first action of the best plan found, all environments in one solve."""
        latent = self.model.encode(obs)
        horizon = self.plan_horizon(step)
        start = self._start(latent, horizon, generator)
        if self.settings.init == "previous" and memory is not None:
            later = torch.cat([memory["plan"][:, 1:], memory["plan"][:, -1:]], 1)[:, : start.shape[1]]
            start = torch.where(first[:, None, None], start, later)
        actions, _ = self.plan(latent, horizon, start, Detached(), self.settings.plan_steps)
        action = actions[:, 0]
        if explore and self.settings.explore:
            noise = torch.randn(action.shape, generator=generator, device=action.device)
            action = action + self.exploration(step) * noise
        return action.clamp(-1.0, 1.0), {"plan": self._padded(actions)}

    def plan(self, latent: Latents, horizon: int, start: Plans, adjoint: Adjoint, steps: int) -> tuple[Plans, Solution]:
        """Eq. 4 solved from `start`: actions (B H A), or (B H+1 A) where the last one is optimised too."""
        objective = self.objective(latent, horizon)
        if self.settings.planner == "reference":
            acting = isinstance(adjoint, Detached)
            preset = presets.reference_rl(self.spec.name.partition(":")[2], keep="best" if acting else "last")
            solution = (preset.acting() if acting else preset).solve(objective, start.flatten(1), box=Box(-1.0, 1.0))
            return objective.plan(solution.x), solution
        box = Box(-1.0, 1.0)
        planner = Planner(ProjectedGradient(), adjoint, box, steps, tolerance=0.0, compile=self.compiles)
        plan = planner.plan(objective, start)
        return plan.actions, plan.solution

    def objective(self, latent: Latents, horizon: int) -> ReturnObjective:
        """Eq. 4, with π(z_H) or with a_H; R with its correction where there is one."""
        model, size, discount = self.model, self.spec.action_dim, self.settings.discount
        reward = model.reward if self.correction is None else self._corrected_reward
        if self.settings.terminal == "prior":
            return ReturnObjective(model.next, reward, model.value, latent, horizon, size, discount)
        return ActionReturnObjective(model.next, reward, model.least_q, latent, horizon + 1, size, discount)

    def _corrected_reward(self, latent: Tensor, action: Tensor) -> Tensor:
        assert self.correction is not None
        return self.model.reward(latent, action) + self.correction(torch.cat((latent, action), -1)).squeeze(-1)

    @torch.no_grad()
    def _start(self, latent: Latents, horizon: int, generator: torch.Generator) -> Plans:
        length = horizon + (self.settings.terminal == "action")
        if self.settings.init == "zero":
            return latent.new_zeros(len(latent), length, self.spec.action_dim)
        shape = (len(latent), length, self.spec.action_dim)
        noise = action_noise(shape, self.settings.init_std, like=latent, generator=generator)
        return self._fast(DiffTORI._rollout, latent, noise)

    def _rollout(self, latent: Latents, noise: Plans) -> Plans:
        return self.model.rollout(latent, noise)

    def _padded(self, actions: Plans) -> Tensor:
        return nn.functional.pad(actions, (0, 0, 0, self.settings.horizon + 1 - actions.shape[1]))

    # Learning

    def update(self, segment: Segment, *, generator: torch.Generator) -> tuple[Rows, Metrics]:
        """TD-MPC's update with Q̃'s error in it, then a step of the policy-gradient term where it is due."""
        priorities, metrics = super().update(segment, generator=generator)
        if self._pg_due("own"):
            loss = self.policy_gradient_loss(self._pg_states(segment), generator)
            norm = self.pg_descent.step(self.pg_descent.gradient(self.settings.pg_coef * loss))
            metrics |= {"pg_loss": loss.item(), "pg_grad_norm": norm}
        return priorities, metrics

    def loss(self, segment: Segment, obs: Tensor, generator: torch.Generator) -> ModelLoss:
        """Eq. 6: L_TD-MPC, Q̃'s Bellman error, and with a shared optimiser c_0·(−min Q̃(s, a(θ)))."""
        base = super().loss(segment, obs, generator)
        critic = self._fast(DiffTORI.obs_critic_loss, segment, obs, self._next_action(obs[1:], generator))
        total = base.total + critic
        metrics = {**base.metrics, "obs_q_loss": critic.detach()}
        if self._pg_due("shared"):
            pg = self.policy_gradient_loss(self._pg_states(segment), generator)
            total = total + self.settings.pg_coef * self._only_for_the_planner(pg)
            metrics["pg_loss"] = pg.detach()
        return ModelLoss(total, base.priorities, base.latents, metrics)

    def _only_for_the_planner(self, pg: Scalar) -> Scalar:
        """The term with derivatives for `pg_networks` alone: Q̃ judges, and must not learn from its own praise."""
        gradient = self.pg_descent.gradient(pg)
        pulls = [(part * p).sum() for part, p in zip(gradient, self.pg_descent.parameters, strict=True)]
        pull = torch.stack(pulls).sum()
        return pg.detach() + pull - pull.detach()

    def policy_gradient_loss(self, obs: Observations, generator: torch.Generator, count: int | None = None) -> Scalar:
        """−min Q̃(s, a(θ)) averaged over the first `count` states of (B *S), or all, differentiable through the solve.

        Rows without a solution are left out.
        """
        actions, solution = self._differentiable_plan(obs, generator)
        return self._judged_by_critics(obs, actions, solution, count)

    def _judged_by_critics(
        self, obs: Observations, actions: Plans, solution: Solution, count: int | None = None
    ) -> Scalar:
        value = self.obs_critics(obs, actions[:, 0]).amin(0)
        return -torch.where(solution.finite, value, torch.zeros_like(value))[:count].sum() / (count or len(value))

    def _padded_rows(self, obs: AnyObservations) -> AnyObservations:
        """Compiled: the last row again, up to a multiple of 64, because every new number of rows is compiled anew."""
        missing = -len(obs) % _ROWS_COMPILED if self.compiles else 0
        return torch.cat([obs, obs[-1:].expand(missing, *obs.shape[1:])]) if missing else obs

    def end_episode(self, obs: Observations, *, generator: torch.Generator) -> Metrics:
        """The released schedule: the term's gradient over the episode (L *S), summed, then one step (or one for each state).

        The release solves as it acts; the weights do not change within an episode, so that its sum is the same here, but
        for `pg_steps` in place of `plan_steps`.
        """
        if self.updates == 0 or self.settings.pg not in ("per-episode", "per-step"):
            return {}
        if self.updates < self.settings.pg_after:
            return {}
        rows = 1 if self.settings.pg == "per-step" else _ROWS_AT_ONCE
        total: list[Tensor] = []
        losses, norms = 0.0, []
        for part in obs.split(rows):
            loss = self.policy_gradient_loss(self._padded_rows(part), generator, len(part)) * len(part)
            gradient = self.pg_descent.gradient(self.settings.pg_coef * loss)
            losses += loss.item()
            if rows == 1:
                norms.append(self.pg_descent.step(gradient))
            else:
                total = [a + b for a, b in zip(total, gradient, strict=True)] if total else gradient
        if total:
            norms.append(self.pg_descent.step(total))
        return {"pg_loss": losses / len(obs), "pg_grad_norm": sum(norms) / len(norms)}

    def _differentiable_plan(self, obs: Observations, generator: torch.Generator) -> tuple[Plans, Solution]:
        """Plans as they are acted on: of the horizon that the schedule has come to, by the count of updates."""
        latent = self.model.encode(obs)
        horizon = self.plan_horizon(int(self.updates / self.settings.updates_per_step))
        start = self._start(latent, horizon, generator)
        return self.plan(latent, horizon, start, self._adjoint(), self.settings.pg_steps)

    def _adjoint(self) -> Adjoint:
        choices = {"unrolled": Unrolled(), "truncated": Truncated(5), "implicit": Implicit(linear="cg", products=12)}
        return choices[self.settings.adjoint]

    def _pg_due(self, optimizer: str) -> bool:
        """Whether this update is to move the term with that optimiser; `own` looks after the update, `shared` before."""
        s = self.settings
        if s.pg != "replay" or s.pg_optimizer != optimizer:
            return False
        update = self.updates + (optimizer == "shared")
        return update >= s.pg_after and update % s.pg_every == 0

    def _pg_states(self, segment: Segment) -> Observations:
        """Un-augmented states of the slice's first step, as the release has them."""
        return segment.obs[0, : self.settings.pg_batch]

    def obs_critic_loss(self, segment: Segment, obs: Tensor, next_action: Tensor) -> Scalar:
        """‖Q̃(o, a) − (r + γ min Q̃⁻(o', a'))‖², weighted as Eq. 3's terms are; `obs` (T+1 B *S), a' (T B A)."""
        with torch.no_grad():
            goal = self._lambda_returns(segment, self.obs_target(obs[1:], next_action).amin(0))
        errors = (self.obs_critics(obs[:-1], segment.actions) - goal).square().sum(0)
        rows = (self.step_weights(segment) * errors).sum(0).clamp(max=CEILING)
        return self.settings.obs_q_coef * (rows * segment.weights).mean() / len(segment.actions)

    def _lambda_returns(self, segment: Segment, value: Tensor) -> Tensor:
        """G_t = r_t + γ ((1 − λ) V_{t+1} + λ G_{t+1}), beginning at the slice's end, or the episode's: (T B) → (T B)."""
        discount, mix = self.settings.discount, self.settings.obs_q_lambda
        returns, following = [], value[-1]
        for t in reversed(range(len(value))):
            if t + 1 < len(value):
                recorded = mix * segment.mask[t + 1]
                following = (1 - recorded) * value[t] + recorded * following
            following = segment.rewards[t] + discount * (~segment.terminated[t]).float() * following
            returns.append(following)
        return torch.stack(returns[::-1])

    @torch.no_grad()
    def _next_action(self, following: Tensor, generator: torch.Generator) -> Tensor:
        """a' of Q̃'s target: π(h(o')) with noise, or the planner's, (T B *S) → (T B A)."""
        latent = self.model.encode(following.flatten(0, 1))
        if self.settings.q_target == "prior":
            shape = (len(latent), self.spec.action_dim)
            noise = action_noise(shape, self.settings.std_end, like=latent, generator=generator)
            return self.model.prior(latent, noise).unflatten(0, following.shape[:2])
        horizon = self.settings.horizon
        start = self._start(latent, horizon, generator)
        actions, _ = self.plan(latent, horizon, start, Detached(), self.settings.plan_steps)
        return actions[:, 0].unflatten(0, following.shape[:2])

    def _follow(self) -> None:
        super()._follow()
        follow(self.obs_target.parameters(), self.obs_critics.parameters(), self.settings.ema)

    # What is looked at

    def diagnose(self, segment: Segment, *, generator: torch.Generator) -> Metrics:
        """How the two gradients of Eq. 6 relate on a batch, and what the critic makes of the planner's action.

        Per network: the term's norm over TD-MPC's and their cosine, before clipping. `free`: share of a_0's coordinates
        inside the box; `valid`: share of plans near a strict optimum; `gain`: Q̃(s, a(θ)) − Q̃(s, π(h(s))).
        """
        obs = self.augmented(segment.obs, generator)
        td = self.descent.by_network(self.descent.gradient(super().loss(segment, obs, generator).total))
        states = self._pg_states(segment)
        term = Descent(super()._learned(), self.lr, self.settings.pg_clip_norm)
        actions, solution = self._differentiable_plan(states, generator)
        pg = term.by_network(term.gradient(self._judged_by_critics(states, actions, solution)))
        metrics: Metrics = {}
        for name, gradient in pg.items():
            metrics[f"ratio/{name}"] = (gradient.norm() / td[name].norm().clamp_min(1e-12)).item()
            metrics[f"cosine/{name}"] = torch.cosine_similarity(gradient, td[name], 0).item()
        first = actions[:, 0]
        with torch.no_grad():
            prior = self.model.prior(self.model.encode(states))
            gain = self.obs_critics(states, first).amin(0) - self.obs_critics(states, prior).amin(0)
        metrics["free"] = (first.abs() < 1 - 1e-6).float().mean().item()
        metrics["valid"] = solution.gradient_valid.float().mean().item()
        metrics["gain"] = gain.mean().item()
        metrics["unsolved"] = 1.0 - solution.finite.float().mean().item()
        return metrics

    @torch.no_grad()
    def judge(self, obs: Observations, actions: Actions, returns: Rows) -> Metrics:
        """Q̃ of what was seen and done in evaluation (N) beside the discounted return that followed."""
        value = torch.cat(
            [
                self.obs_critics(o, a).amin(0)
                for o, a in zip(obs.split(_ROWS_AT_ONCE), actions.split(_ROWS_AT_ONCE), strict=True)
            ]
        )
        both = torch.stack([value.double(), returns.double()])
        return {
            "obs_q": value.mean().item(),
            "discounted_return": returns.mean().item(),
            "obs_q_correlation": torch.corrcoef(both)[0, 1].nan_to_num().item(),
        }

    # Resuming

    def training_state(self) -> dict[str, Any]:
        """TD-MPC's, and the optimiser of the policy-gradient term."""
        return {**super().training_state(), "pg_descent": self.pg_descent.state()}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Put it back."""
        super().load_training_state(state)
        self.pg_descent.load(state["pg_descent"])
