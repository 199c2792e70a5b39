"""What refiners share: the frozen base, and how often it is asked."""

import copy

import pytest
import torch

from difftori.errors import ConfigError, NonFiniteError, ShapeError
from difftori.policies.bc import BC, BCConfig
from difftori.policies.refiner import FunctionBase
from difftori.policies.residual import Residual, ResidualConfig
from difftori.types import TaskSpec, Window
from tests.support.specs import CLOUDS, SCALE, SHIFT, VECTORS, WITHIN, demonstrations, generator, in_other_units


class Counting:
    """A base whose k-th call returns k everywhere, and draws once."""

    def __init__(self, horizon: int = 8):
        self.calls, self.horizon = 0, horizon

    def act(self, obs, *, generator):
        self.calls += 1
        torch.rand(1, generator=generator)
        return torch.full((len(obs["state"]), self.horizon, 2), float(self.calls))


class Set:
    """Ten windows, four at a time."""

    whole = demonstrations(VECTORS, 10)

    def __len__(self):
        return 10

    def batches(self, batch_size, generator):
        return self.in_order(batch_size)

    def in_order(self, batch_size=4):
        for index in torch.arange(10).split(batch_size):
            obs = {name: values[index] for name, values in self.whole.obs.items()}
            yield Window(obs, self.whole.actions[index], index)


def refiner(base, choice="nearest") -> Residual:
    return Residual(ResidualConfig(base_samples=3, base_choice=choice), VECTORS, base)


def test_prepared_samples_are_looked_up_and_all_of_them_are_used():
    base = Counting()
    policy = refiner(base, "drawn")
    policy.prepare(Set(), at_most=1000, generator=generator())
    assert base.calls == 9, "three batches, three times"
    first = next(Set().in_order())
    drawn = {float(policy.base_plans(first, generator=generator(seed))[0, 0, 0]) for seed in range(40)}
    assert drawn == {1.0, 2.0, 3.0}
    last = list(Set().in_order())[-1]
    drawn = {float(policy.base_plans(last, generator=generator(seed))[0, 0, 0]) for seed in range(40)}
    assert drawn == {7.0, 8.0, 9.0}
    assert base.calls == 9


def test_where_training_is_short_the_base_is_asked_in_every_batch():
    base = Counting()
    policy = refiner(base, "drawn")
    policy.prepare(Set(), at_most=29, generator=generator())
    assert base.calls == 0
    batch = next(Set().in_order())
    assert [float(policy.base_plans(batch, generator=generator())[0, 0, 0]) for _ in range(3)] == [1.0, 2.0, 3.0]


def test_a_base_that_does_not_draw_is_asked_once():
    plain = BC(BCConfig(hidden=(8,)), VECTORS)
    policy = refiner(plain)
    assert not policy.draws
    policy.prepare(Set(), at_most=10, generator=generator())
    batch = next(Set().in_order())
    assert torch.equal(policy.base_plans(batch, generator=generator()), plain.act(batch.obs, generator=generator()))
    assert refiner(FunctionBase(lambda obs: obs["state"])).draws, "nobody knows"


def test_plans_of_another_shape_are_named():
    words = r"it returned \(4, 5, 2\) for 4 windows; it must be \(B H A\) = \(4, 8, 2\)"
    policy = refiner(Counting(horizon=5))
    with pytest.raises(ShapeError, match=words):
        policy.prepare(Set(), at_most=1000, generator=generator())
    with pytest.raises(ShapeError, match=words):
        policy.base_plans(next(Set().in_order()), generator=generator())


def test_a_base_of_another_type_is_cast_and_nan_is_named():
    def numbers(obs):
        return torch.zeros(len(obs["state"]), 8, 2, dtype=torch.float64)

    batch = next(Set().in_order())
    policy = refiner(FunctionBase(numbers))
    assert policy.act(batch.obs, generator=generator()).dtype == torch.float32
    policy.loss(batch, generator=generator())[0].backward()

    def broken(obs):
        plans = numbers(obs)
        plans[2, 0, 0] = float("nan")
        return plans

    for call in (refiner(FunctionBase(broken)).act, refiner(FunctionBase(broken)).base_act):
        with pytest.raises(NonFiniteError, match=r"base: NaN or Inf in what it would do in rows \[2\] of 4"):
            call(batch.obs, generator=generator())


