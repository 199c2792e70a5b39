"""The problems of `difftori bench control` in torch: a cart-pole, a unicycle among obstacles, and a quadrotor.

Each maximises Σ_{t<H} reward(s_t, a_t) + terminal_value(s_H) over actions within bounds, with constraint(s, a) ≤ 0.
`control_casadi` has the same equations in CasADi symbols; a test compares the two.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from difftori.types import AnyPlans, AnyValues, Plans, Rows, States

GRAVITY = 9.81


@dataclass(frozen=True)
class Functions:
    """The functions to pass to `difftori.plan`, for one value of the parameters. All support any leading dimensions.

    `constraint` (state, action) → (… M) and `terminal_constraint` state → (… M) are satisfied if they are ≤ 0.
    """

    dynamics: Callable[[Tensor, Tensor], Tensor]
    reward: Callable[[Tensor, Tensor], Tensor]
    terminal_value: Callable[[Tensor], Tensor]
    constraint: Callable[[Tensor, Tensor], Tensor] | None = None
    terminal_constraint: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class ControlProblem:
    """One problem: sizes, bounds, start and functions.

    Plans are differentiated with respect to `parameters`; `functions` takes them as a tensor (Z). The first start is `start`;
    the others of a batch are normal around it with standard deviation `spread`. `noise`: the standard deviation of the noise
    added to the state after each step of the closed loop. `neutral`: the action whose distance from the plan is
    differentiated. `init`: the initial guess, (A) for all steps or (H A).
    """

    name: str
    horizon: int
    time_step: float
    low: tuple[float, ...]
    high: tuple[float, ...]
    start: tuple[float, ...]
    spread: tuple[float, ...]
    noise: tuple[float, ...]
    neutral: tuple[float, ...]
    init: Callable[[int], Float[Tensor, "H A"]]
    parameter_names: tuple[str, ...]
    parameter_values: tuple[float, ...]
    functions: Callable[[Tensor], Functions]

    @property
    def state_dim(self) -> int:
        """Dimension of the state."""
        return len(self.start)

    @property
    def action_dim(self) -> int:
        """Dimension of the action."""
        return len(self.low)

    @property
    def parameters(self) -> Float[Tensor, "Z"]:
        """The parameters, float64."""
        return torch.tensor(self.parameter_values, dtype=torch.float64)

    def starts(self, batch: int, seed: int = 0) -> States:
        """B initial states, float64. A smaller batch is the beginning of a larger one."""
        rows = [torch.tensor(self.start, dtype=torch.float64)]
        generator = torch.Generator().manual_seed(seed)
        for _ in range(batch - 1):
            noise = torch.randn(self.state_dim, generator=generator, dtype=torch.float64)
            rows.append(rows[0] + noise * rows[0].new_tensor(self.spread))
        return torch.stack(rows)

    def init_actions(self, batch: int) -> Plans:
        """The initial guess for every row, (B H A), float64."""
        return self.init(self.horizon).repeat(batch, 1, 1)

    def loss(self, actions: AnyPlans) -> AnyValues:
        """The function that is differentiated with respect to the parameters: Σ_t ‖a_t − neutral‖² of each row."""
        return (actions - actions.new_tensor(self.neutral)).square().sum((-1, -2))

    def shortened(self, horizon: int) -> "ControlProblem":
        """The same problem with fewer steps."""
        return replace(self, horizon=horizon)

    def rollout(self, state: States, actions: Plans) -> tuple[Rows, Rows, Float[Tensor, "B H S"]]:
        """The cost of the actions, the largest violation of the constraints and bounds, and states 1 … H; float64."""
        f = self.functions(self.parameters)
        state, actions = state.double().cpu(), actions.detach().double().cpu()
        low, high = actions.new_tensor(self.low), actions.new_tensor(self.high)
        violation = torch.maximum(low - actions, actions - high).amax((-1, -2)).clamp_min(0.0)
        cost, states = torch.zeros_like(violation), []
        for t, action in enumerate(actions.unbind(1)):
            cost = cost - f.reward(state, action)
            if t > 0 and f.constraint is not None:  # the actions cannot change the first state
                violation = torch.maximum(violation, f.constraint(state, action).amax(-1))
            state = f.dynamics(state, action)
            states.append(state)
        if f.terminal_constraint is not None:
            violation = torch.maximum(violation, f.terminal_constraint(state).amax(-1))
        return cost - f.terminal_value(state), violation, torch.stack(states, 1)


def runge_kutta(derivative: Callable[[Tensor, Tensor], Tensor], time_step: float) -> Callable[[Tensor, Tensor], Tensor]:
    """One step of the classical fourth-order method with a constant action."""

    def step(state: Tensor, action: Tensor) -> Tensor:
        k1 = derivative(state, action)
        k2 = derivative(state + 0.5 * time_step * k1, action)
        k3 = derivative(state + 0.5 * time_step * k2, action)
        k4 = derivative(state + time_step * k3, action)
        return state + time_step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    return step


def _cartpole(parameters: Tensor) -> Functions:
    """State (position m, angle from upright rad, and their rates), force N. Barto, Sutton and Anderson (1983)."""
    pole_mass, half_length = (p.clone() for p in parameters.unbind())
    total = 1.0 + pole_mass

    def derivative(s: Tensor, a: Tensor) -> Tensor:
        sin, cos, force = s[..., 1].sin(), s[..., 1].cos(), a[..., 0]
        q = (force + pole_mass * half_length * s[..., 3] * s[..., 3] * sin) / total
        turning = (GRAVITY * sin - cos * q) / (half_length * (4 / 3 - pole_mass * cos * cos / total))
        return torch.stack([s[..., 2], s[..., 3], q - pole_mass * half_length * turning * cos / total, turning], -1)

    def reward(s: Tensor, a: Tensor) -> Tensor:
        moving = 0.01 * s[..., 2] ** 2 + 0.01 * s[..., 3] ** 2
        return -(0.1 * s[..., 0] ** 2 + 1 - s[..., 1].cos() + moving + 0.001 * a[..., 0] ** 2)

    def terminal_value(s: Tensor) -> Tensor:
        return -(10 * s[..., 0] ** 2 + 100 * (1 - s[..., 1].cos()) + 10 * s[..., 2] ** 2 + 10 * s[..., 3] ** 2)

    return Functions(runge_kutta(derivative, 0.05), reward, terminal_value)


CARTPOLE = ControlProblem(
    name="cartpole",
    horizon=50,
    time_step=0.05,
    low=(-10.0,),
    high=(10.0,),
    start=(0.0, 3.14159, 0.0, 0.0),
    spread=(0.02, 0.05, 0.02, 0.05),
    noise=(0.001, 0.01, 0.001, 0.01),
    neutral=(0.0,),
    init=lambda horizon: torch.full((horizon, 1), 0.01, dtype=torch.float64),
    parameter_names=("pole mass", "half length"),
    parameter_values=(0.1, 0.5),
    functions=_cartpole,
)

OBSTACLES = ((1.5, 0.3, 0.6), (3.0, -0.5, 0.6), (4.4, 0.4, 0.5))
"""Centre x, y and radius of each obstacle, m."""


def _unicycle(parameters: Tensor) -> Functions:
    """State (x m, y m, heading rad, speed m/s), action (acceleration m/s², turn rate rad/s).

    Parameters: the radius of the second obstacle, and x and y of the goal.
    """
    radius, goal_x, goal_y = (p.clone() for p in parameters.unbind())

    def derivative(s: Tensor, a: Tensor) -> Tensor:
        heading, speed = s[..., 2], s[..., 3]
        return torch.stack([speed * heading.cos(), speed * heading.sin(), a[..., 1], a[..., 0]], -1)

    def distance(s: Tensor) -> Tensor:
        return (s[..., 0] - goal_x) ** 2 + (s[..., 1] - goal_y) ** 2

    def reward(s: Tensor, a: Tensor) -> Tensor:
        return -(0.1 * distance(s) + 0.01 * s[..., 3] ** 2 + 0.05 * a[..., 0] ** 2 + 0.05 * a[..., 1] ** 2)

    def terminal_value(s: Tensor) -> Tensor:
        return -(10 * distance(s) + 1.0 * s[..., 3] ** 2 + 0.1 * s[..., 2] ** 2)

    def inside(s: Tensor) -> Tensor:
        radii = [OBSTACLES[0][2], radius, OBSTACLES[2][2]]
        return torch.stack(
            [r**2 - (s[..., 0] - x) ** 2 - (s[..., 1] - y) ** 2 for (x, y, _), r in zip(OBSTACLES, radii, strict=True)],
            -1,
        )

    return Functions(runge_kutta(derivative, 0.2), reward, terminal_value, lambda s, a: inside(s), inside)


def _gentle_curve(horizon: int) -> Tensor:
    """An initial guess that speeds up, then turns slightly right, left and right, so that no solver starts on a line of symmetry."""
    acceleration, turn = torch.zeros(horizon, dtype=torch.float64), torch.zeros(horizon, dtype=torch.float64)
    acceleration[:5], turn[:5], turn[5:15], turn[15:25] = 1.0, -0.3, 0.3, -0.3
    return torch.stack([acceleration, turn], -1)


UNICYCLE = ControlProblem(
    name="unicycle",
    horizon=30,
    time_step=0.2,
    low=(-2.0, -2.0),
    high=(2.0, 2.0),
    start=(0.0, 0.0, 0.0, 0.0),
    spread=(0.05, 0.05, 0.05, 0.05),
    noise=(0.0, 0.0, 0.005, 0.01),
    neutral=(0.0, 0.0),
    init=_gentle_curve,
    parameter_names=("second radius", "goal x", "goal y"),
    parameter_values=(OBSTACLES[1][2], 5.5, 0.0),
    functions=_unicycle,
)

ARM, DRAG, HOVER = 0.17, 0.016, 0.5 * GRAVITY / 4
"""Quadrotor: distance from centre to rotor in m, yaw torque per thrust in m, and a rotor's thrust when hovering in N."""
INERTIA_Y, INERTIA_Z = 0.0023, 0.004
"""Moments of inertia of the quadrotor, kg m²."""


