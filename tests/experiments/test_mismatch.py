import json
from functools import partial

import numpy as np
import pytest
import torch

from difftori.errors import DataError
from difftori.experiments.paper import mismatch, mismatch_loop
from difftori.experiments.paper.mismatch_critics import CompatibleCritics, NetworkCritics
from difftori.experiments.paper.mismatch_loop import Closed, Rollout
from difftori.experiments.paper.mismatch_report import LevelRecord, gain
from difftori.experiments.paper.mismatch_systems import SYSTEMS
from difftori.experiments.paper.mismatch_training import (
    FORMS,
    Budget,
    Transitions,
    identify,
    prediction_error,
    run_level,
)

TINY = Budget(seeds=2, epochs=1, episodes=2, held_out=2, updates=2)


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_gradient_of_the_closed_loop_agrees_with_differences(name, monkeypatch):
    monkeypatch.setattr(mismatch_loop, "_TOLERANCE", 1e-9)
    monkeypatch.setattr(mismatch_loop, "_WARM_STEPS", 60)
    system = SYSTEMS[name]
    loop = Closed(system, friction=1.0, horizon=5, steps=5)
    start = system.starts(1, torch.Generator().manual_seed(0)) * 0.2  # near upright: one local optimum
    logs = system.logs[None] + 0.1
    rollout = loop.run(logs, start, gradient=True)
    assert rollout.valid.all()
    step = 1e-4
    moves = step * torch.eye(logs.shape[1], dtype=torch.float64)
    costs = loop.run(torch.cat((logs + moves, logs - moves)), start.repeat(2 * len(moves), 1)).costs
    differences = (costs[: len(moves)] - costs[len(moves) :]) / (2 * step)
    torch.testing.assert_close(loop.return_gradient(rollout)[0], differences, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SYSTEMS)
def test_identification_finds_the_true_parameters_if_the_class_is_right(name):
    system, generator = SYSTEMS[name], torch.Generator().manual_seed(0)
    states = system.starts(50, generator) + torch.randn(50, len(system.start), generator=generator, dtype=torch.float64)
    actions = system.bound * (2 * torch.rand(50, 1, generator=generator, dtype=torch.float64) - 1)
    for friction, exact in ((0.0, True), (2.0, False)):
        following = system.dynamics(system.logs, friction)(states, actions)
        data = Transitions(states[None], actions[None], following[None])
        found = identify(system, data, system.logs[None] + 0.3)
        assert torch.allclose(found[0], system.logs, atol=1e-8) == exact
        nearby = found + 1e-3 * torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
        both = data.repeated(2)
        assert (prediction_error(system, both, nearby) > prediction_error(system, data, found)).all()


def _explored(best: torch.Tensor) -> Rollout:
    """Steps of 2 groups with 4 episodes each and the reward −(a/bound − c)², with another c for each group, around the action 0."""
    system, generator = SYSTEMS["pendulum"], torch.Generator().manual_seed(0)
    states = torch.randn(8, 51, 2, generator=generator, dtype=torch.float64)
    actions = system.bound * (2 * torch.rand(8, 50, 1, generator=generator, dtype=torch.float64) - 1)
    rewards = -((actions.squeeze(-1) / system.bound - best.repeat_interleave(4)[:, None]) ** 2)
    ones = torch.ones(8, 50, 2, dtype=torch.float64)
    return Rollout(states, 0 * actions, actions, rewards, ones * torch.tensor([1.0, 0.0]), ones, ones[..., 0] == 1)


def test_a_network_critic_learns_the_value_of_its_group():
    critics = NetworkCritics(SYSTEMS["pendulum"], groups=2, discount=0.0, seed=0)
    critics.add(_explored(torch.tensor([-0.4, 0.4], dtype=torch.float64)))
    critics.learn(400)
    nothing = torch.zeros(2, 1, 1, dtype=torch.float64)
    slopes = critics.action_gradient(torch.zeros(2, 1, 2, dtype=torch.float64), nothing) * SYSTEMS["pendulum"].bound
    assert slopes.flatten().tolist() == pytest.approx([-0.8, 0.8], abs=0.3)


def test_a_compatible_critic_finds_the_slope_by_the_exploration():
    """The cost falls with a for the second group, so the derivative by the parameter that raises every action is negative."""
    critics = CompatibleCritics(SYSTEMS["pendulum"], groups=2, seed=0)
    critics.add(_explored(torch.tensor([-0.4, 0.4], dtype=torch.float64)))
    critics.learn(200)
    gradient = critics.gradient(episodes=4) * SYSTEMS["pendulum"].bound / 50
    assert gradient[:, 0].tolist() == pytest.approx([0.8, -0.8], abs=0.5)
    assert gradient[:, 1].abs().max() < 1e-6


def test_a_level_is_repeatable_and_has_every_form():
    loop = Closed(SYSTEMS["pendulum"], friction=1.0, horizon=3, steps=5)
    level, again = run_level(loop, TINY), run_level(loop, TINY)
    assert set(level.costs) == {*FORMS, "true parameters", "true system"}
    for form in FORMS:
        assert level.costs[form].shape == (2, 2)
        np.testing.assert_array_equal(level.costs[form], again.costs[form])
        assert level.history[form]["training cost"].shape == (1, 2)
    moved = {form: level.parameters[form] for form in ("return", "flipped")}
    assert not np.array_equal(moved["return"], moved["flipped"])


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(mismatch, "_STEPS", 5)
    monkeypatch.setattr(mismatch, "Budget", partial(Budget, episodes=2, held_out=2, updates=2))
    return mismatch.Config(
        systems=("pendulum",), frictions=(0.0, 1.0), horizons=(3,), seeds=2, epochs=1, budget=None, out=tmp_path
    )


def test_finished_levels_are_not_repeated_and_the_report_is_written(small, monkeypatch):
    mismatch.run(small.model_copy(update={"frictions": (1.0,)}))
    calls = []
    monkeypatch.setattr(
        mismatch, "run_level", lambda loop, *rest: calls.append(loop.friction) or run_level(loop, *rest)
    )
    mismatch.run(small)
    assert calls == [0.0]
    out = small.out / "partial"
    for name in ("levels.csv", "parameters.csv", "gain.svg", "summary.md"):
        assert (out / name).stat().st_size > 0
    assert "partial (2 of 8 seeds" in (out / "summary.md").read_text()
    before = (out / "levels.csv").read_bytes()
    mismatch.run(small.model_copy(update={"budget": 0.0}))
    assert (out / "levels.csv").read_bytes() == before


def test_a_damaged_record_is_named_and_an_incomplete_one_repeated(small):
    config = small.model_copy(update={"frictions": (1.0,)})
    mismatch.run(config)
    file = config.out / "levels.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    mismatch.run(config)
    again, first = json.loads(file.read_bytes()), json.loads(whole)
    assert again["costs"] == first["costs"]
    file.write_bytes(whole.replace(b'"costs"', b'"cost"'))
    with pytest.raises(DataError, match="line 1"):
        mismatch.run(config)


def test_the_gain_is_paired_by_seed():
    costs = {"identified": np.array([[10.0, 12.0], [20.0, 22.0]]), "return": np.array([[9.0, 11.0], [18.0, 22.0]])}
    record = LevelRecord("pendulum", 1.0, 3, 1.0, "", "", costs, {}, {})
    found = gain(record, "return")
    assert found.value == pytest.approx(100 * 1.0 / 16.0)  # the seeds gain 1 and 1 on average, of 16
    assert found.low == pytest.approx(found.high)
