import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from difftori.data.normalize import (
    Affine,
    Normalizer,
    fit_normalizer,
    identity,
    mean_std,
    measure,
    measured_spec,
    min_max,
    pixels,
)
from difftori.data.trajectories import Trajectories
from difftori.data.windows import Windows
from difftori.errors import DataError, ShapeError


def demos(seed=0, steps=40):
    rng = np.random.default_rng(seed)
    state = rng.normal(size=(steps, 3)) * [1, 100, 0.01] + [0, 1000, 5]
    state[:, 2] = 7.0
    obs = {
        "state": state,
        "keys": rng.normal(size=(steps, 2)),
        "point_cloud": rng.normal(size=(steps, 6, 3)) * [1, 2, 3],
        "image": rng.integers(0, 256, (steps, 4, 4, 3), dtype=np.uint8),
    }
    return Trajectories.of(obs, rng.uniform(-2, 5, size=(steps, 2)), [10, 25, steps])


def test_min_max_reaches_both_ends_and_leaves_constants_at_zero():
    train = demos()
    window = fit_normalizer(train)(Windows(train, n_obs_steps=1, horizon=1, n_action_steps=1).batch(torch.arange(40)))
    state = window.obs["state"].flatten(0, 1)
    assert torch.allclose(state.amin(0), torch.tensor([-1.0, -1, 0]), atol=1e-5)
    assert torch.allclose(state.amax(0), torch.tensor([1.0, 1, 0]), atol=1e-5)
    assert torch.allclose(window.actions.flatten(0, 1).amin(0), -torch.ones(2), atol=1e-6)


@pytest.mark.parametrize("rule", [min_max, mean_std])
def test_an_action_dimension_that_is_constant_in_the_data_stays_constant(rule):
    actions = np.column_stack([np.linspace(-300, 400, 9), np.full(9, 0.01)])
    fitted = fit_normalizer(Trajectories.of({"state": np.zeros((9, 1))}, actions, [9]), actions=rule)
    returned = fitted.denormalize_actions(torch.tensor([[0.5, -1.0], [0.5, 0.7]]))
    assert returned[:, 1].tolist() == [np.float32(0.01)] * 2
    assert returned[0, 0] == returned[1, 0] != 0
    assert fitted.denormalize_actions(torch.tensor([[0.5, torch.nan]])).isnan().tolist() == [[False, True]]


def test_a_cloud_shares_its_statistics_over_points():
    train = demos()
    affine = fit_normalizer(train).obs["obs_point_cloud"]
    assert affine.scale.shape == (3,)
    cloud = train.obs["point_cloud"].flatten(0, 1)
    assert torch.allclose(affine.scale, (cloud.amax(0) - cloud.amin(0)) / 2)


def test_images_are_divided_by_255_unless_told_otherwise():
    train = demos()
    normalised = fit_normalizer(train).normalize_obs({"image": train.obs["image"]})["image"]
    assert torch.equal(normalised, train.obs["image"].float() / 255)
    other = fit_normalizer(train, entries={"image": min_max}).normalize_obs({"image": train.obs["image"]})["image"]
    assert other.amin() == -1


def test_mean_std_and_identity():
    train = demos()
    fitted = fit_normalizer(train, obs=mean_std, actions=identity, entries={"keys": identity})
    state = fitted.normalize_obs({"state": train.obs["state"]})["state"].double()
    assert torch.allclose(state.mean(0), torch.zeros(3).double(), atol=1e-4)
    assert torch.allclose(state.std(0, correction=0), torch.tensor([1.0, 1, 0]).double(), atol=1e-4)
    assert torch.equal(fitted.normalize_actions(train.actions), train.actions)
    assert torch.equal(fitted.normalize_obs({"keys": train.obs["keys"]})["keys"], train.obs["keys"])


@given(rule=st.sampled_from([min_max, mean_std, identity]), seed=st.integers(0, 99), scale=st.floats(1e-3, 1e4))
def test_actions_come_back(rule, seed, scale):
    rng = np.random.default_rng(seed)
    actions = (rng.normal(size=(9, 4)) * scale + rng.normal(size=4) * [0, 1, 10, 100]) * [1, 1, 1, 0] + [0, 0, 0, 5]
    fitted = fit_normalizer(Trajectories.of({"state": np.zeros((9, 1))}, actions, [9]), actions=rule)
    plans = torch.tensor(actions, dtype=torch.float32)[:, None]
    back = fitted.denormalize_actions(fitted.normalize_actions(plans))
    assert torch.allclose(back, plans, rtol=1e-5, atol=1e-5 * plans.abs().max().item())


