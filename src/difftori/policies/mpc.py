"""Differentiable MPC with known structure: the optimal controller of the pendulum, as expert and as the policy of Amos et al.

Amos et al. (2018), "Differentiable MPC for End-to-end Planning and Control", arXiv 1810.13400.
"""

from collections.abc import Iterable
from typing import Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from difftori.envs.pendulum import DT, LINEAR, QUADRATIC, Pendulum, PendulumParameters, pendulum_step
from difftori.errors import ShapeError
from difftori.interfaces import Policy, PolicyConfig
from difftori.planning import Planner
from difftori.solver import ILQR, Adjoint, Box, Detached, Implicit, TrajectoryObjective
from difftori.types import Actions, Plans, Rows, Scalar, Scalars, States, TaskSpec, Window, WindowObs, flat_rows


@final
class PendulumObjective(TrajectoryObjective):
    """Σ_{t<H} ½ τᵀdiag(q)τ + pᵀτ with τ = (cos θ, sin θ, θ̇, u), under the given parameters; no terminal cost.

    `state` (B 3). `quadratic` q and `linear` p have 4 entries each and may require gradients.
    """

    def __init__(
        self,
        parameters: PendulumParameters,
        quadratic: Tensor,
        linear: Tensor,
        state: States,
        horizon: int,
    ):
        self.parameters, self.quadratic, self.linear = parameters, quadratic, linear
        self.state, self.horizon, self.action_dim, self.discount = state, horizon, 1, 1.0

    def next(self, state: States, action: Actions, t: Tensor) -> States:
        """Return the next state of the pendulum. The box bounds the torque, so it is not clamped here."""
        return pendulum_step(state, action, self.parameters, dt=DT, torque_limit=float("inf"))

    def stage_cost(self, state: States, action: Actions, t: Tensor) -> Rows:
        """Return ½ τᵀdiag(q)τ + pᵀτ."""
        pair = torch.cat((state, action), -1)
        return (0.5 * self.quadratic * pair.square() + self.linear * pair).sum(-1)

    def terminal_cost(self, state: States) -> Rows:
        """Return zero: the state after the last control has no cost."""
        return torch.zeros_like(state[..., 0])

    def select(self, rows: Tensor) -> "PendulumObjective":
        """Return the same problem for a subset of the starts."""
        return PendulumObjective(self.parameters, self.quadratic, self.linear, self.state[rows], self.horizon)


def expert(problem: Pendulum, starts: States, *, max_steps: int = 100) -> Plans:
    """Return the optimal torques (B H 1) under the true model and cost, from each start (B 3): box-DDP from zero torque.

    Solves in float64 to a tolerance of 1e-6; the result has the dtype of `starts`.
    """
    state = starts.double()
    objective = PendulumObjective(
        problem.parameters,
        torch.tensor(QUADRATIC, dtype=state.dtype),
        torch.tensor(LINEAR, dtype=state.dtype),
        state,
        problem.horizon,
    )
    box = Box(-problem.torque_limit, problem.torque_limit)
    planner = Planner(ILQR(second_order=True), Detached(), box, max_steps, tolerance=1e-6)
    with torch.no_grad():
        plan = planner.plan(objective, state.new_zeros(len(state), problem.horizon, 1), throw=True)
    return plan.actions.to(starts.dtype)


class MPCConfig(PolicyConfig):
    """Settings of `PendulumMPC`. Optimizer (RMSprop), learning rate and alternation are those of Amos et al.; the others are ours."""

    optimizer: Literal["adam", "adamw", "rmsprop"] = "rmsprop"
    lr: float = Field(default=1e-2, gt=0, allow_inf_nan=False)
    rmsprop_alpha: float = Field(default=0.5, ge=0, lt=1)
    epochs: int = Field(default=300, ge=1)
    clip_norm: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    learn_cost: bool = True
    """Learn the cost parameters q and p in addition to g, m and l. Otherwise the true cost is used."""
    init_parameters: tuple[float, float, float] = (15.0, 3.0, 0.5)
    """Initial values of g, m and l."""
    init_spread: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Half-width of the uniform distribution, around `--init-parameters`, from which g, m and l are initialised by the run's seed."""
    alternate_every: int = Field(default=10, ge=0)
    """Number of epochs after which training alternates between the dynamics and the cost. 0 trains both together."""
    max_steps: int = Field(default=60, ge=1)
    """Largest number of DDP steps."""


