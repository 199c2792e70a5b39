"""Figure 4: landscapes under two latent samples, and the iterates in them."""

from pathlib import Path

import pytest
import torch

from difftori.errors import ConfigError
from difftori.experiments.paper import figure4
from difftori.experiments.paper.figure4 import draw, landscapes
from difftori.policies.difftori import DiffTORI, DiffTORIConfig
from difftori.policies.normalized import NormalizedPolicy
from tests.support.specs import VECTORS, observations


def refiner(**settings) -> NormalizedPolicy:
    torch.manual_seed(0)
    config = DiffTORIConfig.model_validate(
        {"hidden": (16,), "latent_dim": 8, "cvae_dim": 4, "step_size": 0.1, **settings}
    )
    policy = DiffTORI(config, VECTORS)
    with torch.no_grad():
        policy.score[-1].weight.mul_(20.0)
    return NormalizedPolicy(policy, lambda obs: torch.full((len(obs["state"]), 8, 2), 0.7))


@pytest.mark.parametrize("settings", [{}, {"anchor": "base", "decision": "step"}])
def test_landscapes_are_the_objective_and_paths_go_up_in_them(settings):
    policy = refiner(**settings)
    obs = observations(VECTORS, 1)
    first, second = landscapes(policy, obs, seed=3)
    for panel in (first, second):
        x, values = panel.axis, panel.values
        assert torch.equal(panel.path[0], torch.zeros(2)), "both begin at the start, which is the origin"
        assert len(panel.path) == policy.policy.settings.max_steps + 1
        assert panel.rise > 0
        assert values.isfinite().any()

        # the grid's point nearest to the end lies about as high above the middle as the solve rose
        middle = values[30, 30]
        end = values[(x - panel.path[-1, 1]).abs().argmin(), (x - panel.path[-1, 0]).abs().argmin()]
        assert (end - middle).item() == pytest.approx(panel.rise, rel=0.3)
    assert not torch.allclose(first.values.nan_to_num(), second.values.nan_to_num())
    again, _ = landscapes(policy, obs, seed=3)
    assert torch.equal(again.values.nan_to_num(), first.values.nan_to_num())


def test_it_can_be_drawn():
    figure = draw(landscapes(refiner(), observations(VECTORS, 1), seed=0), "a caption")
    assert len(figure.axes) == 4


def test_another_policys_run_is_refused(monkeypatch):
    monkeypatch.setattr(figure4, "load_policy", lambda run, which: (refiner(cvae_dim=0), None))
    with pytest.raises(ConfigError, match="is not a run of difftori-il with --cvae-dim"):
        figure4.run(figure4.Config(run=Path("x")))
