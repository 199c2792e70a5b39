"""Executing policies of imitation: plans, histories, episodes from their seeds."""

import numpy as np
import pytest
import torch
from tiny_env.reach import ENV, STEPS, Reach, expert

from difftori.errors import ConfigError, NonFiniteError
from difftori.registry import make_env
from difftori.rollout import PolicyInRows, evaluate_policy, named, run_episodes, wilson_interval
from difftori.runs.process import StopRequested
from difftori.types import EntrySpec, TaskSpec


def spec(n_obs_steps=2, horizon=5, n_action_steps=3) -> TaskSpec:
    return TaskSpec({"state": EntrySpec((2,))}, 2, horizon, (-1.0, -1.0), (1.0, 1.0), n_obs_steps, n_action_steps)


def homing(task: TaskSpec, seen: list | None = None):
    """Plans the way home from the last observation, and keeps what it was shown."""

    def act(obs):
        if seen is not None:
            seen.append(obs["state"].clone())
        place, plan = obs["state"][:, -1].numpy().astype(np.float64), []
        for _ in range(task.n_action_steps):
            plan.append(expert(place))
            place = place + plan[-1] / 3
        whole = torch.full((len(place), task.horizon, 2), 99.0)  # nothing but the present may be executed
        whole[:, task.present] = torch.tensor(np.stack(plan, 1), dtype=torch.float32)
        return whole

    return act


def idle(task: TaskSpec):
    return lambda obs: torch.zeros(len(obs["state"]), task.horizon, 2)


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_episodes_do_not_depend_on_how_many_are_played_at_once(rows):
    env = make_env(ENV, num_envs=rows, seed=0)
    played = evaluate_policy(env, homing(spec()), spec(), range(7, 12))
    alone = [
        evaluate_policy(make_env(ENV, num_envs=1, seed=3), homing(spec()), spec(), [seed])[0] for seed in range(7, 12)
    ]
    assert played == alone
    assert all(episode.success for episode in played)
    assert len({episode.length for episode in played}) > 1, "they end at different times, which is what is tested"


def test_an_evaluation_tells_its_progress_and_can_be_ended_after_any_step():
    seen: list[int] = []
    evaluate_policy(make_env(ENV, num_envs=2, seed=0), homing(spec()), spec(), range(7, 12), watch=seen.append)
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0, 5)

    def stop(ended: int) -> None:
        raise StopRequested

    plans: list = []
    with pytest.raises(StopRequested):
        evaluate_policy(make_env(ENV, num_envs=2, seed=0), homing(spec(), plans), spec(), range(7, 12), watch=stop)
    assert len(plans) == 1, "the end comes within the first plan"


def test_an_episode_is_that_of_its_seed_and_ends_with_success_or_time():
    (won,) = evaluate_policy(make_env(ENV, num_envs=1, seed=0), homing(spec()), spec(), [5])
    env = Reach()
    place = env.reset(seed=5)[0]
    needed = 1
    while not env.step(expert(place))[-1]["success"]:
        place, needed = env.seen(), needed + 1
    assert (won.seed, won.success, won.length) == (5, True, needed)
    (lost,) = evaluate_policy(make_env(ENV, num_envs=1, seed=0), idle(spec()), spec(), [5])
    away = float(np.linalg.norm(Reach().reset(seed=5)[0]))
    assert (lost.success, lost.length) == (False, STEPS)
    assert lost.total == pytest.approx(-STEPS * away, rel=1e-5)
    assert lost.score == pytest.approx(1 - away, rel=1e-5)


def test_the_first_observation_stands_for_those_before_it_and_then_come_the_last_ones():
    shown: list[torch.Tensor] = []
    task = spec(n_obs_steps=3, horizon=6, n_action_steps=1)
    evaluate_policy(make_env(ENV, num_envs=1, seed=0), homing(task, shown), task, [5])
    first = torch.tensor(Reach().reset(seed=5)[0])
    assert torch.equal(shown[0][0], first.expand(3, 2))
    assert torch.equal(shown[1][0, :2], first.expand(2, 2)), "a step later, two of three are the first"
    assert not torch.equal(shown[1][0, 2], first)


def test_a_policy_keeps_history_and_plan_of_each_row_apart():
    env = make_env(ENV, num_envs=3, seed=0)
    together = [[] for _ in range(5)]
    for step in run_episodes(env, PolicyInRows(homing(spec()), spec()), range(7, 12), until_success=True):
        for row, number in step.active():
            together[number].append(step.actions[row])
    single = make_env(ENV, num_envs=1, seed=0)
    for number, seed in enumerate(range(7, 12)):
        steps = list(run_episodes(single, PolicyInRows(homing(spec()), spec()), [seed], until_success=True))
        assert np.array_equal([step.actions[0] for step in steps], together[number])
        assert [bool(step.ended[0]) for step in steps] == [False] * (len(steps) - 1) + [True]


def test_a_seed_is_taken_only_when_a_row_is_free():
    env, taken = make_env(ENV, num_envs=2, seed=0), []

    def seeds():
        for seed in range(100):
            taken.append(seed)
            yield seed

    steps = run_episodes(env, PolicyInRows(idle(spec()), spec()), seeds())
    for _ in range(STEPS):
        next(steps)
    assert taken == [0, 1]
    next(steps)
    assert taken == [0, 1, 2, 3]


def test_an_environment_that_does_not_tell_of_success_is_refused(monkeypatch):
    step = Reach.step
    monkeypatch.setattr(Reach, "step", lambda self, action: (*step(self, action)[:4], {}))
    with pytest.raises(ConfigError, match="has no `success`"):
        evaluate_policy(make_env(ENV, num_envs=1, seed=0), idle(spec()), spec(), [5])


def test_images_come_with_their_channels_last():
    images = np.zeros((4, 3, 8, 9), np.uint8)
    assert named({"image": images})["image"].shape == (4, 8, 9, 3)
    assert named(np.zeros((4, 5)))["state"].shape == (4, 5)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # from Wilson's formula, as published tables have it to three digits
    [(8, 10, 0.490, 0.943), (0, 10, 0.0, 0.278), (10, 10, 0.722, 1.0), (50, 100, 0.404, 0.596)],
)
def test_wilsons_interval(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-4)


def test_an_error_while_planning_changes_nothing_that_is_kept():
    """A step that failed can be repeated: the history does not contain it twice, and no part of its plan is executed."""
    task, shown, plans = spec(n_obs_steps=2, horizon=4, n_action_steps=3), [], []

    def act(obs):
        shown.append(obs["state"][0, :, 0].tolist())
        plan = 10 * obs["state"][:, -1:].expand(-1, 4, -1) + torch.arange(-1.0, 3.0)[None, :, None]
        if len(shown) == 2:
            raise OSError("camera")
        if len(shown) == 3:
            plan = torch.where(torch.arange(4)[None, :, None] == 2, torch.nan, plan)  # in the second action
        return plan

    policy, active = PolicyInRows(act, task), np.ones(1, dtype=bool)

    def step(value, begin=False):
        return policy(np.full((1, 2), value, np.float32), np.full(1, begin), active)[0, 0]

    plans = [step(1.0, begin=True), step(2.0), step(3.0)]
    with pytest.raises(OSError, match="camera"):
        step(4.0)
    with pytest.raises(NonFiniteError, match="plan has NaN"):
        step(4.0)
    plans += [step(4.0), step(5.0), step(6.0), step(7.0)]
    assert plans == [10.0, 11.0, 12.0, 40.0, 41.0, 42.0, 70.0]
    assert shown == [[1, 1], [3, 4], [3, 4], [3, 4], [6, 7]]
