"""Swing up a pendulum by planning one second ahead, acting for 0.05 s, and planning again from the shifted plan."""

import torch

import difftori
from difftori.envs.pendulum import PendulumParameters, pendulum_step
from difftori.solver import Detached

H, model = 20, PendulumParameters(g=10.0, m=1.0, l=1.0)
state = torch.tensor([[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])  # hanging down; lying sideways
actions = torch.full((2, H, 1), 0.5)


def dynamics(s, u):
    return pendulum_step(s, u, model)


def reward(s, u):
    return s[..., 0] - 0.05 * s[..., 2].square() - 0.001 * u[..., 0].square()


def at_the_end(s):
    return 20 * s[..., 0] - s[..., 2].square()


for step in range(101):
    if step % 20 == 0:
        angle = torch.atan2(state[:, 1], state[:, 0]).rad2deg()
        print(f"t = {0.05 * step:.0f} s  degrees from upright", [round(a) for a in angle.tolist()])
    plan = difftori.plan(
        dynamics, reward, at_the_end, state, actions, low=-2.0, high=2.0, adjoint=Detached(), max_steps=15
    )
    state = dynamics(state, plan.actions[:, 0])
    actions = plan.shifted()
