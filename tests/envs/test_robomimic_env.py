"""Robomimic: tasks, observations, seeds. Needs the extra `robomimic`; images need OpenGL."""

import gc
import importlib.util
import os
import subprocess
import sys
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from difftori.envs import robomimic, robomimic_actions
from difftori.envs.base import RenderingError, numeric_faults
from difftori.envs.robomimic_simulation import TASKS
from difftori.errors import ConfigError, MissingExtraError, NonFiniteError
from difftori.registry import make_env, resolve_env

needs_robosuite = pytest.mark.skipif(
    importlib.util.find_spec("robosuite") is None, reason="needs the extra: pip install 'difftori[robomimic]'"
)
LOW_DIM = {"lift": 19, "can": 23, "square": 23, "transport": 59, "tool_hang": 53}


def made(task: str, **options) -> robomimic.RobomimicEnv:
    return robomimic.build(task, **options)


def drawn(task: str, **options) -> tuple[robomimic.RobomimicEnv, dict]:
    """An environment with images, and its first observation; or a skip."""
    try:
        env = made(task, obs="image", **options)
        return env, env.reset(seed=0)[0]
    except RenderingError as error:
        pytest.skip(f"no OpenGL here: {error}")


def random_episode(env: robomimic.RobomimicEnv, seed: int, steps: int) -> np.ndarray:
    """The simulator's states of an episode of random actions that depend on the seed."""
    env.reset(seed=seed)
    states = [env.simulation.sim.get_state().flatten()]
    draw = np.random.default_rng(seed)
    for _ in range(steps):
        env.step(draw.uniform(-1, 1, env.action_space.shape).astype(np.float32))
        states.append(env.simulation.sim.get_state().flatten())
    return np.stack(states)


@needs_robosuite
@pytest.mark.parametrize("task", TASKS)
def test_the_seed_and_the_actions_determine_an_episode_whatever_came_before(task):
    env, twin = made(task), made(task)
    first = random_episode(env, 3, 10)
    other = random_episode(env, 4, 3)
    again, elsewhere = random_episode(env, 3, 10), random_episode(twin, 3, 10)
    assert np.array_equal(first, again)
    assert np.array_equal(first, elsewhere)
    assert not np.array_equal(first[0], other[0])
    env.close()
    twin.close()


@needs_robosuite
@pytest.mark.parametrize("task", TASKS)
def test_the_state_is_the_low_dimensional_observation_of_robomimic(task):
    env = made(task)
    obs, _ = env.reset(seed=0)
    seen = env.simulation._get_observations(force_update=True)
    arms = TASKS[task].arms
    names = [f"robot{arm}_{part}" for arm in range(arms) for part in ("eef_pos", "eef_quat", "gripper_qpos")]
    assert obs.shape == env.observation_space.shape == (LOW_DIM[task],)
    assert np.allclose(obs, np.concatenate([seen["object-state"], *(seen[name] for name in names)]), atol=1e-6)
    env.close()


@needs_robosuite
def test_the_first_observation_has_the_positions_relative_to_the_hand():
    env = made("square")
    first, _ = env.reset(seed=0)
    seen = env.simulation._get_observations(force_update=True)
    assert np.allclose(first[:3], seen["SquareNut_to_robot0_eef_pos"], atol=1e-6)
    assert np.abs(first[:3]).max() > 0.01
    env.close()


@needs_robosuite
@pytest.mark.filterwarnings("ignore::UserWarning")  # it warns of unbounded observations
def test_it_is_a_gymnasium_environment():
    from gymnasium.utils.env_checker import check_env

    check_env(made("square", max_steps=5), skip_render_check=True)


@needs_robosuite
def test_episodes_are_truncated_at_the_limit_and_success_is_reported_at_every_step():
    env = made("can", max_steps=3)
    assert env.reset(seed=0)[1] == {"success": False}
    ends = [env.step(np.zeros(7, dtype=np.float32)) for _ in range(3)]
    assert [(end[1], end[2], end[3], end[4]) for end in ends] == [
        (0.0, False, last, {"success": False}) for last in (False, False, True)
    ]
    assert made("transport").metadata["max_episode_steps"] == 700
    env.close()


@needs_robosuite
def test_an_episode_terminates_when_the_task_is_solved(monkeypatch):
    env = made("square", max_steps=9)
    env.reset(seed=0)
    solved = iter([False, True])
    monkeypatch.setattr(env.simulation, "_check_success", lambda: next(solved))
    monkeypatch.setattr(env.simulation, "reward", lambda action: 0.0)
    steps = [env.step(np.zeros(7, dtype=np.float32)) for _ in range(2)]
    assert [(step[1], step[2], step[4]["success"]) for step in steps] == [(0.0, False, False), (1.0, True, True)]
    env.close()