def test_copies_share_the_base():
    policy = refiner(Counting())
    assert copy.deepcopy(policy).base is policy.base


def test_a_base_is_frozen_and_no_part_of_its_refiner():
    base = BC(BCConfig(hidden=(8,)), VECTORS)
    policy = refiner(base)
    batch = next(Set().in_order())
    policy.loss(batch, generator=generator())[0].backward()
    assert all(parameter.grad is None for parameter in base.parameters())
    own = {id(parameter) for parameter in policy.parameters()}
    assert not own & {id(parameter) for parameter in base.parameters()}
    assert not any("base" in name for name in policy.state_dict())


def test_a_base_of_another_task_is_refused():
    with pytest.raises(ConfigError, match="it sees and returns .* the task gives"):
        Residual(ResidualConfig(), VECTORS, BC(BCConfig(hidden=(8,)), CLOUDS))
    other = TaskSpec.rows(3, 2, 8, (-1.0, -1.0), (1.0, 1.0))
    with pytest.raises(ConfigError, match="leave out what differs"):
        Residual(ResidualConfig(), VECTORS, BC(BCConfig(hidden=(8,)), other))


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_the_residual_learns_from_a_noisy_base_in_half_widths_of_the_data(sigma, monkeypatch):
    """Inside the data's range; it acts without."""
    spec, scale, shift = in_other_units(WITHIN["vectors"]), torch.tensor(SCALE), torch.tensor(SHIFT)
    middle = FunctionBase(lambda obs: torch.zeros(len(obs["state"]), 8, 2) * scale + shift)
    policy = Residual(ResidualConfig(base_noise=sigma), spec, middle)
    starts, predict = [], policy.predict
    monkeypatch.setattr(policy, "predict", lambda *args: (starts.append(args[1]), predict(*args))[1])
    batch = demonstrations(VECTORS, 500)
    policy.loss(batch, generator=generator())
    policy.act(batch.obs, generator=generator())
    trained, acted = starts
    assert trained.std().item() == pytest.approx(sigma, rel=0.05, abs=1e-6)
    assert trained.abs().max() <= 1
    assert acted.abs().max() < 1e-6


class Whole(Set):
    """The same in one batch."""

    def in_order(self, batch_size=10):
        return super().in_order(batch_size)


def test_the_nearest_draw_keeps_to_the_experts_way():
    """Of the prepared draws, and of fresh ones where nothing is prepared; each dimension counts by its spread."""
    batch = next(Set().in_order(10))
    apart = torch.tensor([1.0, 100.0])

    def draw(obs):
        draw.calls += 1
        return batch.actions + (0.01 if draw.calls % 3 == 0 else 1.0) * apart

    draw.calls = 0
    policy = refiner(FunctionBase(draw))
    policy.prepare(Whole(), at_most=1000, generator=generator())
    assert policy.prepared.shape[:2] == (10, 3)
    assert policy.base_varies
    for prepared in (policy.prepared, None):
        policy.prepared = prepared
        away = policy.base_plans(batch, generator=generator()) - batch.actions
        assert torch.allclose(away, 0.01 * apart.expand_as(away), atol=1e-5)


def test_a_function_that_always_answers_the_same_is_found_out():
    policy = refiner(FunctionBase(lambda obs: torch.zeros(len(obs["state"]), 8, 2)))
    assert policy.base_varies, "nobody knows yet"
    policy.prepare(Set(), at_most=1000, generator=generator())
    assert not policy.base_varies


def test_a_dimension_that_never_moves_does_not_choose_the_draw():
    still = demonstrations(VECTORS, 10)
    actions = still.actions.clone()
    actions[..., 1] = -1.0
    policy = Residual(
        ResidualConfig(base_samples=2), VECTORS, FunctionBase(lambda obs: torch.zeros(len(obs["state"]), 8, 2))
    )
    near, far = actions + torch.tensor([0.01, 0.001]), actions + torch.tensor([0.5, 0.0])
    policy.prepared = torch.stack([far, near], 1)
    chosen = policy.base_plans(Window(still.obs, actions, torch.arange(10)), generator=generator())
    assert torch.allclose(chosen, near)
