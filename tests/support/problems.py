"""The problem table: objectives with leaves to differentiate with respect to, each with a box and a start."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from difftori.solver import Box, LeastSquaresObjective, Objective, TrajectoryObjective

B, N = 4, 5
F64 = torch.float64


@dataclass
class Case:
    objective: Objective
    leaves: list[Tensor]
    x0: Tensor
    box: Box


class Quadratic(Objective):
    """½xᵀPx + qᵀx, one P and q per row, condition number 20."""

    def __init__(self, P: Tensor, q: Tensor):
        self.P, self.q = P, q

    def cost(self, x):
        return 0.5 * (x * (self.P @ x.unsqueeze(-1)).squeeze(-1)).sum(-1) + (self.q * x).sum(-1)

    def select(self, rows):
        return Quadratic(self.P[rows], self.q[rows])


def quadratic(rows: int = B, n: int = N, scale: float = 2.0, seed: int = 0, dtype=F64) -> Case:
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(rows, n, n, generator=generator, dtype=dtype))
    spectrum = torch.logspace(0, math.log10(20), n, dtype=dtype) / 4
    P = (basis * spectrum) @ basis.transpose(-1, -2)
    q = scale * torch.randn(rows, n, generator=generator, dtype=dtype)
    leaves = [P.requires_grad_(), q.requires_grad_()]
    return Case(Quadratic(P, q), leaves, torch.zeros(rows, n, dtype=dtype), Box(-1.0, 1.0))


class Network(Objective):
    """A small network with LayerNorm in front of a quadratic: smooth, not convex, with parameters shared by all rows."""

    def __init__(self, net: nn.Module, context: Tensor):
        self.net, self.context = net, context

    def cost(self, x):
        return self.net(torch.cat([self.context, x], -1)).squeeze(-1) + 0.5 * x.square().sum(-1)

    def select(self, rows):
        return Network(self.net, self.context[rows])


def network(rows: int = B, n: int = N, seed: int = 0, dtype=F64) -> Case:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(3 + n, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 16), nn.ELU(), nn.Linear(16, 1)
    ).to(dtype)
    context = torch.randn(rows, 3, dtype=dtype, requires_grad=True)
    return Case(Network(net, context), [context, *net.parameters()], torch.zeros(rows, n, dtype=dtype), Box(-1.0, 1.0))


class Fit(LeastSquaresObjective):
    """Residuals tanh(Ax) − b and .3x: more residuals than variables."""

    def __init__(self, A: Tensor, b: Tensor):
        self.A, self.b = A, b

    def residual(self, x):
        return torch.cat([torch.tanh((self.A @ x.unsqueeze(-1)).squeeze(-1)) - self.b, 0.3 * x], -1)

    def select(self, rows):
        return Fit(self.A[rows], self.b[rows])


def fit(rows: int = B, n: int = N, seed: int = 0, dtype=F64) -> Case:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rows, 4, n, generator=generator, dtype=dtype).requires_grad_()
    b = (0.5 * torch.randn(rows, 4, generator=generator, dtype=dtype)).requires_grad_()
    return Case(Fit(A, b), [A, b], torch.zeros(rows, n, dtype=dtype), Box(-1.0, 1.0))


class LQR(TrajectoryObjective):
    """Linear dynamics, quadratic cost, no bounds: everything is known in closed form."""

    def __init__(self, A: Tensor, B: Tensor, R: Tensor, state: Tensor, horizon: int):
        self.A, self.B, self.R, self.state = A, B, R, state
        self.horizon, self.action_dim, self.discount = horizon, B.shape[1], 1.0

    def next(self, state, action, t=None):
        return state @ self.A.T + action @ self.B.T

    def stage_cost(self, state, action, t=None):
        return 0.5 * state.square().sum(-1) + 0.5 * (action @ self.R * action).sum(-1)

    def terminal_cost(self, state):
        return 0.5 * state.square().sum(-1)

    def riccati(self) -> Tensor:
        """The optimal controls (B H·A), by the Riccati recursion, differentiable in everything."""
        identity = torch.eye(self.A.shape[0], dtype=self.A.dtype)
        R = 0.5 * (self.R + self.R.T)  # the cost sees no more of R than this
        value, gains = identity, []
        for _ in range(self.horizon):
            gain = -torch.linalg.solve(R + self.B.T @ value @ self.B, self.B.T @ value @ self.A)
            value = identity + self.A.T @ value @ (self.A + self.B @ gain)
            gains.insert(0, gain)
        state, controls = self.state, []
        for gain in gains:
            controls.append(state @ gain.T)
            state = self.next(state, controls[-1])
        return torch.cat(controls, -1)


def lqr(rows: int = 3, horizon: int = 8) -> tuple[LQR, list[Tensor]]:
    torch.manual_seed(1)
    A = (torch.eye(4, dtype=F64) + 0.1 * torch.randn(4, 4, dtype=F64)).requires_grad_()
    B_ = torch.randn(4, 2, dtype=F64, requires_grad=True)
    R = (0.5 * torch.eye(2, dtype=F64)).requires_grad_()
    state = torch.randn(rows, 4, dtype=F64, requires_grad=True)
    return LQR(A, B_, R, state, horizon), [A, B_, R, state]


class Swing(TrajectoryObjective):
    """A pendulum to be swung by a bounded torque: nonlinear dynamics, so second-order terms matter."""

    def __init__(self, physics: Tensor, state: Tensor, horizon: int = 6):
        self.physics, self.state = physics, state
        self.horizon, self.action_dim, self.discount = horizon, 1, 0.95

    def next(self, state, action, t=None):
        g, damping = self.physics
        velocity = state[..., 1:] + 0.2 * (g * torch.sin(state[..., :1]) + 2 * action - damping * state[..., 1:])
        return torch.cat([state[..., :1] + 0.2 * velocity, velocity], -1)

    def stage_cost(self, state, action, t=None):
        return 1 - torch.cos(state[..., 0]) + 0.1 * state[..., 1].square() + 0.1 * action.square().sum(-1)

    def terminal_cost(self, state):
        return 2 * state[..., 0].square()

    def select(self, rows):
        return Swing(self.physics, self.state[rows], self.horizon)


def swing(rows: int = B, seed: int = 0, dtype=F64) -> Case:
    generator = torch.Generator().manual_seed(seed)
    physics = torch.tensor([2.0, 0.1], dtype=dtype, requires_grad=True)
    state = torch.randn(rows, 2, generator=generator, dtype=dtype).requires_grad_()
    return Case(Swing(physics, state), [physics, state], torch.zeros(rows, 6, dtype=dtype), Box(-1.0, 1.0))


CASES = {"quadratic": quadratic, "network": network, "fit": fit, "swing": swing}
