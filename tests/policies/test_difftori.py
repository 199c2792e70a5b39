"""DiffTORI for imitation: what is its own; the rest is in test_every_policy.py."""

import pytest
import torch

from difftori.errors import BoxError
from difftori.policies.difftori import DiffTORI, DiffTORIConfig
from difftori.types import TaskSpec
from tests.policies.specs import SPECS, TINY, demonstrations, generator


def test_a_box_without_bounds_is_refused():
    """Actions are planned in units of the box: an infinite one would make every target 0 or NaN."""
    with pytest.raises(BoxError, match="finite"):
        DiffTORI(
            DiffTORIConfig(preset="pendulum"),
            TaskSpec.rows(obs_dim=2, action_dim=1, horizon=1, low=(-1.0,), high=(float("inf"),)),
        )


def test_the_largest_curvature_is_still_finite():
    policy = DiffTORI(DiffTORIConfig(preset="pendulum", curvature=80.0), TaskSpec.rows(2, 1, 1, (-1.0,), (1.0,)))
    assert policy.raw_curvature.isfinite()


@pytest.mark.parametrize("name", SPECS)
def test_a_prior_sees_what_the_encoder_sees(name):
    """Whatever is shown, clouds and pictures too; vectors alone it sees as they are."""
    torch.manual_seed(0)
    spec = SPECS[name]
    policy = DiffTORI(DiffTORIConfig(init="prior", pictures=TINY), spec)
    batch = demonstrations(spec, 3)
    policy.loss(batch, generator=generator())[0].backward()
    assert policy.prior is not None
    assert all(p.grad is not None for p in policy.prior.parameters())
    assert policy.act(batch.obs, generator=generator()).shape == batch.actions.shape
