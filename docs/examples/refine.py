"""Refine your own policy: any function from observations to actions."""

import numpy as np
import torch

from difftori.data.trajectories import Trajectories
from difftori.il.refine import refine
from difftori.policies.difftori import DiffTORIConfig

rng = np.random.default_rng(0)
states = rng.uniform(-1, 1, size=(400, 3))
expert = np.stack([np.tanh(3 * states[:, 0]), states[:, 1] * states[:, 2]], 1)  # what was recorded
demos = Trajectories.of({"state": states}, expert, ends=np.arange(20, 401, 20))


def mine(obs):
    """The policy that there is: right about the first action, and blind to the second."""
    seen = obs["state"]  # (B, 1, 3)
    return torch.stack([torch.tanh(3 * seen[..., 0]), torch.zeros_like(seen[..., 0])], -1)


settings = DiffTORIConfig(updates=400)
better = refine(mine, demos, low=(-1, -1), high=(1, 1), n_obs_steps=1, horizon=1, n_action_steps=1, settings=settings)

fresh = torch.rand(500, 1, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1
wanted = torch.stack([torch.tanh(3 * fresh[..., 0]), fresh[..., 1] * fresh[..., 2]], -1)
before, after = mine({"state": fresh}), better.act({"state": fresh}, generator=torch.Generator())
print(
    f"mean squared error of the base {(before - wanted).square().mean():.3f}, refined {(after - wanted).square().mean():.3f}"
)
