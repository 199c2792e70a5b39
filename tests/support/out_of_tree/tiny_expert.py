"""An environment with an expert that plays in microseconds; tests put it into a package and find it by its name there."""

import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

from difftori.envs.base import choice_fault
from difftori.envs.family import EnvFamily, Expert
from difftori.errors import ConfigError

TROUBLE = "TINY_EXPERT_TROUBLE"
"""Environment variable with a file's path: while the file is there, a step takes it away and raises."""
SLOW = "TINY_EXPERT_SLOW"
"""Environment variable: seconds that a step takes."""


class Tiny(gymnasium.Env):
    """A number that the action is added to; 3 to 6 steps; two seeds of three succeed, in the second step."""

    action_space = Box(-1.0, 1.0, (2,), np.float32)
    observation_space = Dict({"state": Box(-9, 9, (2,), np.float32), "view": Box(0, 255, (3, 2), np.uint8)})

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length, self.good = 3 + int(seed or 0) % 4, bool(int(seed or 0) % 3)
        self.time = 0
        self.state = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.seen(), {"success": False}

    def seen(self) -> dict[str, Any]:
        return {"state": self.state.copy(), "view": np.full((3, 2), self.time, np.uint8)}

    def step(self, action):
        assert action in self.action_space
        trouble = Path(os.environ.get(TROUBLE, "/nowhere"))
        if trouble.exists():
            trouble.unlink()
            raise RuntimeError("trouble")
        time.sleep(float(os.environ.get(SLOW, "0")))
        self.time += 1
        self.state = np.clip(self.state + action, -9, 9).astype(np.float32)
        success = self.good and self.time == 2
        return self.seen(), 0.0, False, self.time == self.length, {"success": success}


class Silent(Tiny):
    """Does not say whether it succeeded."""

    def step(self, action):
        return *super().step(action)[:4], {}


class OtherName(Tiny):
    """Names its success as Stable-Baselines3 does."""

    def step(self, action):
        *rest, info = super().step(action)
        return *rest, {"is_success": info["success"]}


def act(observations: dict[str, np.ndarray]) -> np.ndarray:
    """Asks for more than the box allows."""
    return 3.0 * observations["state"]


def broken(**changes: Any) -> EnvFamily:
    """A family whose expert is wrong in one way."""
    return EnvFamily(build=Tiny, expert=lambda: replace(expert(), **changes))


def expert(*, obs: str = "state", build: type[Tiny] = Tiny) -> Expert:
    if faults := choice_fault("obs", obs, ("state", "image")):
        raise ConfigError(faults)
    arrays = {"state": "state"} | ({"image": "view"} if obs == "image" else {})
    return Expert(build, act, arrays, ("numpy", "no-such-package"))


FAMILY = EnvFamily(build=Tiny, expert=expert)
OTHER_NAME = EnvFamily(build=OtherName, expert=partial(expert, build=OtherName))
ONE_ROW = broken(act=lambda observations: act(observations)[0])
WORDS = broken(act=lambda observations: np.full((len(observations["state"]), 2), "left"))
NOTHING_STORED = broken(arrays={})
RESERVED_NAME = broken(arrays={"action": "state"})
NOT_OBSERVED = broken(arrays={"state": "stat"})
SILENT = EnvFamily(build=Silent, expert=partial(expert, build=Silent))
