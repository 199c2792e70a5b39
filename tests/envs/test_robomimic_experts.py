"""The scripted experts of the robomimic tasks: geometry, stages, success in the simulation, repeatability."""

import importlib.util

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from difftori.envs import robomimic
from difftori.envs.robomimic_experts import NOISE, ROUTINES, make_script
from difftori.envs.robomimic_simulation import TASKS, create_simulation
from difftori.envs.robomimic_stages import (
    CLOSED,
    OPEN,
    Pose,
    Script,
    Stage,
    about_z,
    hand_down,
    hold,
    nearest,
    never,
    rotation_vector,
    shortest_rotation,
    wrap,
)
from difftori.envs.robomimic_state import reset_to_seed
from difftori.envs.workers import launch
from difftori.errors import ConfigError

needs_robosuite = pytest.mark.skipif(
    importlib.util.find_spec("robosuite") is None, reason="needs the extra: pip install 'difftori[robomimic]'"
)
ANGLES = st.floats(-10.0, 10.0)
VECTORS = st.tuples(*[st.floats(-3.0, 3.0)] * 3).map(np.array)
STEPS = {"lift": 60, "can": 250, "square": 300, "tool_hang": 700, "transport": 700}
"""Steps in which each task is solved."""


def rotation(vector: np.ndarray) -> np.ndarray:
    """The rotation of a rotation vector, by the series of the matrix exponential."""
    x, y, z = vector
    generator = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]]) / 64
    small = np.eye(3) + generator + generator @ generator / 2 + generator @ generator @ generator / 6
    return np.linalg.matrix_power(small, 64)


@given(VECTORS)
def test_a_rotation_is_recovered_from_its_vector(vector):
    vector = vector / max(1.0, np.linalg.norm(vector) / 3.0)
    assert np.allclose(rotation_vector(rotation(vector)), vector, atol=1e-3)


@pytest.mark.parametrize("axis", np.eye(3))
def test_half_a_turn_and_no_turn_are_finite(axis):
    half = 2 * np.outer(axis, axis) - np.eye(3)
    assert np.allclose(np.abs(rotation_vector(half)), np.pi * axis)
    assert np.array_equal(rotation_vector(np.eye(3)), np.zeros(3))


@given(VECTORS, VECTORS)
def test_the_shortest_rotation_turns_one_direction_to_the_other(start, end):
    if min(np.linalg.norm(start), np.linalg.norm(end)) < 1e-3:
        return
    start, end = start / np.linalg.norm(start), end / np.linalg.norm(end)
    turn = shortest_rotation(start, end)
    assert np.allclose(turn @ start, end, atol=1e-4)
    assert np.allclose(turn.T @ turn, np.eye(3), atol=1e-6)
    assert np.linalg.norm(rotation_vector(turn)) == pytest.approx(np.arccos(np.clip(start @ end, -1, 1)), abs=1e-3)


def test_opposite_directions_have_a_shortest_rotation():
    up = np.array([0.0, 0.0, 1.0])
    assert np.allclose(shortest_rotation(up, -up) @ up, -up)


@given(ANGLES, ANGLES)
def test_the_nearest_symmetric_angle(angle, target):
    found = nearest(angle, np.pi / 2, target)
    assert -np.pi <= found < np.pi
    assert abs(wrap(found - target)) <= np.pi / 4 + 1e-9
    assert wrap(4 * (found - angle)) == pytest.approx(0.0, abs=1e-6) or abs(wrap(4 * (found - angle))) > np.pi - 1e-6


def test_a_hand_that_points_down():
    hand = hand_down(0.3)
    assert np.allclose(hand[:, 2], [0.0, 0.0, -1.0])
    assert np.allclose(hand[:, 1], [np.cos(0.3), np.sin(0.3), 0.0])
    assert np.allclose(about_z(0.2) @ hand, hand_down(0.5))


