"""Plan the swing-up of a cart-pole over 2.5 s."""

import math

import control_figures
import torch
from cartpole import DT, HANGING, cartpole, reward, terminal_value

import difftori
from difftori.solver import Status

H = 50
init_actions = torch.full((1, H, 1), 0.01, dtype=torch.float64)
plan = difftori.plan(cartpole(), reward, terminal_value, HANGING, init_actions, low=-10.0, high=10.0)

print("status", Status(plan.solution.status.item()).name, " steps", plan.solution.steps.item())
print(f"cost   {plan.solution.cost.item():.4f}")
print("final state (x, angle, speed, angular speed)", [round(v, 3) for v in plan.states[0, -1].tolist()])

states, force = plan.states[0].detach(), plan.actions[0, :, 0].detach()
control_figures.time_plot(
    "swing_up",
    DT * torch.arange(H + 1),
    [("angle [rad]", {"angle": states[:, 1]}, (2 * math.pi,)), ("force [N]", {"force": force}, (-10.0, 10.0))],
)
