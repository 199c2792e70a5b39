"""What an environment offers from which demonstrations can be collected."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from difftori.envs.checked import CheckedVectorEnv


@dataclass(frozen=True)
class Demonstrator:
    """An environment together with an expert for it. A module of `difftori.envs` offers one by

        demonstrator(task, *, num_envs, seed, obs, workers) -> Demonstrator

    `env` has observations by name, and tells in `info["success"]` (num_envs) whether the running episode has succeeded
    yet. `act` maps its observations to actions (num_envs, A), which the collector clips. `arrays` says which observation
    is stored under which name of the data set. `packages` are those whose versions decide what comes out.
    """

    env: CheckedVectorEnv[dict[str, np.ndarray]]
    act: Callable[[dict[str, np.ndarray]], np.ndarray]
    arrays: Mapping[str, str]
    packages: tuple[str, ...]