class Sim:
    """As much of a robosuite environment as an arm reads; the hand moves by the action."""

    class Robot:
        eef_site_id = {"right": 0}

    def __init__(self):
        self.sim = self.data = self
        self.robots = [self.Robot()]
        self.site_xpos, self.site_xmat = np.zeros((1, 3)), np.eye(3).reshape(1, 9)

    def step(self, action: np.ndarray) -> None:
        self.site_xpos[0] += 0.05 * action[:3]


def played(routine, steps: int, *, noise: float = 0.0, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """The stage before each step, and the actions."""
    sim, script = Sim(), Script((routine,), noise=noise)
    script.reset(sim, np.random.default_rng(seed))
    stages, actions = [], []
    for _ in range(steps):
        stages.append(script.stages[0])
        actions.append(script.act(sim))
        sim.step(actions[-1])
    return stages, np.stack(actions)


def reach(arm, **options) -> Stage:
    goal = Pose(np.array([0.1, 0.0, 0.0]), np.eye(3))
    return Stage("reach", lambda: goal, OPEN, **{"tolerance": (0.01, 0.1), **options})


def test_a_stage_ends_at_its_goal_and_the_last_one_stays():
    stages, actions = played(
        lambda arm: [reach(arm), hold(arm, "close", CLOSED, steps=2), hold(arm, "stay", CLOSED, steps=1)], 8
    )
    assert stages == ["reach"] * 3 + ["close"] * 2 + ["stay"] * 3
    assert actions[:, 6].tolist() == [OPEN] * 3 + [CLOSED] * 5
    assert np.abs(actions).max() == 1.0


def test_speed_bounds_the_motion_only():
    _, actions = played(lambda arm: [reach(arm, speed=0.25, until=never)], 3)
    assert np.abs(actions[:, :6]).max() == 0.25
    assert (actions[:, 6] == OPEN).all()


def test_a_limit_goes_on_or_plans_again():
    plans = []

    def routine(arm, **options):
        plans.append(arm.hand.position[0])
        return [reach(arm, until=never, limit=2, **options), hold(arm, "close", CLOSED, steps=9)]

    assert played(routine, 3)[0] == ["reach", "reach", "close"]
    plans.clear()
    assert played(lambda arm: routine(arm, retry=True), 5)[0] == ["reach"] * 5
    assert len(plans) == 3
    assert plans[0] != plans[1]


def test_a_lost_stage_begins_again_at_once():
    def routine(arm):
        return [
            reach(arm),
            Stage(
                "carry",
                lambda: arm.moved([-0.05, 0.0, 0.0]),
                CLOSED,
                until=never,
                lost=lambda: arm.hand.position[0] < 0.05,
            ),
        ]

    stages, actions = played(routine, 12)
    first_loss = stages.index("reach", 4)
    assert stages[first_loss - 1] == "carry"
    assert actions[first_loss - 1, 6] == OPEN


def test_noise_is_drawn_from_the_given_generator_and_spares_the_gripper():
    routine = lambda arm: [reach(arm, until=never)]  # noqa: E731
    clean, noisy = played(routine, 20)[1], played(routine, 20, noise=0.1, seed=1)[1]
    assert np.array_equal(noisy, played(routine, 20, noise=0.1, seed=1)[1])
    assert not np.array_equal(noisy, played(routine, 20, noise=0.1, seed=2)[1])
    assert np.array_equal(clean[:, 6], noisy[:, 6])
    assert noisy[:, 3:6].std() == pytest.approx(0.1, rel=0.5)
    assert np.abs(noisy).max() <= 1.0


def test_wrong_requests_are_refused():
    with pytest.raises(ConfigError, match="task is 'stack'.*choose one of lift, can, square, tool_hang, transport"):
        make_script("stack")
    with pytest.raises(ConfigError, match="reset"):
        make_script("lift").act(Sim())
    assert set(NOISE) == set(ROUTINES)


@pytest.fixture
def simulation():
    """Builds robosuite's environment of a task, and closes it."""
    opened = []

    def build(task: str):
        opened.append(create_simulation(TASKS[task], absolute=False, needs_images=False))
        return opened[-1]

    yield build
    for sim in opened:
        sim.close()


def episode(sim, task: str, seed: int, *, steps: int | None = None) -> tuple[bool, np.ndarray]:
    """Whether the expert succeeds from a seed, and its actions until then."""
    reset_to_seed(sim, seed)
    script = make_script(task)
    script.reset(sim, np.random.default_rng(seed))
    actions = []
    for _ in range(steps or STEPS[task]):
        actions.append(script.act(sim))
        sim.step(actions[-1])
        if steps is None and sim._check_success():
            return True, np.stack(actions)
    return False, np.stack(actions)


@needs_robosuite
@pytest.mark.parametrize("task", ["lift", "square"])
def test_the_expert_solves_the_short_tasks(simulation, task):
    solved, actions = episode(simulation(task), task, seed=1)
    assert solved
    assert actions.shape[1] == 7
    assert set(actions[:, 6]) == {OPEN, CLOSED}


@needs_robosuite
@pytest.mark.slow
@pytest.mark.parametrize("task", list(ROUTINES))
def test_the_expert_solves_every_task_with_noise(simulation, task):
    sim = simulation(task)
    assert [seed for seed in range(3) if not episode(sim, task, seed)[0]] == []


@needs_robosuite
def test_an_episode_is_determined_by_its_seed(simulation):
    sim = simulation("square")
    first = episode(sim, "square", 5, steps=30)[1]
    other = episode(sim, "square", 6, steps=30)[1]
    again = episode(sim, "square", 5, steps=30)[1]
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@needs_robosuite
def test_a_dropped_nut_is_grasped_again(simulation):
    sim = simulation("square")
    reset_to_seed(sim, 0)
    script = Script(ROUTINES["square"], noise=0.0)
    script.reset(sim, np.random.default_rng(0))
    dropped, solved = False, False
    for _ in range(400):
        action = script.act(sim)
        if script.stages == ("over the peg",) and not dropped:
            for _ in range(15):
                sim.step(np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, OPEN]))
            dropped = True
            action = script.act(sim)
            assert script.stages == ("above the handle",)
        sim.step(action)
        solved = bool(sim._check_success())
        if solved:
            break
    assert dropped
    assert solved