def _quadrotor(parameters: Tensor) -> Functions:
    """State (position, velocity, roll, pitch, yaw, body rates), action: thrusts of the four rotors in N (plus configuration).

    Parameters: the mass and the inertia about the body's x axis.
    """
    mass, inertia_x = (p.clone() for p in parameters.unbind())

    def derivative(s: Tensor, a: Tensor) -> Tensor:
        roll, pitch, yaw, p, q, r = (s[..., i] for i in range(6, 12))
        front, left, back, right = (a[..., i] for i in range(4))
        sin_roll, cos_roll, sin_yaw, cos_yaw = roll.sin(), roll.cos(), yaw.sin(), yaw.cos()
        sin_pitch, cos_pitch = pitch.sin(), pitch.cos()
        lift = (front + left + back + right) / mass
        mixed = sin_roll * q + cos_roll * r
        return torch.stack(
            [
                *(s[..., i] for i in range(3, 6)),
                lift * (cos_roll * sin_pitch * cos_yaw + sin_roll * sin_yaw),
                lift * (cos_roll * sin_pitch * sin_yaw - sin_roll * cos_yaw),
                lift * cos_roll * cos_pitch - GRAVITY,
                p + mixed * sin_pitch / cos_pitch,
                cos_roll * q - sin_roll * r,
                mixed / cos_pitch,
                (ARM * (left - right) + (INERTIA_Y - INERTIA_Z) * q * r) / inertia_x,
                (ARM * (back - front) + (INERTIA_Z - inertia_x) * p * r) / INERTIA_Y,
                (DRAG * (front - left + back - right) + (inertia_x - INERTIA_Y) * p * q) / INERTIA_Z,
            ],
            -1,
        )

    def weighted(s: Tensor, place: float, speed: float, angle: float, rate: float) -> Tensor:
        weights = [place] * 3 + [speed] * 3 + [angle] * 3 + [rate] * 3
        return (s.new_tensor(weights) * s * s).sum(-1)

    def reward(s: Tensor, a: Tensor) -> Tensor:
        return -(weighted(s, 1.0, 0.05, 0.2, 0.01) + 0.05 * ((a - HOVER) ** 2).sum(-1))

    def terminal_value(s: Tensor) -> Tensor:
        return -weighted(s, 50.0, 5.0, 10.0, 0.5)

    return Functions(runge_kutta(derivative, 0.05), reward, terminal_value)


QUADROTOR = ControlProblem(
    name="quadrotor",
    horizon=30,
    time_step=0.05,
    low=(0.2,) * 4,
    high=(2.4,) * 4,
    start=(1.0, -0.8, 0.5, 0.0, 0.0, 0.0, 0.5, -0.4, 0.3, 0.0, 0.0, 0.0),
    spread=(0.1,) * 3 + (0.1,) * 3 + (0.1,) * 3 + (0.1,) * 3,
    noise=(0.002,) * 3 + (0.02,) * 3 + (0.005,) * 3 + (0.05,) * 3,
    neutral=(HOVER,) * 4,
    init=lambda horizon: torch.full((horizon, 4), HOVER, dtype=torch.float64),
    parameter_names=("mass", "inertia x"),
    parameter_values=(0.5, 0.0023),
    functions=_quadrotor,
)

PROBLEMS = {problem.name: problem for problem in (CARTPOLE, UNICYCLE, QUADROTOR)}
