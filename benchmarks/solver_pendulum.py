"""Swing-up of a pendulum with known dynamics: the problem in the documentation of mpc.pytorch."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks.solver_problems import Problem
from difftori.solver import Box, TrajectoryObjective
from difftori.types import Actions, Points, Rows, States

TORQUE = 2.0
TIME_STEP = 0.05
GOAL = (1.0, 0.0, 0.0)
GOAL_WEIGHTS = (1.0, 1.0, 0.1)
TORQUE_WEIGHT = 0.001


def pendulum_next(state: States, action: Actions, parameters: Float[Tensor, "B 3"]) -> States:
    """One Euler step of (cos θ, sin θ, θ̇) under a torque, with gravity, mass and length per row in `parameters`.

    θ̇' = θ̇ + dt (3g/(2l) sin θ + 3u/(m l²)),  θ' = θ + dt θ̇';  dt = 0.05 s.
    """
    gravity, mass, length = parameters.unbind(-1)
    cos, sin, speed = state.unbind(-1)
    push = 1.5 * gravity / length * sin + 3.0 * action[..., 0] / (mass * length**2)
    speed = speed + TIME_STEP * push
    angle = torch.atan2(sin, cos) + TIME_STEP * speed
    return torch.stack([angle.cos(), angle.sin(), speed], -1)


@dataclass(frozen=True)
class PendulumProblem(TrajectoryObjective, Problem):
    """B swing-ups of H steps over torques in [−2, 2]: Σ_t ½ Σ_i w_i s_i² − Σ_i √w_i goal_i s_i + ½·0.001 u².

    `state` (B 3): the starts. `parameters` (B 3): gravity, mass and length of each row. `x0` (B H): the initial torques.
    """

    state: States
    parameters: Float[Tensor, "B 3"]
    x0: Points
    horizon: int
    action_dim: int = 1
    discount: float = 1.0

    def next(self, state: States, action: Actions, t: Tensor) -> States:
        """The next state of the pendulum."""
        return pendulum_next(state, action, self.parameters)

    def stage_cost(self, state: States, action: Actions, t: Tensor) -> Rows:
        """The quadratic cost of one step."""
        weights, linear = state.new_tensor(GOAL_WEIGHTS), state.new_tensor(_linear())
        return (0.5 * weights * state.square() + linear * state).sum(-1) + 0.5 * TORQUE_WEIGHT * action.square().sum(-1)

    def terminal_cost(self, state: States) -> Rows:
        """Zero: as in mpc.pytorch, the sum ends with the state before the last torque acts."""
        return torch.zeros_like(state[..., 0])

    def select(self, rows: Tensor) -> "PendulumProblem":
        """Some of the rows."""
        return replace(self, state=self.state[rows], parameters=self.parameters[rows], x0=self.x0[rows])

    @property
    def context(self) -> Float[Tensor, "B 3"]:
        """The tensor to differentiate solutions with respect to, row by row: (g, m, l)."""
        return self.parameters

    def at(self, context: Float[Tensor, "B 3"]) -> "PendulumProblem":
        """The same starts with other pendulums."""
        return replace(self, parameters=context)

    @property
    def box(self) -> Box:
        """The torque limits."""
        return Box(-TORQUE, TORQUE)

    def weights(self) -> list[nn.Parameter]:
        """Empty: there are no parameters besides the context."""
        return []


def _linear() -> tuple[float, ...]:
    return tuple(-math.sqrt(weight) * goal for weight, goal in zip(GOAL_WEIGHTS, GOAL, strict=True))


def quadratic_cost(like: Tensor) -> tuple[Float[Tensor, "4 4"], Float[Tensor, "4"]]:
    """The same stage cost as ½τᵀCτ + cᵀτ over τ = (state, torque)."""
    diagonal = like.new_tensor([*GOAL_WEIGHTS, TORQUE_WEIGHT])
    return torch.diag(diagonal), like.new_tensor([*_linear(), 0.0])


def pendulum_problem(
    batch: int, dtype: torch.dtype = torch.float32, seed: int = 0, *, horizon: int = 20, spread: float = math.pi
) -> PendulumProblem:
    """B starts with angles within ±`spread` rad of upright and speeds within ±1 rad/s; g, m, l = 10, 1, 1 in each row.

    Over the whole circle the second derivatives of the dynamics matter, and on many rows every torque ends at its limit,
    where a solution has no derivative to compare. Near upright (±.4) the problem is nearly linear.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = 2 * torch.rand(batch, 2, generator=generator, dtype=torch.float64) - 1
    angle, speed = spread * uniform[:, 0], uniform[:, 1]
    state = torch.stack([angle.cos(), angle.sin(), speed], -1).to(dtype)
    parameters = torch.tensor([10.0, 1.0, 1.0], dtype=dtype).repeat(batch, 1)
    return PendulumProblem(state=state, parameters=parameters, x0=state.new_zeros(batch, horizon), horizon=horizon)
