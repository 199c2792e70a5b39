"""DiffTORI for imitation: what is its own; the rest is in test_every_policy.py."""

import pytest

from difftori.errors import BoxError
from difftori.policies.difftori import DiffTORI, DiffTORIConfig
from difftori.types import TaskSpec


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
