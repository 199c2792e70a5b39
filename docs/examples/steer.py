"""A trained policy keeps a speed limit that it was not trained for. Continues act.py, whose run is runs/cart."""

from my_env import DT, Cart

import difftori
from difftori import cli

train = "train difftori-il --base runs/cart --epochs 20 --eval-episodes 20 --out runs/refined --quiet"
cli.main(train.split())
policy, env = difftori.load("runs/refined"), Cart()


def too_fast(forces, now):
    """By how much the planned forces (B P 1) exceed a speed of 0.15."""
    speeds = now["state"][:, 1:] + DT * forces[..., 0].cumsum(-1)
    return (speeds.abs() - 0.15).clamp_min(0).square().sum(-1)


for weight in (0.0, 1.0, 10.0, 100.0):
    speeds, last = [], []
    for seed in range(20):
        policy.reset()
        state, info = env.reset(seed=1000 + seed)
        env.state[1] = state[1] = 0.0  # begin at rest
        for _ in range(100):
            state, _, _, _, info = env.step(policy.act(state, cost=too_fast, weight=weight))
            speeds.append(abs(state[1]))
        last.append(abs(state[0]))
    print(f"weight {weight:5.0f}: largest speed {max(speeds):.2f}, farthest from the origin at the end {max(last):.2f}")
