"""IBC around a base: what is its own; the rest is in test_every_policy.py and test_energy.py."""

import pytest
import torch
from torch import nn

from difftori.policies.ibc_base import IBCBase, IBCBaseConfig
from difftori.policies.normalized import NormalizedPolicy
from difftori.types import TaskSpec, Window, WindowObs, state_obs
from tests.support.specs import VECTORS, demonstrations, generator, observations, with_base

WAYS = ["derivative-free", "gradient"]


def wrong(obs: WindowObs) -> torch.Tensor:
    """Actions that follow from the observations, the last of them at the edge of the box."""
    seen = next(iter(obs.values())).flatten(1)[:, :2]
    return torch.cat(
        (torch.linspace(0.1, 0.6, 7)[None, :, None] * seen[:, None].tanh(), torch.ones(len(seen), 1, 2)), 1
    )


def policy(spec: TaskSpec = VECTORS, base=wrong, **settings) -> NormalizedPolicy:
    torch.manual_seed(0)
    small = {"preset": "small", "hidden": (64, 64), "num_negatives": 32, "samples": 128}
    return NormalizedPolicy(IBCBase(IBCBaseConfig.model_validate({**small, **settings}), spec), base)


class Bowl(nn.Module):
    """A score with its peak so far from the base, where candidates are compared with the first of them."""

    def __init__(self, away: float):
        super().__init__()
        self.away, self.seen = away, []
        self.base: torch.Tensor | None = None

    def in_parts(self, features, candidates, *, at_once):
        self.seen.append(candidates)
        self.base = candidates[0]
        return -300 * (candidates - self.base - self.away).square().sum(-1)

    def slopes(self, features, candidates):
        self.base = candidates[0] if self.base is None else self.base
        return 10 * (self.base + self.away - candidates)


@pytest.mark.parametrize("inference", WAYS)
def test_a_flat_energy_returns_the_base(inference):
    learner, obs = policy(inference=inference), observations(VECTORS, 9)
    nn.init.zeros_(learner.policy.score.last.weight)
    assert torch.equal(learner.act(obs, generator=generator()), wrong(obs))
    # An action that is not looked at makes no difference either, but for rounding.
    learner = policy(inference=inference)
    with torch.no_grad():
        learner.policy.score.first.weight[:, learner.policy.score.features :] = 0
    assert torch.equal(learner.act(obs, generator=generator()), wrong(obs))


@pytest.mark.parametrize("inference", WAYS)
def test_a_base_of_least_energy_is_returned(inference):
    learner, obs = policy(inference=inference), observations(VECTORS, 9)
    learner.policy.score = Bowl(0.0)
    assert torch.equal(learner.act(obs, generator=generator()), wrong(obs))


@pytest.mark.parametrize("inference", WAYS)
def test_less_energy_nearby_is_found_and_only_executed_actions_change(inference):
    learner, obs = policy(inference=inference), observations(VECTORS, 9)
    learner.policy.score = Bowl(0.04)
    base = wrong(obs)
    moved = learner.act(obs, generator=generator()) - base
    assert (moved[:, VECTORS.present].mean((1, 2)) > 0.01).all()
    assert (moved[:, :1] == 0).all()
    assert (moved[:, 5:] == 0).all()


@pytest.mark.parametrize("inference", WAYS)
def test_a_score_that_is_not_finite_returns_the_base(inference):
    learner, obs = policy(inference=inference), observations(VECTORS, 9)
    nn.init.constant_(learner.policy.score.last.bias, float("nan"))
    assert torch.equal(learner.act(obs, generator=generator()), wrong(obs))


@pytest.mark.parametrize("inference", WAYS)
def test_a_small_advantage_may_be_too_small(inference):
    learner, obs = policy(inference=inference, advantage=10.0), observations(VECTORS, 9)
    learner.policy.score = Bowl(0.04)
    assert torch.equal(learner.act(obs, generator=generator()), wrong(obs))


@pytest.mark.parametrize("inference", WAYS)
def test_the_base_is_always_among_the_candidates_which_lie_in_the_box(inference):
    learner, obs = policy(inference=inference, search_std=1.0), observations(VECTORS, 9)
    learner.policy.score = Bowl(0.4)
    learner.act(obs, generator=generator())
    assert learner.policy.score.seen
    for candidates in learner.policy.score.seen:
        assert torch.equal(candidates[0], learner.policy._executed(wrong(obs)[:, VECTORS.present]))
        assert candidates.abs().max() <= 1


def test_negatives_lie_around_the_base_around_the_expert_and_anywhere():
    learner = policy(num_negatives=401, negative_std=0.1)
    base, expert = torch.full((6, 8), 0.9), torch.full((6, 8), -0.5)
    negatives = learner.policy._negatives(base, expert, generator())
    assert negatives.shape == (400, 6, 8)
    assert negatives.abs().max() <= 1
    assert (negatives[:200] - base).abs().mean() < 0.1
    assert (negatives[200:300] - expert).abs().mean() < 0.1
    assert negatives[300:].mean().abs() < 0.05
    assert negatives[300:].std() > 0.5


def test_it_mends_a_base_that_errs():
    """The expert is a smooth function of the state, and the base another one nearby."""
    spec = TaskSpec.rows(obs_dim=2, action_dim=2, horizon=2, low=(-1.0, -1.0), high=(1.0, 1.0))

    def expert(obs):
        return 0.6 * torch.sin(torch.cat((obs["state"], obs["state"].flip(-1)), 1))

    def base(obs):
        return expert(obs) + 0.15 * torch.cos(3 * torch.cat((obs["state"], obs["state"]), 1))

    learner, draw = policy(spec, base, dropout=0.0), generator(1)
    optimiser = torch.optim.Adam(learner.policy.parameters(), lr=3e-3)
    for _ in range(200):
        obs = state_obs(2 * torch.rand(64, 2, generator=draw) - 1)
        optimiser.zero_grad()
        batch = Window(obs, expert(obs), torch.arange(64), base(obs).unsqueeze(1))
        learner.loss(batch, generator=draw)[0].backward()
        optimiser.step()
    obs = state_obs(2 * torch.rand(100, 2, generator=draw) - 1)
    error = (base(obs) - expert(obs)).square().mean()
    for inference in WAYS:
        refined = policy(spec, base, dropout=0.0, inference=inference)
        refined.policy.load_state_dict(learner.policy.state_dict())
        left = (refined.act(obs, generator=draw) - expert(obs)).square().mean()
        assert left < 0.3 * error, inference


def test_nothing_is_dropped_when_it_acts():
    obs = observations(VECTORS, 3)
    acted = [policy(dropout=rate).act(obs, generator=generator()) for rate in (0.0, 0.9)]
    assert torch.equal(*acted)
    metrics = policy().loss(with_base(policy(), demonstrations(VECTORS, 3)), generator=generator())[1]
    assert set(metrics) == {"info_nce", "expert_first", "expert_over_base"}
