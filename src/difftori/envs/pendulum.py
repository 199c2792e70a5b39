"""The pendulum of Amos et al. (2018), Differentiable MPC, arXiv 1810.13400: dynamics, cost, starts, environment.

A uniform rod of mass m and length l that turns about one end. State (cos θ, sin θ, θ̇) with θ = 0 upright, in radians and radians
per second; one torque u with |u| ≤ 2 N·m; dt = 0.05 s; d is the `damping`, b the `offset`.

    θ̇⁺ = θ̇ + dt·( 3g/(2l)·sin(θ + b) + 3u/(m l²) − d·θ )          θ⁺ = θ + dt·θ̇⁺

Their `damping` d multiplies the angle, not the angular velocity: it is a spring towards upright. It is the same here, for
comparability. θ is computed from the state by atan2, so it is in (−π, π]: the spring's torque is discontinuous where the
pendulum hangs straight down. The numbers equal `mpc.env_dx.pendulum` of mpc==0.0.6 (tested).
"""

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from jaxtyping import Float
from torch import Tensor

from difftori.envs.base import chosen_task, episode_metadata, numeric_faults, refuse_options
from difftori.envs.family import EnvFamily
from difftori.errors import ConfigError, ShapeError
from difftori.types import Plans, Rows, Scalar, TaskSpec

TASKS = ("undamped", "damped")
"""`undamped` is the realisable setting of Table 8 (`no-damping`), `damped` the other setting (`damping`)."""

DT = 0.05
"""Time step in s."""
TORQUE_LIMIT = 2.0
"""Largest torque in N·m."""
QUADRATIC = (1.0, 1.0, 0.1, 0.001)
"""Diagonal of the true cost's quadratic term over τ = (cos θ, sin θ, θ̇, u)."""
LINEAR = (-1.0, 0.0, 0.0, 0.0)
"""The true cost's linear term: −√q·goal with the goal upright and at rest."""

PendulumStates: TypeAlias = Float[Tensor, "B 3"]
PendulumTrajectories: TypeAlias = Float[Tensor, "B H 3"]
Torques: TypeAlias = Float[Tensor, "B 1"]
Parameter: TypeAlias = float | Scalar | Rows
Weights: TypeAlias = tuple[float, float, float, float] | Float[Tensor, "4"]


@dataclass(frozen=True)
class PendulumParameters:
    """Gravity `g` (m/s²), mass `m` (kg), length `l` (m), `damping` (1/s²), `offset` (rad).

    Each is a number, a tensor of one element, or one value per row (B). Gradients flow to tensors.
    """

    g: Parameter = 10.0
    m: Parameter = 1.0
    l: Parameter = 1.0
    damping: Parameter = 0.0
    offset: Parameter = 0.0


def pendulum_step(
    state: PendulumStates,
    action: Torques,
    parameters: PendulumParameters,
    *,
    dt: float = DT,
    torque_limit: float = TORQUE_LIMIT,
) -> PendulumStates:
    """Compute one step of semi-implicit Euler, the equation at the head of this file. Differentiable in all inputs.

    Shapes: `state` (B 3), `action` (B 1), result (B 3). The torque is first clamped to ±`torque_limit`, as in the
    original, so its gradient is zero outside. The result is on the unit circle even if `state` is not.
    """
    p = parameters
    torque = action[:, 0].clamp(-torque_limit, torque_limit)
    cos, sin, velocity = state.unbind(dim=1)
    angle = torch.atan2(sin, cos)
    acceleration = (
        3.0 * p.g / (2.0 * p.l) * torch.sin(angle + p.offset) + 3.0 * torque / (p.m * p.l**2) - p.damping * angle
    )
    velocity = velocity + dt * acceleration
    angle = angle + dt * velocity
    return torch.stack((angle.cos(), angle.sin(), velocity), dim=1)


def pendulum_cost(
    states: PendulumTrajectories, actions: Plans, *, quadratic: Weights = QUADRATIC, linear: Weights = LINEAR
) -> Rows:
    """Compute Σ_t ½ τ_tᵀ diag(q) τ_t + pᵀτ_t with τ_t = (states_t, actions_t), summed over the H steps: (B).

    `states` (B H 3) are those in which the `actions` (B H 1) are taken, the start first; `Pendulum.rollout` returns
    them. Default: the true cost; learned costs are tensors of 4 entries. The cost has no unit, because its terms differ.
    """
    if actions.shape[2] != 1:
        raise ShapeError(f"actions have {actions.shape[2]} dimensions. Fix: pass one torque per step, (B H 1)")
    pairs = torch.cat((states, actions), dim=2)
    q = torch.as_tensor(quadratic, dtype=pairs.dtype, device=pairs.device)
    p = torch.as_tensor(linear, dtype=pairs.dtype, device=pairs.device)
    return (0.5 * q * pairs.square() + p * pairs).sum(dim=(1, 2))


