"""Learn a pendulum's gravity and mass from an expert's torques alone, through the controller."""

import numpy as np
import torch

import difftori
from difftori.envs.pendulum import PendulumParameters, pendulum_step, sample_starts
from difftori.solver import ILQR

H = 20
starts = sample_starts(8, np.random.default_rng(0), dtype=torch.float64)
guess = torch.zeros(8, H, 1, dtype=torch.float64)


def reward(s, u):  # upright and at rest, with little torque
    return s[..., 0] - 0.05 * s[..., 2].square() - 0.0005 * u[..., 0].square()


def controller(parameters, init, tolerance=1e-6):
    def dynamics(s, u):
        return pendulum_step(s, u, parameters, torque_limit=float("inf"))

    solver = ILQR(second_order=True)
    return difftori.plan(
        dynamics, reward, None, starts, init, low=-2.0, high=2.0, solver=solver, max_steps=50, tolerance=tolerance
    )


with torch.no_grad():
    expert = controller(PendulumParameters(g=10.0, m=1.0, l=1.0), guess).actions

# The torques depend on g/l and m*l**2 only, so the length is taken as measured, and g and m are learnt.
physics = torch.tensor([13.0, 1.5], dtype=torch.float64, requires_grad=True)

# The gradient through the controller, against central differences of the controller itself.
loss = (controller(PendulumParameters(*physics), guess, 1e-9).actions - expert).square().mean()
(gradient,) = torch.autograd.grad(loss, physics)
numeric = []
with torch.no_grad():
    for step in torch.eye(2, dtype=torch.float64) * 1e-3:
        ends = [controller(PendulumParameters(*(physics + sign * step)), guess, 1e-9).actions for sign in (1.0, -1.0)]
        above, below = ((actions - expert).square().mean() for actions in ends)
        numeric.append(((above - below) / 2e-3).item())
print("d(loss)/d(g, m)", [round(v, 5) for v in gradient.tolist()], "differences", [round(v, 5) for v in numeric])

optimizer = torch.optim.LBFGS([physics], lr=1.0, max_iter=4, line_search_fn="strong_wolfe")
start = guess


def imitate():
    global start
    plan = controller(PendulumParameters(g=physics[0], m=physics[1]), start)
    start = plan.actions.detach()  # the next solve begins where this one ended
    loss = (plan.actions - expert).square().mean()
    optimizer.zero_grad()
    loss.backward()
    return loss


for turn in range(6):
    loss = optimizer.step(imitate)
    print(f"turn {turn}  loss before {loss.item():.1e}  then g {physics[0].item():.4f}  m {physics[1].item():.4f}")