@needs_robosuite
def test_a_demonstration_is_reproduced_by_its_seed_and_recorded_actions():
    expert = robomimic.expert("lift")
    env = launch(expert.build, name="lift", num_envs=1, seed=0)
    seen, _ = env.reset(seed=[7])
    actions, states, ended = [], [], False
    while not ended:
        states.append(np.concatenate([seen[name][0] for name in expert.arrays]))
        actions.append(np.clip(expert.act(seen), -1, 1))
        seen, _, terminated, truncated, info = env.step(actions[-1])
        ended = bool(terminated[0] or truncated[0])
    env.close()
    assert terminated[0]
    assert info["success"][0]
    assert len(actions) < 60
    replay = robomimic.build("lift")
    state, _ = replay.reset(seed=7)
    steps, terminated = 0, False
    while not terminated:
        assert np.array_equal(state, states[steps])
        state, reward, terminated, _, info = replay.step(actions[steps][0])
        steps += 1
    replay.close()
    assert reward == 1.0
    assert info["success"]
    assert steps == len(actions) - robomimic.HOLD_STEPS + 1, (
        "a demonstration goes on after the success, an evaluation does not"
    )


def test_demonstrations_hold_what_every_observation_type_is_computed_from():
    for task in robomimic.TASKS:
        recorded = robomimic.recorded(task)
        assert set(robomimic.expert(task).arrays) == set(recorded["state"])
        assert set(robomimic.expert(task, obs="image").arrays) == {*recorded["state"], *recorded["image"]}
    with pytest.raises(ConfigError, match="obs is 'points'"):
        robomimic.expert("lift", obs="points")
