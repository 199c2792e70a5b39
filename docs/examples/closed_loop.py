"""Swing up a cart-pole in closed loop with disturbances, and recover from a kick."""

import math

import control_figures
import torch
from cartpole import DT, HANGING, cartpole, reward, terminal_value

import difftori

dynamics = cartpole()
controller = difftori.Controller(
    dynamics, reward, terminal_value, horizon=50, action_dim=1, low=-10.0, high=10.0, init_actions=0.01
)
noise = torch.Generator().manual_seed(0)
scale = torch.tensor([0.001, 0.01, 0.001, 0.01], dtype=torch.float64)

state, states, forces = HANGING, [], []
for step in range(110):
    action = controller(state)  # (1, 4) -> (1, 1)
    states.append(state[0])
    forces.append(action[0, 0])
    state = dynamics(state, action) + scale * torch.randn(1, 4, generator=noise, dtype=torch.float64)
    if step == 60:
        state[:, 3] += 1.5  # a kick: the pole gains 1.5 rad/s

angles = torch.stack(states)[:, 1]
distance = torch.remainder(angles + math.pi, 2 * math.pi) - math.pi  # rad from upright
for step in (0, 20, 40, 60, 61, 65, 80, 109):
    print(f"t = {DT * step:4.2f} s  rad from upright {distance[step].item():6.2f}  force {forces[step].item():6.2f} N")
timing = controller.timing()
print(f"{timing.calls} calls, solver steps: median {timing.median_steps:.0f}; fallbacks {timing.fallbacks}")

control_figures.time_plot(
    "closed_loop",
    DT * torch.arange(len(angles)),
    [
        ("angle [rad]", {"angle": angles}, (0.0, 2 * math.pi)),
        ("force [N]", {"force": torch.stack(forces)}, (-10.0, 10.0)),
    ],
    events=[(DT * 61, "kick")],
)
