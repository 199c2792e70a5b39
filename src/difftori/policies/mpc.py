"""Differentiable MPC with known structure: the pendulum's optimal controller, as expert and as Amos et al.'s learner.

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
from difftori.types import Actions, Metrics, Plans, Rows, Scalar, States, TaskSpec, Window, WindowObs, flat_rows


@final
class PendulumObjective(TrajectoryObjective):
    """Σ_{t<H} ½ τᵀdiag(q)τ + pᵀτ with τ = (cos θ, sin θ, θ̇, u), under the given parameters; no terminal cost.

    `state` (B 3). `quadratic` q and `linear` p have 4 entries, as numbers or as tensors to learn.
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
        """One step of the pendulum. The box keeps the torque within its limit, so nothing is clamped here."""
        return pendulum_step(state, action, self.parameters, dt=DT, torque_limit=float("inf"))

    def stage_cost(self, state: States, action: Actions, t: Tensor) -> Rows:
        """½ τᵀdiag(q)τ + pᵀτ."""
        pair = torch.cat((state, action), -1)
        return (0.5 * self.quadratic * pair.square() + self.linear * pair).sum(-1)

    def terminal_cost(self, state: States) -> Rows:
        """Zero: the last control moves no state that counts."""
        return torch.zeros_like(state[..., 0])

    def select(self, rows: Tensor) -> "PendulumObjective":
        """The same problem from some of the starts."""
        return PendulumObjective(self.parameters, self.quadratic, self.linear, self.state[rows], self.horizon)


def expert(problem: Pendulum, starts: States, *, max_steps: int = 100) -> Plans:
    """The optimal torques (B H 1) under the true model and cost, from each start (B 3): box-DDP from zero torque.

    Solved in float64 to a tolerance of 1e-6; returned in the dtype of `starts`.
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
    """Settings of `PendulumMPC`. The defaults are Amos et al.'s where they say: RMSprop, learning rate, alternation."""

    optimizer: Literal["adam", "adamw", "rmsprop"] = "rmsprop"
    lr: float = Field(1e-2, gt=0, allow_inf_nan=False)
    rmsprop_alpha: float = Field(0.5, ge=0, lt=1)
    epochs: int = Field(300, ge=1)
    clip_norm: float = Field(0.0, ge=0, allow_inf_nan=False)
    learn_cost: bool = True
    """Learn q and p beside g, m and l; otherwise the true cost is given."""
    init_parameters: tuple[float, float, float] = (15.0, 3.0, 0.5)
    """First g, m and l."""
    init_spread: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Each starts uniformly within this distance of its first value, by the run's seed."""
    alternate_every: int = Field(10, ge=0)
    """Epochs of dynamics, then as many of cost, and so on; 0 trains both at once."""
    max_steps: int = Field(60, ge=1)
    """DDP steps at most."""


@final
class PendulumMPC(Policy):
    """û(s; θ) = argmin_u Σ_t ½ τᵀdiag(q)τ + pᵀτ under the pendulum with (g, m, l), trained on mean (û − u*)².

    Ten unknowns: g, m, l; q = sigmoid(q̂), 4; p = √q·p̂ on the three state entries (the control's is zero, as in the true
    cost). Solved by box-constrained DDP; differentiated by the implicit function theorem on the free
    set, second-order terms of the dynamics included (theirs drops them, which biases the gradient).

    A training solve starts from the same example's last solution (theirs forgets it every 50 epochs, ours never: the
    solve runs to convergence either way); a solve at test time starts from zero torque.
    """

    name = "mpc"
    Config = MPCConfig
    NORMALIZES = "nothing"

    def __init__(self, config: MPCConfig, spec: TaskSpec):
        super().__init__(config, spec)
        self.settings = config
        if (spec.obs_dim, spec.action_dim) != (3, 1):
            raise ShapeError(
                f"mpc knows the structure of the pendulum only (S = 3, A = 1); this task has S = {spec.obs_dim}, "
                f"A = {spec.action_dim}: use difftori, which learns its model"
            )
        first = torch.tensor(config.init_parameters)
        spread = torch.tensor(config.init_spread)
        self.physics = nn.Parameter(first + spread * (2 * torch.rand(3) - 1))
        self.cost_logits = nn.Parameter(torch.zeros(4), requires_grad=config.learn_cost)
        self.cost_linear = nn.Parameter(torch.zeros(3), requires_grad=config.learn_cost)
        self._last = torch.empty(0, spec.horizon, 1)

    def get_extra_state(self) -> Tensor:
        """The last solution of each training example (N H 1), NaN where there is none: the next solve's start."""
        return self._last

    def set_extra_state(self, state: Tensor) -> None:
        """Put them back, for an exact resume."""
        self._last = state

    def trainable(self, epoch: int) -> Iterable[Tensor]:
        """Dynamics and cost in turns, or both at once."""
        dynamics, cost = [self.physics], [self.cost_logits, self.cost_linear]
        if not self.settings.learn_cost:
            return dynamics
        if self.settings.alternate_every == 0:
            return dynamics + cost
        return cost if (epoch // self.settings.alternate_every) % 2 else dynamics

    def objective(self, obs: States) -> PendulumObjective:
        """The learned problem from the given states (B 3)."""
        # A step of the optimiser must not carry a mass or a length through zero, where the model ends.
        g, (m, l) = self.physics[0].to(obs), self.physics[1:].to(obs).clamp_min(0.05)
        quadratic, linear = obs.new_tensor(QUADRATIC), obs.new_tensor(LINEAR)
        if self.settings.learn_cost:
            quadratic = torch.sigmoid(self.cost_logits.to(obs))
            linear = torch.cat((quadratic[:3].sqrt() * self.cost_linear.to(obs), quadratic.new_zeros(1)))
        return PendulumObjective(PendulumParameters(g, m, l), quadratic, linear, obs, self.spec.horizon)

    def predict(self, obs: States, start: Plans, adjoint: Adjoint) -> Plans:
        """The controls (B H 1) from a first guess, differentiable as the adjoint says. Solved in float64."""
        box = Box(self.spec.low[0], self.spec.high[0])
        planner = Planner(ILQR(second_order=True), adjoint, box, self.settings.max_steps, tolerance=1e-4)
        return planner.plan(self.objective(obs.double()), start.double()).actions.to(obs.dtype)

    def loss(self, batch: Window, *, generator: torch.Generator) -> tuple[Scalar, Metrics]:
        """Mean squared control error, differentiated through the controller."""
        controls = self.predict(flat_rows(batch.obs), self._warm_start(batch), Implicit())
        self._last[batch.index.cpu()] = controls.detach().cpu()
        loss = F.mse_loss(controls, batch.actions)
        g, m, l = self.physics.tolist()
        return loss, {"control_mse": loss.item(), "g": g, "m": m, "l": l}

    def _warm_start(self, batch: Window) -> Plans:
        """The last solution for each example; the demonstrated controls where there is none yet."""
        missing = int(batch.index.max()) + 1 - len(self._last)
        if missing > 0:
            self._last = torch.cat((self._last, torch.full((missing, *self._last.shape[1:]), torch.nan)))
        last = self._last[batch.index.cpu()].to(batch.actions)
        return torch.where(torch.isnan(last), batch.actions, last)

    @torch.no_grad()
    def act(self, obs: WindowObs, *, generator: torch.Generator) -> Plans:
        """The controls (B H 1); deterministic."""
        states = flat_rows(obs)
        return self.predict(states, states.new_zeros(len(states), self.spec.horizon, 1), Detached())
