"""Linear dynamics and quadratic cost: `difftori.plan` against the Riccati recursion, actions and gradients."""

import math

import torch

import difftori
from difftori.solver import ILQR, Implicit, ProjectedGradient

F64 = torch.float64
H, dt = 20, 0.1
A = torch.tensor([[1.0, dt], [0.0, 1.0]], dtype=F64)
B = torch.tensor([[0.0], [dt]], dtype=F64, requires_grad=True)  # differentiate with respect to the input gain
Q, R = torch.diag(torch.tensor([1.0, 0.1], dtype=F64)), 0.01
state = torch.tensor([[1.0, 0.0], [-0.5, 1.0]], dtype=F64)


def dynamics(s, u):
    return s @ A.T + u @ B.T


def reward(s, u):
    return -0.5 * ((s @ Q) * s).sum(-1) - 0.5 * R * u.square().sum(-1)


def final_value(s):
    return -0.5 * ((s @ (10 * Q)) * s).sum(-1)


def riccati():
    """The textbook solution: gains backwards, controls forwards."""
    P, gains = 10 * Q, []
    for _ in range(H):
        K = torch.linalg.solve(R * torch.eye(1, dtype=F64) + B.T @ P @ B, B.T @ P @ A)
        P = Q + A.T @ P @ (A - B @ K)
        gains.insert(0, K)
    s, controls = state, []
    for K in gains:
        controls.append(-s @ K.T)
        s = dynamics(s, controls[-1])
    return torch.stack(controls, 1)


exact = riccati()
(expected,) = torch.autograd.grad(exact.square().sum(), B)
guess = torch.zeros(2, H, 1, dtype=F64)
for solver in (ILQR(), ProjectedGradient(window=5, polish=1)):
    plan = difftori.plan(
        dynamics, reward, final_value, state, guess, low=-100.0, high=100.0, solver=solver, adjoint=Implicit()
    )
    (found,) = torch.autograd.grad(plan.actions.square().sum(), B)
    print(
        f"{type(solver).__name__:18s} steps {plan.solution.steps.tolist()}"
        f"  controls differ by {(plan.actions - exact).abs().max().item():.0e}"
        f"  gradient by {((found - expected).norm() / expected.norm()).item():.0e} of its size"
    )

plan = difftori.plan(dynamics, reward, final_value, state, guess, low=-5.0, high=5.0)
print("with |u| <= 5, the first controls:", [round(u, 3) for u in plan.actions[0, :5, 0].tolist()])

# An unstable scalar system s' = 1.5 s + u over 200 steps: without feedback, rounding would grow by 1.5**200 = 2e35.
a = torch.tensor(1.5, dtype=F64, requires_grad=True)
p = torch.ones((), dtype=F64)
for _ in range(200):
    gain = p * a / (1 + p)
    p = 1 + a * p * a - a * p * gain
(expected,) = torch.autograd.grad(-gain, a)  # of the first action from s = 1
plan = difftori.plan(
    lambda s, u: a * s + u,
    lambda s, u: -s[..., 0].square() - u[..., 0].square(),
    lambda s: -s[..., 0].square(),
    torch.ones(1, 1, dtype=F64),
    torch.zeros(1, 200, 1, dtype=F64),
    low=-math.inf,
    high=math.inf,
)
(found,) = torch.autograd.grad(plan.actions[0, 0, 0], a)
print(f"unstable, 200 steps: first action differs by {(plan.actions[0, 0, 0] + gain).abs().item():.0e}", end="")
print(f"  gradient by {((found - expected) / expected).abs().item():.0e} of its size")
