"""Demonstrations: write them, read them, split them, normalise them, and draw windows."""

import tempfile
from pathlib import Path

import numpy as np
import torch

from difftori.data.formats import read_demos, write_zarr
from difftori.data.normalize import fit_normalizer
from difftori.data.trajectories import Trajectories
from difftori.data.windows import Windows

rng = np.random.default_rng(0)
lengths = rng.integers(20, 40, size=10)
steps = lengths.sum()
recorded = Trajectories.of(
    {"state": rng.normal(size=(steps, 5)), "image": rng.integers(0, 256, (steps, 48, 48, 3), dtype=np.uint8)},
    rng.uniform(0, 512, (steps, 2)),
    np.cumsum(lengths),
)

with tempfile.TemporaryDirectory() as folder:
    write_zarr(recorded, Path(folder) / "demos.zarr")
    demos = read_demos(Path(folder) / "demos.zarr")

train, validation = demos.split(0.2, torch.Generator().manual_seed(0))
print(f"{len(train)} episodes to learn from, {len(validation)} to validate with")

normalizer = fit_normalizer(train)  # part of the policy: it is saved with the weights
windows = Windows(train, n_obs_steps=2, horizon=16, n_action_steps=8)
for window in windows.batches(64, torch.Generator().manual_seed(0)):
    batch = normalizer(window)
print(f"{len(windows)} windows; the last batch:")
for name, values in {**batch.obs, "actions": batch.actions}.items():
    print(f"  {name:8}{tuple(values.shape)}  {values.min():.2f} … {values.max():.2f}")
actions = normalizer.denormalize_actions(batch.actions)
print(f"in the task's units up to {actions.max():.0f}")