@final
class PendulumMPC(Policy):
    """û(s; θ) = argmin_u Σ_t ½ τᵀdiag(q)τ + pᵀτ under the pendulum with (g, m, l), trained on mean (û − u*)².

    Ten unknowns: g, m, l; q = sigmoid(q̂), 4; p = √q·p̂ on the three state entries (the control's is zero, as in the true
    cost). Solved by box-constrained DDP; differentiated by the implicit function theorem on the free set, including
    second-order terms of the dynamics (theirs drops them, which biases the gradient).

    A training solve starts from the last solution of the same example. Theirs resets it every 50 epochs, ours never; both
    solve to convergence. At inference, the solve starts from zero torque.
    """

    name = "mpc"
    Config = MPCConfig
    NORMALIZES = "nothing"

    def __init__(self, config: MPCConfig, spec: TaskSpec):
        super().__init__(config, spec)
        self.settings = config
        if (spec.obs_dim, spec.action_dim) != (3, 1):
            raise ShapeError(
                f"mpc supports the pendulum only (S = 3, A = 1); this task has S = {spec.obs_dim}, A = {spec.action_dim}. "
                "Fix: use difftori-il, which learns its model"
            )
        first = torch.tensor(config.init_parameters)
        spread = torch.tensor(config.init_spread)
        self.physics = nn.Parameter(first + spread * (2 * torch.rand(3) - 1))
        self.cost_logits = nn.Parameter(torch.zeros(4), requires_grad=config.learn_cost)
        self.cost_linear = nn.Parameter(torch.zeros(3), requires_grad=config.learn_cost)
        self._last = torch.empty(0, spec.horizon, 1)

    def get_extra_state(self) -> Tensor:
        """Return the last solution of each training example (N H 1), the start of its next solve; NaN if there is none."""
        return self._last

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the last solutions, for an exact resume."""
        self._last = state

    def trainable(self, epoch: int) -> Iterable[Tensor]:
        """Return the parameters trained in this epoch: dynamics or cost in turns, or both."""
        dynamics, cost = [self.physics], [self.cost_logits, self.cost_linear]
        if not self.settings.learn_cost:
            return dynamics
        if self.settings.alternate_every == 0:
            return dynamics + cost
        return cost if (epoch // self.settings.alternate_every) % 2 else dynamics

    def objective(self, obs: States) -> PendulumObjective:
        """Return the learned problem from the given states (B 3)."""
        # An optimizer step must not move a mass or a length to zero or below, where the model is undefined.
        g, (m, l) = self.physics[0].to(obs), self.physics[1:].to(obs).clamp_min(0.05)
        quadratic, linear = obs.new_tensor(QUADRATIC), obs.new_tensor(LINEAR)
        if self.settings.learn_cost:
            quadratic = torch.sigmoid(self.cost_logits.to(obs))
            linear = torch.cat((quadratic[:3].sqrt() * self.cost_linear.to(obs), quadratic.new_zeros(1)))
        return PendulumObjective(PendulumParameters(g, m, l), quadratic, linear, obs, self.spec.horizon)

    def predict(self, obs: States, start: Plans, adjoint: Adjoint) -> Plans:
        """Solve in float64 from the initial guess `start` and return the controls (B H 1). `adjoint` determines the gradient."""
        box = Box(self.spec.low[0], self.spec.high[0])
        planner = Planner(ILQR(second_order=True), adjoint, box, self.settings.max_steps, tolerance=1e-4)
        return planner.plan(self.objective(obs.double()), start.double()).actions.to(obs.dtype)

    def loss(self, batch: Window, *, generator: torch.Generator) -> tuple[Scalar, Scalars]:
        """Return the mean squared control error, differentiated through the controller."""
        controls = self.predict(flat_rows(batch.obs), self._warm_start(batch), Implicit())
        self._last[batch.index.cpu()] = controls.detach().cpu()
        loss = F.mse_loss(controls, batch.actions)
        g, m, l = self.physics.detach().clone()
        return loss, {"control_mse": loss, "g": g, "m": m, "l": l}

    def _warm_start(self, batch: Window) -> Plans:
        """Return the last solution of each example; the demonstrated controls if there is none yet."""
        missing = int(batch.index.max()) + 1 - len(self._last)
        if missing > 0:
            self._last = torch.cat((self._last, torch.full((missing, *self._last.shape[1:]), torch.nan)))
        last = self._last[batch.index.cpu()].to(batch.actions)
        return torch.where(torch.isnan(last), batch.actions, last)

    @torch.no_grad()
    def act(self, obs: WindowObs, *, generator: torch.Generator) -> Plans:
        """Return the controls (B H 1). Deterministic; `generator` is not used."""
        states = flat_rows(obs)
        return self.predict(states, states.new_zeros(len(states), self.spec.horizon, 1), Detached())
