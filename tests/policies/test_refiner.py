"""What refiners share: the frozen base, and how often it is asked."""

from dataclasses import replace

import pytest
import torch

from difftori.errors import ConfigError, NonFiniteError, ShapeError
from difftori.il.base import WithBase, base_actions
from difftori.il.learner import Learner
from difftori.policies.bc import BC, BCConfig
from difftori.policies.normalized import NormalizedPolicy
from difftori.policies.refiner import Refiner
from difftori.policies.residual import Residual, ResidualConfig
from difftori.types import Moments, TaskSpec, Window
from tests.support.specs import (
    CLOUDS,
    SCALE,
    SHIFT,
    VECTORS,
    WITHIN,
    demonstrations,
    generator,
    in_other_units,
    with_base,
)


class Counting:
    """A base whose k-th call returns k / 10 everywhere, and draws once."""

    def __init__(self, horizon: int = 8):
        self.calls, self.horizon = 0, horizon

    def act(self, obs, *, generator):
        self.calls += 1
        torch.rand(1, generator=generator)
        return torch.full((len(obs["state"]), self.horizon, 2), self.calls / 10)


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


def refiner(base, choice="nearest") -> NormalizedPolicy:
    return NormalizedPolicy(Residual(ResidualConfig(base_samples=3, base_choice=choice), VECTORS), base)


def chosen(policy: NormalizedPolicy, batch: Window, seed: int = 0) -> torch.Tensor:
    """The base's actions that training starts from, from the present on."""
    assert isinstance(policy.policy, Refiner)
    return policy.policy.choose_base(policy.normalized(batch), generator(seed))


def test_the_base_is_asked_once_and_all_of_its_samples_are_used():
    base = Counting()
    policy = refiner(base, "drawn")
    windows = WithBase(Set(), base_actions(policy, Set(), generator()))
    assert base.calls == 9, "three batches, three times"
    assert len(windows) == 10
    first, *_, last = windows.in_order(4)
    assert first.base.shape == (4, 3, 8, 2)
    assert first.base[0, :, 0, 0].tolist() == pytest.approx([0.1, 0.2, 0.3])
    for batch, wanted in ((first, {0.1, 0.2, 0.3}), (last, {0.7, 0.8, 0.9})):
        drawn = {round(float(chosen(policy, batch, seed)[0, 0, 0]), 3) for seed in range(40)}
        assert drawn == wanted
    assert base.calls == 9


def test_windows_keep_their_base_in_any_order_and_on_their_way():
    numbers = torch.arange(10.0)[:, None, None, None].expand(10, 2, 8, 2)
    windows = WithBase(Set(), numbers)
    for batch in windows.batches(4, generator()):
        part = batch.rows(torch.tensor([1, 0])).to("cpu")
        assert torch.equal(part.base[:, 1, 3, 0], part.index.float())


def test_a_deterministic_base_is_asked_once():
    plain = NormalizedPolicy(BC(BCConfig(hidden=(8,)), VECTORS))
    policy = refiner(plain)
    assert not policy.stochastic
    actions = base_actions(policy, Set(), generator())
    assert actions.shape == (10, 1, 8, 2)
    assert torch.allclose(actions[:, 0], plain.act(Set.whole.obs, generator=generator()), atol=1e-6)
    assert refiner(lambda obs: obs["state"]).stochastic, "unknown, so assumed"


def test_plans_of_another_shape_are_named():
    words = r"returned actions of shape \(4, 5, 2\) for 4 windows. Fix: return \(B H A\) = \(4, 8, 2\)"
    policy = refiner(Counting(horizon=5))
    with pytest.raises(ShapeError, match=words):
        base_actions(policy, Set(), generator())
    with pytest.raises(ShapeError, match=words):
        policy.act(next(Set().in_order()).obs, generator=generator())


def test_a_base_of_another_type_is_cast_and_nan_is_named():
    def numbers(obs):
        return torch.zeros(len(obs["state"]), 8, 2, dtype=torch.float64)

    batch = next(Set().in_order())
    policy = refiner(numbers)
    assert policy.act(batch.obs, generator=generator()).dtype == torch.float32
    policy.loss(with_base(policy, batch), generator=generator())[0].backward()

    def broken(obs):
        plans = numbers(obs)
        plans[2, 0, 0] = float("nan")
        return plans

    for call in (refiner(broken).act, refiner(broken).base_actions):
        with pytest.raises(NonFiniteError, match=r"base: NaN or Inf in its actions in rows \[2\] of 4"):
            call(batch.obs, generator=generator())


