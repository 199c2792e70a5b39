"""Recover the pole's mass and length from an expert's states and forces, by Gauss-Newton through the controller."""

import math

import torch
from cartpole import cartpole, reward, terminal_value

import difftori

F64, H, STEPS = torch.float64, 50, 80

# The expert: the same controller with the true parameters, a tight tolerance and little noise. Two systems at once.
starts = torch.tensor([[0.3, 0.1, 0.0, 0.0], [0.0, math.pi, 0.0, 0.0]], dtype=F64)
expert = difftori.Controller(
    cartpole(0.1, 0.5),
    reward,
    terminal_value,
    horizon=H,
    action_dim=1,
    low=-10.0,
    high=10.0,
    init_actions=0.01,
    max_steps=50,
    tolerance=1e-7,
)
noise, scale = torch.Generator().manual_seed(1), 0.003 * torch.tensor([0.1, 1.0, 0.1, 1.0], dtype=F64)
state, states, forces = starts, [], []
for _ in range(STEPS):
    states.append(state)
    forces.append(expert(state))
    state = cartpole(0.1, 0.5)(state, forces[-1]) + scale * torch.randn(2, 4, generator=noise, dtype=F64)
states, forces = torch.stack(states, 1), torch.stack(forces, 1)  # (2, STEPS, 4), (2, STEPS, 1)


def fit(states, forces, mass, half_length):
    rows = range(0, STEPS - H, 2)
    start, force = states[: STEPS - H : 2], forces[: STEPS - H : 2, 0]
    future = torch.stack([forces[i : i + H] for i in rows])  # what the expert did next: the warm start of each row
    logs = torch.tensor([mass, half_length], dtype=F64).log().requires_grad_()
    for iteration in range(6):
        plan = difftori.plan(
            cartpole(*logs.exp()), reward, terminal_value, start, future, -10.0, 10.0, max_steps=20, tolerance=1e-7
        )
        error = plan.actions[:, 0, 0] - force  # the first force alone: later ones are replaced by new plans
        away = (plan.actions.detach() - future).abs().mean((1, 2))  # large where the plan is another local optimum
        used = plan.solution.gradient_valid
        used = (used & (away <= 3 * away[used].median())).nonzero().squeeze(1)
        (J,) = torch.autograd.grad(error[used], logs, torch.eye(len(used), dtype=F64), is_grads_batched=True)
        residual = error[used].detach()
        weight = (
            1 / (1 + (residual / (2 * residual.abs().median() + 1e-9)).square()).sqrt()
        )  # Cauchy: outliers count less
        move = torch.linalg.lstsq(weight[:, None] * J, weight * residual).solution.clamp(-0.25, 0.25)
        mass, half_length = logs.exp().tolist()
        median = residual.abs().median()
        print(
            f"{iteration}  mass {mass:.5f} kg  half-length {half_length:.5f} m  median error {median:.1e} N  rows {len(used)} of {len(rows)}"
        )
        if move.abs().max() < 1e-4:
            break
        logs = (logs.detach() - move).requires_grad_()


print("near upright")
fit(states[0], forces[0], 0.13, 0.4)
print("swing-up")
fit(states[1], forces[1], 0.13, 0.4)