@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=6), offset=st.sampled_from([0.0, 1e6]))
def test_moments_in_blocks_are_those_of_the_whole(sizes, offset):
    values = torch.tensor(np.random.default_rng(sum(sizes)).normal(size=(sum(sizes), 2)) + offset)
    moments = measure(values.split(sizes))
    for name, expected in {
        "low": values.amin(0),
        "high": values.amax(0),
        "mean": values.mean(0),
        "std": values.std(0, correction=0),
    }.items():
        torch.testing.assert_close(
            torch.tensor(getattr(moments, name), dtype=torch.float64), expected, rtol=1e-9, atol=1e-9
        )


def test_only_the_training_part_counts():
    whole = demos()
    train, validation = whole.select([0, 1]), whole.select([2])
    validation.obs["state"][25:] += 1e6
    fitted = fit_normalizer(train)
    alone = fit_normalizer(Trajectories.join([train]))
    assert all(
        torch.equal(a, b) for a, b in zip(fitted.state_dict().values(), alone.state_dict().values(), strict=True)
    )
    assert fitted.obs["obs_state"].shift.abs().max() < 2000


def test_a_saved_state_loads_into_a_fresh_one(tmp_path):
    fitted = fit_normalizer(demos())
    torch.save(fitted.state_dict(), tmp_path / "n.pt")
    sizes = {"state": 3, "keys": 2, "point_cloud": 3}
    blank = {name: Affine(torch.zeros(size), torch.ones(size)) for name, size in sizes.items()}
    fresh = Normalizer(blank | {"image": pixels()}, Affine(torch.zeros(2), torch.ones(2)))
    fresh.load_state_dict(torch.load(tmp_path / "n.pt", weights_only=True))
    window = Windows(demos(), n_obs_steps=2, horizon=4, n_action_steps=1).sample(8, torch.Generator())
    assert torch.equal(fresh(window).actions, fitted(window).actions)
    assert torch.equal(fresh(window).obs["state"], fitted(window).obs["state"])
    assert not list(fitted.parameters())


def test_gradients_pass_through_the_way_back():
    plans = torch.zeros(1, 3, 2, requires_grad=True)
    fit_normalizer(demos()).denormalize_actions(plans).sum().backward()
    assert plans.grad is not None
    assert (plans.grad > 0).all()


def test_what_was_not_fitted_is_refused():
    fitted = fit_normalizer(demos())
    with pytest.raises(DataError, match="'depth' was not in the training data, which had state, keys"):
        fitted.normalize_obs({"depth": torch.zeros(1, 3)})
    with pytest.raises(DataError, match="no entry 'depth'"):
        fit_normalizer(demos(), entries={"depth": min_max})
    with pytest.raises(ShapeError, match=r"values of shape \(1, 5\).*made for 2 dimensions"):
        fitted.normalize_actions(torch.zeros(1, 5))
    with pytest.raises(ShapeError, match="made for 2 dimensions"):
        fitted.denormalize_actions(torch.zeros(5))
    with pytest.raises(DataError, match="no data"):
        measure([])


def test_actions_of_a_range_that_is_not_learned_are_warned_of(caplog):
    actions = np.linspace([0, 0, 0], [1, 4e-5, 0], 40)
    spec = measured_spec(
        Trajectories.of({"state": np.zeros((40, 1))}, actions, [40]),
        **{"low": (0.0,) * 3, "high": (1.0,) * 3, "n_obs_steps": 1, "horizon": 1, "n_action_steps": 1},
    )
    assert Normalizer.of(spec).actions.scale.tolist() == [0.5, 1.0, 1.0]
    assert "below 0.0001 in dimension 1 (4e-05). It is treated as constant" in caplog.text


def test_depth_images_are_mapped_to_the_range_from_0_to_1():
    depth = np.random.default_rng(0).uniform(0.4, 3, size=(40, 4, 4, 1))
    train = Trajectories.of({"depth": depth}, np.zeros((40, 1)), [40])
    spec = measured_spec(train, low=(0.0,), high=(1.0,), n_obs_steps=1, horizon=1, n_action_steps=1)
    for normalizer in (fit_normalizer(train), Normalizer.of(spec)):
        values = normalizer.normalize_obs(train.obs)["depth"]
        assert (values.min().item(), values.max().item()) == pytest.approx((0, 1), abs=1e-6)
