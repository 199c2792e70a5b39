"""ManiSkill's copies on one device: the vector environment around them, with a stand-in, and on the CPU with one copy."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

from difftori.envs.base import RenderingError
from difftori.envs.checked import CheckedVectorEnv
from difftori.envs.maniskill import build as build_single
from difftori.envs.maniskill_cuda import ParallelManiskillEnv
from difftori.envs.maniskill_simulation import open_simulation
from difftori.errors import ConfigError, MissingExtraError
from difftori.registry import make_env


class StandIn(SimpleNamespace):
    """Counts the steps of each copy; a copy succeeds when its action is above 0.9."""

    device = "cpu"
    single_observation_space = Box(-1.0, 1.0, (2,), np.float32)
    single_action_space = Box(-1.0, 1.0, (7,), np.float32)

    def reset(self, seed, options):
        self.resets.append((seed, options["env_idx"].tolist()))
        self.steps[options["env_idx"]] = 0
        return self.shown(), {"success": torch.zeros(3, dtype=torch.bool)}

    def step(self, actions):
        self.steps += 1
        return self.shown(), actions[:, 0], None, None, {"success": actions[:, 0] > 0.9}

    def shown(self):
        return torch.stack([self.steps, torch.arange(3)], 1).float()

    def close(self):
        self.closed = True


def test_rows_are_reset_by_mask_and_successes_remain():
    simulation = StandIn(resets=[], steps=torch.zeros(3, dtype=torch.int64), closed=False)

    def start():
        return ParallelManiskillEnv(simulation, name="x", num_envs=3, max_steps=4)

    env = CheckedVectorEnv(start(), start, name="x", seed=0)
    env.reset(seed=[5, 6, 7])
    actions = np.zeros((3, 7), np.float32)
    actions[1] = 1
    assert env.step(actions)[4]["success"].tolist() == [False, True, False]
    shown, rewards, _, truncated, info = env.step(actions * 0)
    assert shown[:, 0].tolist() == [2, 2, 2]
    assert info["success"].tolist() == [False, True, False]
    env.reset(seed=[1, 2, 3], options={"reset_mask": np.array([False, True, True])})
    assert simulation.resets == [(5, [0, 1, 2]), (2, [1, 2])]
    assert env.step(actions * 0)[4]["success"].tolist() == [False, False, False]
    assert env.step(actions * 0)[3].tolist() == [True, False, False]
    env.close()
    assert simulation.closed


def test_one_copy_on_the_cpu_shows_the_states_of_the_single_environment():
    try:
        simulation, single = open_simulation("PickCube", obs_mode="state"), build_single("PickCube")
    except (MissingExtraError, RenderingError) as error:
        pytest.skip(str(error))
    env = ParallelManiskillEnv(simulation, name="x", num_envs=1, max_steps=4)
    assert np.array_equal(env.reset(seed=[3])[0][0], single.reset(seed=3)[0])
    action = np.full(7, 0.3, np.float32)
    assert np.array_equal(env.step(action[None])[0][0], single.step(action)[0])
    env.close()
    single.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_the_other_environment_is_named():
    with pytest.raises(ConfigError, match="no CUDA device. Fix: use maniskill:StackCube"):
        make_env("difftori.envs.maniskill_cuda:PARALLEL:stack-cube", num_envs=4, seed=0)


def test_the_tasks_of_maniskill_2_are_refused():
    with pytest.raises(ConfigError, match="Pour is a task of ManiSkill 2"):
        make_env("difftori.envs.maniskill_cuda:PARALLEL:Pour", num_envs=4, seed=0)