def controllers(env: robomimic.RobomimicEnv) -> list:
    return [robot.part_controllers["right"] for robot in env.simulation.robots]


@needs_robosuite
def test_motions_of_both_arms_are_in_the_world_frame():
    """robosuite's default is the frame of the base, which is rotated in Transport."""
    env = made("transport")
    obs, _ = env.reset(seed=0)
    hands = np.stack([obs[41:44], obs[50:53]])
    push = np.tile([1.0, 0, 0, 0, 0, 0, -1.0], 2).astype(np.float32)
    for _ in range(4):
        obs, *_ = env.step(push)
    moved = np.stack([obs[41:44], obs[50:53]]) - hands
    assert (moved[:, 0] > 0.03).all()
    assert (np.abs(moved[:, 1:]) < 0.015).all()
    for angle, controller in zip(TASKS["transport"].base_angles, controllers(env), strict=True):
        draw = np.random.default_rng(0).uniform(-1, 1, (1, 7))
        turned = robomimic_actions.turned_motions(draw, angle)[0]
        assert np.allclose(turned[:3], controller.origin_ori @ draw[0, :3], atol=1e-6)
        assert np.allclose(turned[3:6], controller.origin_ori @ draw[0, 3:6], atol=1e-6)
    env.close()


@needs_robosuite
def test_the_hand_goes_to_an_absolute_action_and_stays_there():
    """robosuite 1.5 ignores `control_delta: false`, and would move on."""
    env = made("square", actions="absolute")
    obs, _ = env.reset(seed=0)
    hold = np.concatenate([obs[14:17], obs[17:21], [-1.0]])
    goal = robomimic_actions.absolute_actions(hold[None, :3], hold[None, 3:7], np.zeros((1, 7)))[0]
    goal[:3] += [0.05, -0.04, 0.06]
    for _ in range(40):
        obs, *_ = env.step(goal.astype(np.float32))
    assert np.abs(obs[14:17] - goal[:3]).max() < 0.01
    env.close()


@needs_robosuite
@pytest.mark.parametrize("task", ["square", "transport"])
def test_absolute_actions_have_the_goals_of_the_motions(task):
    moving, placing = made(task), made(task, actions="absolute")
    arms, seeds = TASKS[task].arms, range(3 if task == "square" else 1)
    for seed in seeds:
        obs, _ = moving.reset(seed=seed)
        assert np.array_equal(obs, placing.reset(seed=seed)[0])
        motions = np.random.default_rng(seed).uniform(-1, 1, (arms, 7))
        poses = obs[TASKS[task].object_size :].reshape(arms, 9)
        goals = [
            robomimic_actions.absolute_actions(pose[None, :3], pose[None, 3:7], motion[None])[0]
            for pose, motion in zip(poses, motions, strict=True)
        ]
        action = np.concatenate(goals).astype(np.float32)
        assert placing.action_space.contains(action)
        moving.step(motions.ravel())
        placing.step(np.concatenate(goals))
        for one, other in zip(controllers(moving), controllers(placing), strict=True):
            assert np.allclose(one.goal_pos, other.goal_pos, atol=1e-6)
            assert np.allclose(one.goal_ori, other.goal_ori, atol=1e-6)
    moving.close()
    placing.close()


@needs_robosuite
@pytest.mark.parametrize("rows", [[0, 0, 0, 0, 1, 0], [1, 0, 0, 2, 0, 0], [0] * 6], ids=["zero", "parallel", "nothing"])
def test_absolute_actions_without_a_rotation_are_refused(rows):
    with pytest.raises(NonFiniteError, match="rotation"):
        robomimic_actions.controller_goals(np.array([0.0, 0, 1, *rows, 1]))


@needs_robosuite
@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3), st.floats(0.1, 5), st.floats(-2, 2))
def test_ten_numbers_are_the_same_goal_after_scaling_and_skewing_the_rows(vector, scale, skew):
    from scipy.spatial.transform import Rotation

    action = np.array([[0.1, 0.2, 1.0, *vector, -1.0]])
    ten = robomimic_actions.from_rotation_vectors(action)[0]
    ten[6:9] = scale * (ten[6:9] + skew * ten[3:6])
    ten[3:6] *= scale
    back = robomimic_actions.controller_goals(ten)
    assert np.allclose(back[[0, 1, 2, 6]], action[0, [0, 1, 2, 6]])
    turn = Rotation.from_rotvec(back[3:6]).inv() * Rotation.from_rotvec(vector)
    assert turn.magnitude() < 1e-6


