"""The point in the plane, seen by a camera too: `tiny_env.camera:make`."""

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

from tiny_env.reach import Reach

SIDE = 40


class Camera(gymnasium.ObservationWrapper):
    """Shows the place as `state` and an `image`: bytes with the channels first, or with `signed` floats from −1 to 1."""

    def __init__(self, signed: bool = False):
        super().__init__(Reach())
        self.signed = signed
        image = Box(-1, 1, (3, SIDE, SIDE), np.float32) if signed else Box(0, 255, (3, SIDE, SIDE), np.uint8)
        self.observation_space = Dict({"state": Box(-np.inf, np.inf, (2,), np.float32), "image": image})

    def observation(self, observation):
        image = np.full((3, SIDE, SIDE), 128 if not self.signed else 0, self.observation_space["image"].dtype)
        return {"state": observation, "image": image}


def make(*, obs="bytes"):
    return Camera(signed=obs == "signed")