def sample_starts(count: int, generator: np.random.Generator, *, dtype: torch.dtype = torch.float32) -> PendulumStates:
    """Sample starts (count 3): θ uniform in ±π/2 rad, θ̇ uniform in ±1 rad/s, as in Amos et al."""
    angle = torch.as_tensor(generator.uniform(-np.pi / 2, np.pi / 2, count), dtype=dtype)
    velocity = torch.as_tensor(generator.uniform(-1.0, 1.0, count), dtype=dtype)
    return torch.stack((angle.cos(), angle.sin(), velocity), dim=1)


@dataclass(frozen=True)
class Pendulum:
    """The true problem of a setting: the cost of a plan that the environment executes.

    `horizon` H is the number of open-loop controls; default: 20, as in the paper, which is one second.
    """

    parameters: PendulumParameters = field(default_factory=PendulumParameters)
    horizon: int = 20
    dt: float = DT
    torque_limit: float = TORQUE_LIMIT

    @property
    def spec(self) -> TaskSpec:
        """Sizes and action bounds, for policies."""
        return TaskSpec.rows(
            obs_dim=3, action_dim=1, horizon=self.horizon, low=(-self.torque_limit,), high=(self.torque_limit,)
        )

    def step(self, state: PendulumStates, action: Torques) -> PendulumStates:
        """Compute `pendulum_step` with the true parameters."""
        return pendulum_step(state, action, self.parameters, dt=self.dt, torque_limit=self.torque_limit)

    def rollout(self, start: PendulumStates, actions: Plans) -> PendulumTrajectories:
        """Return the states (B H 3) in which the actions (B H 1) are taken: `start` first, without the state after the last.

        This pairs states and controls as in Amos et al. The last control therefore affects no state in the cost.
        """
        states = [start]
        for t in range(actions.shape[1] - 1):
            states.append(self.step(states[-1], actions[:, t]))
        return torch.stack(states, dim=1)

    def cost(self, start: PendulumStates, actions: Plans) -> Rows:
        """Return the summed true cost (B) of executing `actions` (B H 1) open loop, clamped to the torque limit."""
        executed = actions.clamp(-self.torque_limit, self.torque_limit)
        return pendulum_cost(self.rollout(start, executed), executed)


def pendulum(task: str) -> Pendulum:
    """Return the setting of a name in `TASKS`; "" is the undamped one. Raises `ConfigError` for other names."""
    if chosen_task(task, TASKS, env="pendulum") == "damped":
        return Pendulum(PendulumParameters(damping=1.0, offset=0.1))
    return Pendulum()


class PendulumEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """A pendulum whose reward is minus the true cost of the torque and the state in which it is applied.

    Observation: (cos θ, sin θ, θ̇) float32. Action: the torque (1). Episodes never terminate. They are truncated after
    `max_steps` steps; default: 200, which is 10 s.
    """

    def __init__(self, task: str, *, max_steps: int = 200):
        if faults := numeric_faults(max_steps=max_steps):
            raise ConfigError(faults)
        self.problem = pendulum(task)
        self.metadata = {
            **episode_metadata(f"pendulum:{task}", max_episode_steps=max_steps, action_repeat=1, fps=1 / DT),
            "render_modes": [],
        }
        largest = np.array([1.0, 1.0, np.inf], dtype=np.float32)  # cos θ, sin θ, θ̇
        limit = self.problem.torque_limit
        self.observation_space = Box(-largest, largest, dtype=np.float32)
        self.action_space = Box(-limit, limit, shape=(1,), dtype=np.float32)
        self._max_steps, self._steps = max_steps, 0
        self._state = torch.zeros(1, 3, dtype=torch.float64)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode at a start sampled by `sample_starts`. There are no options."""
        super().reset(seed=seed)
        refuse_options(options, env="pendulum")
        self._state = sample_starts(1, self.np_random, dtype=torch.float64)
        self._steps = 0
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take one step of `pendulum_step`. The reward is of the state before the step and the torque."""
        torque = torch.as_tensor(action, dtype=torch.float64)[None]
        reward = -float(pendulum_cost(self._state[:, None], torque[:, None]))
        self._state = self.problem.step(self._state, torque)
        self._steps += 1
        return self._observation(), reward, False, self._steps >= self._max_steps, {}

    def _observation(self) -> np.ndarray:
        return self._state[0].numpy().astype(np.float32)


FAMILY = EnvFamily(build=PendulumEnv, tasks=TASKS)