@needs_robosuite
def test_images_are_those_of_robosuite_and_do_not_disturb_each_other():
    env, obs = drawn("lift")
    assert obs in env.observation_space
    from robosuite.utils.binding_utils import MjRenderContextOffscreen

    env.simulation.sim.add_render_context(context := MjRenderContextOffscreen(env.simulation.sim, device_id=-1))
    context.vopt.geomgroup[0] = 0
    for name in ("agentview", "robot0_eye_in_hand"):
        theirs = env.simulation.sim.render(camera_name=name, width=84, height=84)[::-1]
        assert np.array_equal(obs[f"{name}_image"], theirs.transpose(2, 0, 1))
    other, _ = drawn("square")
    assert np.array_equal(env._observation()["agentview_image"], obs["agentview_image"])
    other.close()
    assert np.array_equal(env._observation()["agentview_image"], obs["agentview_image"])
    assert env.render().shape == (240, 240, 3)
    env.close()


@needs_robosuite
def test_a_new_model_is_drawn_and_the_old_one_is_freed():
    env, first = drawn("lift")
    old = weakref.ref(env.simulation.sim.model._model)
    second, _ = env.reset(seed=1)
    assert not np.array_equal(first["agentview_image"], second["agentview_image"])
    gc.collect()
    assert old() is None
    again, _ = env.reset(seed=0)
    assert all(np.array_equal(again[name], first[name]) for name in first)
    plain, without = drawn("lift", reflections=False)
    away = np.abs(without["agentview_image"].astype(int) - first["agentview_image"])
    assert 0 < away.mean() < 2
    env.close()
    plain.close()


class Counting:
    """An expert whose actions tell the number of its steps."""

    def reset(self, sim, rng):
        self.steps = 0.0

    def act(self, sim):
        self.steps += 0.125
        return np.full(7, self.steps)


@needs_robosuite
def test_an_expert_in_the_environment_acts_once_a_step():
    parts = ("object", "robot0_eef_pos", "expert")
    env = robomimic.RobomimicEnv("square", parts=parts, actions="delta", reflections=True, max_steps=9, script=Counting)
    for _ in range(2):
        obs, _ = env.reset(seed=0)
        assert tuple(obs) == parts
        seen = [obs["expert"][0], *(env.step(obs["expert"])[0]["expert"][0] for _ in range(2))]
        assert seen == [0.125, 0.25, 0.375]
    env.close()


@needs_robosuite
@pytest.mark.parametrize("backend", ["disable", None])
def test_import_keeps_the_selected_backend_of_mujoco(backend):
    """In a new process, because robosuite sets the variable when it is imported first."""
    script = """
import os
from difftori.envs import robomimic_simulation as simulation
from difftori.envs.opengl import import_drawing
import_drawing("mujoco", needs_images=False)
before = os.environ.get("MUJOCO_GL")
simulation.import_robosuite(needs_images=False)
assert os.environ.get("MUJOCO_GL") == before, os.environ.get("MUJOCO_GL")
"""
    chosen = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    chosen |= {} if backend is None else {"MUJOCO_GL": backend}
    done = subprocess.run([sys.executable, "-c", script], env=chosen, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("written", ["tool_hang", "tool-hang", "Tool-Hang"])
def test_spellings_of_a_task_are_the_same_task(written):
    assert resolve_env(f"robomimic:{written}").name == "robomimic:tool_hang"


def test_invalid_options_are_listed_together():
    with pytest.raises(ConfigError) as error:
        made("square", obs="sound", actions="relative", max_steps=0)
    assert len(error.value.faults) == 3


def test_without_the_extra_the_error_names_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"difftori\[robomimic\].*Python 3.10 or 3.11"):
        made("square")


def test_flags_are_no_integers_and_those_of_numpy_are():
    assert numeric_faults(one=1, many=np.int64(3), none=None) == []
    assert numeric_faults(a=True, b=np.int64(0), c=2.0) == [
        "a is True, not an integer",
        "b is 0; it must be at least 1",
        "c is 2.0, not an integer",
    ]


def test_near_names_are_suggested():
    with pytest.raises(ConfigError, match="square"):
        make_env("robomimic:sqare", num_envs=1, seed=0)
