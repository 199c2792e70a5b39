"""A pendulum and a cart-pole with friction, and models of them that lack it."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from difftori.types import Actions, Rows, States

STEP = 0.05
"""Duration of a step in s."""
GRAVITY = 9.81
Dynamics = Callable[[States, Actions], States]


@dataclass(frozen=True)
class System:
    """A mechanical system: state (position, velocity) of size S, one force, unknown positive parameters (P), and friction.

    `acceleration(state (… S), force (…), parameters (… P), friction)` is (… S/2). `bound`: the largest force. Episodes begin at
    `start` ± `spread`, uniformly. `scale` (S): typical sizes of the state's components.
    """

    name: str
    parameters: dict[str, float]
    acceleration: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    reward: Callable[[States, Actions], Rows]
    terminal_value: Callable[[States], Rows]
    bound: float
    start: tuple[float, ...]
    spread: tuple[float, ...]
    scale: tuple[float, ...]

    @property
    def logs(self) -> Tensor:
        """The logarithms (P) of the true parameters."""
        return torch.tensor(list(self.parameters.values()), dtype=torch.float64).log()

    def dynamics(self, logs: Tensor, friction: float) -> Dynamics:
        """One step of semi-implicit Euler, for logarithms (P) or (B P) of the parameters."""
        half = len(self.start) // 2

        def step(state: States, action: Actions) -> States:
            position, velocity = state[..., :half], state[..., half:]
            velocity = velocity + STEP * self.acceleration(state, action[..., 0], logs.exp(), friction)
            return torch.cat((position + STEP * velocity, velocity), -1)

        return step

    def starts(self, count: int, generator: torch.Generator) -> States:
        """Sample `count` initial states."""
        unit = 2 * torch.rand(count, len(self.start), generator=generator, dtype=torch.float64) - 1
        return unit.new_tensor(self.start) + unit.new_tensor(self.spread) * unit

    def features(self, state: Tensor) -> Tensor:
        """The inputs (… S+1) of a critic: sine and cosine of the angle, and the state's other components in units of `scale`."""
        scaled = state / state.new_tensor(self.scale)
        angle = state[..., len(self.start) // 2 - 1, None]
        others = [index for index in range(len(self.start)) if index != len(self.start) // 2 - 1]
        return torch.cat((torch.sin(angle), torch.cos(angle), scaled[..., others]), -1)


def _pendulum_acceleration(state: Tensor, force: Tensor, parameters: Tensor, friction: float) -> Tensor:
    gravity, gain = parameters.unbind(-1)
    return (gravity * torch.sin(state[..., 0]) + gain * force - friction * state[..., 1])[..., None]


def _pendulum_reward(state: States, action: Actions) -> Rows:
    return -(1 - torch.cos(state[..., 0]) + 0.01 * state[..., 1] ** 2 + 0.03 * action[..., 0] ** 2)


def _pendulum_terminal(state: States) -> Rows:
    return -(10 * (1 - torch.cos(state[..., 0])) + 0.5 * state[..., 1] ** 2)


def _cartpole_acceleration(state: Tensor, force: Tensor, parameters: Tensor, friction: float) -> Tensor:
    """Barto et al. (1983), with friction of the cart (N s/m) and a hundredth of it in the pole's joint (N m s/rad)."""
    _, angle, speed, spin = state.unbind(-1)
    pole_mass, half_length, cart_mass = parameters.unbind(-1)
    sin, cos, total = torch.sin(angle), torch.cos(angle), cart_mass + pole_mass
    push = (force - friction * speed + pole_mass * half_length * spin**2 * sin) / total
    resistance = 0.01 * friction * spin / (pole_mass * half_length)
    turn = (GRAVITY * sin - cos * push - resistance) / (half_length * (4 / 3 - pole_mass * cos**2 / total))
    return torch.stack((push - pole_mass * half_length * turn * cos / total, turn), -1)


def _cartpole_reward(state: States, action: Actions) -> Rows:
    place, angle, speed, spin = state.unbind(-1)
    cost = 0.1 * place**2 + 1 - torch.cos(angle) + 0.01 * speed**2 + 0.01 * spin**2 + 0.01 * action[..., 0] ** 2
    return -cost


def _cartpole_terminal(state: States) -> Rows:
    place, angle, speed, spin = state.unbind(-1)
    return -(10 * place**2 + 100 * (1 - torch.cos(angle)) + 10 * speed**2 + 10 * spin**2)


SYSTEMS: dict[str, System] = {
    "pendulum": System(
        "pendulum",
        {"gravity over length (1/s²)": GRAVITY, "acceleration per torque": 2.0},
        _pendulum_acceleration,
        _pendulum_reward,
        _pendulum_terminal,
        bound=8.0,
        start=(math.pi, 0.0),
        spread=(0.5, 0.5),
        scale=(1.0, 5.0),
    ),
    "cartpole": System(
        "cartpole",
        {"pole mass (kg)": 0.1, "half length (m)": 0.5, "cart mass (kg)": 1.0},
        _cartpole_acceleration,
        _cartpole_reward,
        _cartpole_terminal,
        bound=30.0,
        start=(0.0, math.pi, 0.0, 0.0),
        spread=(0.3, 0.5, 0.3, 0.3),
        scale=(1.0, 1.0, 3.0, 5.0),
    ),
}
