"""Small sets of demonstrations, and objects that show when they are unpickled."""

import os

import numpy as np
import torch

from difftori.data.trajectories import Trajectories

ENDS = [4, 7, 12]


class Canary:
    """Unpickling one makes the file `path`."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def tiny(seed=0, ends=ENDS):
    """Vectors, a single number, a cloud and images."""
    rng, steps = np.random.default_rng(seed), ends[-1]
    obs = {
        "state": rng.normal(size=(steps, 3)),
        "gripper": rng.normal(size=(steps, 1)),
        "cloud": rng.normal(size=(steps, 5, 3)),
        "image": rng.integers(0, 256, (steps, 8, 6, 3), dtype=np.uint8),
    }
    return Trajectories.of(obs, rng.normal(size=(steps, 2)), ends, {"env": "tiny", "seed": seed})


def assert_same(one, other):
    """The same episodes of the same numbers, wherever they are stored."""
    assert one.shapes == other.shapes
    assert one.lengths == other.lengths
    for number in range(len(one)):
        (obs, actions), (other_obs, other_actions) = one.episode(number), other.episode(number)
        assert torch.equal(actions, other_actions)
        assert all(torch.equal(values, other_obs[name]) for name, values in obs.items())
