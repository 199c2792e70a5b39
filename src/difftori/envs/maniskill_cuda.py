"""ManiSkill 3 with all copies simulated at once on a CUDA device. Not run yet: no such device was available.

Use it as `difftori.envs.maniskill_cuda:PARALLEL:PickCube`. Only states are observed.

It is no family of its own, because it cannot keep the guarantee that the seed of a row determines its episode: ManiSkill draws
the starts of all rows that are reset together from one seed. An episode is determined by the seed of the first of these rows,
and by which rows they are. Results also differ from those on the CPU.
"""

from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from difftori.envs.base import episode_metadata, numeric_faults
from difftori.envs.family import EnvFamily
from difftori.envs.maniskill import EPISODE_STEPS, TASKS, full_name
from difftori.envs.maniskill_names import MANISKILL2
from difftori.envs.maniskill_simulation import FPS, open_simulation
from difftori.errors import ConfigError


class ParallelManiskillEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """`num_envs` copies in `simulation`, ManiSkill's environment with states of all copies (num_envs, S), without autoreset.

    Episodes are truncated after `max_steps` steps and never terminate. `info["success"]` (num_envs): success at any step.
    """

    def __init__(self, simulation: Any, *, name: str, num_envs: int, max_steps: int):
        self._env, self._max_steps = simulation, max_steps
        self.num_envs = num_envs
        observed, acted = simulation.single_observation_space, simulation.single_action_space
        self.single_observation_space = Box(-np.inf, np.inf, observed.shape, np.float32)
        self.single_action_space = Box(acted.low, acted.high, dtype=np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        limits = episode_metadata(name, max_episode_steps=max_steps, action_repeat=1, fps=FPS)
        self.metadata = {**limits, "render_modes": [], "autoreset_mode": AutoresetMode.DISABLED}
        self._steps = np.zeros(num_envs, dtype=np.int64)
        self._success = np.zeros(num_envs, dtype=bool)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin episodes in the rows of `options["reset_mask"]`; default: all. `seed` (num_envs): that of the first row counts."""
        mask = np.ones(self.num_envs, dtype=bool) if not options else np.asarray(options["reset_mask"])
        rows = np.flatnonzero(mask)
        first = None if seed is None else int(seed[rows[0]]) % 2**32
        indices = torch.as_tensor(rows, device=self._env.device)
        raw, info = self._env.reset(seed=first, options={"env_idx": indices})
        self._steps[rows] = 0
        self._success[rows] = _numpy(info["success"])[rows]
        return _numpy(raw), {"success": self._success.copy()}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Take one step in each row."""
        raw, rewards, _, _, info = self._env.step(torch.as_tensor(actions, device=self._env.device))
        self._steps += 1
        self._success |= _numpy(info["success"])
        truncated = self._steps >= self._max_steps
        return _numpy(raw), _numpy(rewards), np.zeros_like(truncated), truncated, {"success": self._success.copy()}

    def close_extras(self, **kwargs: Any) -> None:
        """Free the simulator."""
        self._env.close()


def build(task: str, *, num_envs: int, max_steps: int = EPISODE_STEPS) -> VectorEnv:
    """Build the copies of a task, one of ManiSkill 3. `max_steps`: the step after which episodes are truncated. Default: 200.

    Raises `ConfigError` without a CUDA device, and the errors of `open_simulation`.
    """
    faults = numeric_faults(max_steps=max_steps, num_envs=num_envs)
    if task in MANISKILL2:
        faults.append(f"{task} is a task of ManiSkill 2, which simulates no copies at once. Fix: use maniskill:{task}")
    elif not torch.cuda.is_available():
        faults.append(f"maniskill_cuda: PyTorch finds no CUDA device. Fix: use maniskill:{task}, which runs on the CPU")
    if faults:
        raise ConfigError(faults)
    simulation = open_simulation(task, obs_mode="state", num_envs=num_envs, device="cuda")
    return ParallelManiskillEnv(simulation, name=f"maniskill_cuda:{task}", num_envs=num_envs, max_steps=max_steps)


PARALLEL = EnvFamily(build=build, tasks=TASKS, full_name=full_name)


def _numpy(values: Any) -> np.ndarray:
    return np.array(values.cpu().numpy())