def test_averaged_weights_share_the_base():
    policy = refiner(Counting())
    settings = ResidualConfig(ema=0.9)
    assert Learner(policy, settings).acting.base is policy.base


def test_a_base_is_frozen_and_no_part_of_its_refiner():
    base = BC(BCConfig(hidden=(8,)), VECTORS)
    policy = refiner(NormalizedPolicy(base))
    batch = next(Set().in_order())
    policy.loss(with_base(policy, batch), generator=generator())[0].backward()
    assert all(parameter.grad is None for parameter in base.parameters())
    own = {id(parameter) for parameter in policy.policy.parameters()}
    assert not own & {id(parameter) for parameter in base.parameters()}
    assert not any("base" in name for name in policy.policy.state_dict())


def test_a_base_of_another_task_is_refused():
    with pytest.raises(ConfigError, match="it has .* the task has"):
        refiner(NormalizedPolicy(BC(BCConfig(hidden=(8,)), CLOUDS)))
    other = TaskSpec.rows(3, 2, 8, (-1.0, -1.0), (1.0, 1.0))
    with pytest.raises(ConfigError, match="remove the options that differ"):
        refiner(NormalizedPolicy(BC(BCConfig(hidden=(8,)), other)))


def test_a_plain_policy_takes_no_base():
    with pytest.raises(ConfigError, match="does not use a base policy"):
        NormalizedPolicy(BC(BCConfig(hidden=(8,)), VECTORS), Counting())


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_the_residual_learns_from_a_noisy_base_in_half_widths_of_the_data(sigma, monkeypatch):
    """Inside the data's range; it acts without."""
    spec, scale, shift = in_other_units(WITHIN["vectors"]), torch.tensor(SCALE), torch.tensor(SHIFT)
    residual = Residual(ResidualConfig(base_noise=sigma), spec)
    policy = NormalizedPolicy(residual, lambda obs: torch.zeros(len(obs["state"]), 8, 2) * scale + shift)
    starts, predict = [], residual.predict
    monkeypatch.setattr(residual, "predict", lambda *args: (starts.append(args[1]), predict(*args))[1])
    batch = demonstrations(VECTORS, 500)
    policy.loss(with_base(policy, batch), generator=generator())
    policy.act(batch.obs, generator=generator())
    trained, acted = starts
    assert trained.std().item() == pytest.approx(sigma, rel=0.05, abs=1e-6)
    assert trained.abs().max() <= 1
    assert acted.abs().max() < 1e-6


def test_the_nearest_sample_keeps_to_the_experts_way():
    """Each dimension counts by its spread."""
    whole = Set.whole
    apart = torch.tensor([0.1, 10.0])
    wide = replace(
        VECTORS,
        low=(-200.0,) * 2,
        high=(200.0,) * 2,
        moments=Moments((-1.0, -100.0), (1.0, 100.0), (0.0,) * 2, (1.0,) * 2),
    )
    policy = NormalizedPolicy(Residual(ResidualConfig(base_samples=3), wide), Counting())
    samples = torch.stack([whole.actions + gap * apart for gap in (1.0, -0.9, 0.01)], 1)
    away = chosen(policy, replace(whole, base=samples)) - policy.normalized(whole).actions
    assert torch.allclose(away, torch.full_like(away, 0.001), atol=1e-5)


def test_a_function_that_always_answers_the_same_counts_as_deterministic():
    policy = refiner(lambda obs: torch.zeros(len(obs["state"]), 8, 2))
    assert base_actions(policy, Set(), generator()).shape == (10, 1, 8, 2)


def test_a_dimension_that_never_moves_does_not_choose_the_sample():
    still = demonstrations(VECTORS, 10)
    actions = still.actions.clone()
    actions[..., 1] = -1.0
    near, far = actions + torch.tensor([0.01, 0.001]), actions + torch.tensor([0.5, 0.0])
    policy = refiner(Counting())
    found = chosen(policy, Window(still.obs, actions, torch.arange(10), torch.stack([far, near], 1)))
    assert torch.allclose(found, near[:, 1:].clamp(-1, 1))
