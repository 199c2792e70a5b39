"""Behaviour cloning: what is its own."""

from dataclasses import replace

import pytest
import torch

from difftori.errors import BoxError
from difftori.policies.bc import BC, BCConfig
from difftori.policies.normalized import NormalizedPolicy
from difftori.types import Moments, TaskSpec, Window, state_obs

SPEC = TaskSpec.rows(obs_dim=2, action_dim=2, horizon=3, low=(-1.0, 0.0), high=(1.0, 4.0))


def test_a_zeroed_network_acts_in_the_middle_of_the_box():
    policy = BC(BCConfig(hidden=(8,)), SPEC)
    torch.nn.init.zeros_(policy.net[-1].weight)
    torch.nn.init.zeros_(policy.net[-1].bias)
    actions = NormalizedPolicy(policy).act(state_obs(torch.randn(4, 2)), generator=torch.Generator())
    assert torch.equal(actions, torch.tensor([0.0, 2.0]).expand(4, 3, 2))


def test_rounding_does_not_lead_out_of_the_box():
    below, high = torch.rand(2, 200, generator=torch.Generator().manual_seed(0))
    low = below - 1
    spec = TaskSpec.rows(obs_dim=2, action_dim=200, horizon=1, low=tuple(low.tolist()), high=tuple(high.tolist()))
    policy = BC(BCConfig(hidden=()), spec)
    torch.nn.init.constant_(policy.net[-1].bias, 99.0)
    zeros = state_obs(torch.zeros(1, 2))
    raw, actions = policy.predict(zeros)[0, 0], NormalizedPolicy(policy).act(zeros, generator=torch.Generator())
    assert (raw > high).any(), "the case that is guarded against"
    assert (actions[0, 0] <= high).all()
    assert torch.allclose(actions[0, 0], high)


def test_loss_is_the_mean_over_rows_steps_and_dimensions():
    policy = BC(BCConfig(hidden=()), SPEC)
    batch = Window(state_obs(torch.randn(5, 2)), torch.rand(5, 3, 2), torch.arange(5))
    loss, metrics = policy.loss(batch, generator=torch.Generator())
    error = policy.act(batch.obs, generator=torch.Generator()) - batch.actions
    assert loss.item() == pytest.approx(error.square().sum().item() / 30)
    assert metrics["control_mse"] is loss


def test_a_box_without_bounds_is_refused():
    with pytest.raises(BoxError, match="finite"):
        BC(BCConfig(), TaskSpec.rows(obs_dim=2, action_dim=1, horizon=1, low=(-float("inf"),), high=(1.0,)))


def test_errors_in_the_range_of_the_data_weight_small_motions_as_much_as_large_ones():
    moments = Moments((-0.01, 0.0), (0.01, 4.0), (0.0,) * 2, (0.5,) * 2)
    spec = replace(SPEC, moments=moments)
    policy = BC(BCConfig(hidden=(), error_units="range"), spec)
    batch = Window(state_obs(torch.randn(5, 2)), torch.rand(5, 3, 2), torch.arange(5))
    loss, _ = policy.loss(batch, generator=torch.Generator())
    error = policy.act(batch.obs, generator=torch.Generator()) - batch.actions
    assert loss.item() == pytest.approx((error / torch.tensor([0.01, 2.0])).square().mean().item(), rel=1e-5)
