"""Demonstrations of your own environment, a policy trained on them, and three lines to act with it."""

import numpy as np
from my_env import Cart

import difftori
from difftori import cli
from difftori.data.formats import write_zarr
from difftori.data.trajectories import Trajectories


def expert(state):
    return np.clip(-2.0 * state[:1] - 2.5 * state[1:], -5.0, 5.0)


env, states, actions, ends = Cart(), [], [], []
for seed in range(20):
    state, _ = env.reset(seed=seed)
    over = False
    while not over:
        states.append(state)
        actions.append(expert(state))
        state, _, terminated, truncated, _ = env.step(actions[-1])
        over = terminated or truncated
    ends.append(len(actions))
write_zarr(Trajectories.of({"state": np.array(states)}, np.array(actions), ends), "demos.zarr")
cli.main("train bc --env my_env:Cart --demos demos.zarr --epochs 5 --eval-episodes 20 --out runs/cart --quiet".split())

policy = difftori.load("runs/cart")
state, _ = env.reset(seed=1000)
policy.reset()
for _ in range(60):
    state, *_ = env.step(policy.act(state))
print("position and velocity after 6 s:", np.abs(state).round(2))
policy.reset()
print("actions of four carts at once:", policy.act(np.zeros((4, 2))).shape)
