"""An environment that plays in microseconds, with demonstrations of it: `tiny_env.reach:make`."""

from pathlib import Path

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Dict

from difftori.data.formats import write_zarr
from difftori.data.trajectories import Trajectories
from difftori.envs.base import choice_fault, episode_metadata
from difftori.errors import ConfigError

ENV = "tiny_env.reach:make"
STEPS = 12
CLOUD = np.random.default_rng(0).normal(scale=0.1, size=(16, 3)).astype(np.float32)


class Reach(gymnasium.Env):
    """A point in the plane moves by a third of the action; success within .1 of the origin. 12 steps at most.

    Seen is its place, or with `points` a cloud around it too.
    """

    def __init__(self, points: bool = False):
        self.points = points
        self.action_space = Box(-1.0, 1.0, (2,), np.float32)
        place, cloud = (Box(-np.inf, np.inf, shape, np.float32) for shape in ((2,), CLOUD.shape))
        self.observation_space = Dict({"agent_pos": place, "point_cloud": cloud}) if points else place
        self.metadata = episode_metadata("reach", max_episode_steps=STEPS, action_repeat=1)
        self.render_mode = "rgb_array"

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.time, self.score = self.np_random.uniform(-1, 1, 2), 0, 0.0
        return self.seen(), {"success": False, "score": 0.0}

    def seen(self):
        place = self.place.astype(np.float32)
        return {"agent_pos": place, "point_cloud": cloud_around(place)} if self.points else place

    def step(self, action):
        self.place = self.place + np.asarray(action, dtype=np.float64) / 3
        self.time += 1
        away = float(np.linalg.norm(self.place))
        self.score = max(self.score, 1 - away)
        told = {"success": away < 0.1, "score": self.score}
        return self.seen(), -away, False, self.time >= STEPS, told

    def render(self):
        return np.zeros((8, 8, 3), np.uint8)


def make(*, obs="state"):
    if faults := choice_fault("obs", obs, ("state", "points")):
        raise ConfigError(faults)
    return Reach(points=obs == "points")


def cloud_around(place):
    """Sixteen points whose middle is the place, at no height."""
    return CLOUD + np.append(place, 0).astype(np.float32)


def expert(place):
    """The way home, as far as the box allows."""
    return np.clip(-3.0 * place, -1, 1)


def write_demos(path: Path, episodes: int = 6, noise: float = 0.0) -> str:
    """Recorded episodes, all of them successes; the path to give as `--demos`."""
    env, rng = Reach(), np.random.default_rng(0)
    states, actions, ends = [], [], []
    for episode in range(episodes):
        seen, _ = env.reset(seed=episode)
        over = False
        while not over:
            action = expert(seen) + noise * rng.normal(size=2)
            states.append(seen)
            actions.append(action)
            seen, _, _, truncated, info = env.step(action)
            over = truncated or info["success"]
        ends.append(len(states))
    places = np.array(states)
    seen_as = {"state": places, "agent_pos": places, "point_cloud": np.array([cloud_around(place) for place in places])}
    demos = Trajectories.of({k: torch.tensor(v) for k, v in seen_as.items()}, np.array(actions), ends)
    write_zarr(demos, path)
    return str(path)
