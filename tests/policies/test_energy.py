"""Energies of actions, their learning, and the searches for the least of them."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from difftori.policies._energy import (
    DerivativeFree,
    EnergyNetwork,
    Langevin,
    _resampled,
    best,
    info_nce,
    uniform,
)
from tests.support.specs import generator

LOW, HIGH = torch.tensor([-1.0, -0.5]), torch.tensor([1.0, 0.5])


def score(dropout: float = 0.0) -> EnergyNetwork:
    return EnergyNetwork(3, 2, (16, 16), dropout).double()


def inputs(candidates: int = 6, rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    draw = generator(1)
    return (
        torch.randn(rows, 3, generator=draw, dtype=torch.float64),
        torch.randn(candidates, rows, 2, generator=draw, dtype=torch.float64),
    )


def test_the_score_is_an_mlp_of_features_beside_actions():
    network = score()
    features, candidates = inputs()
    layers = [network.first, nn.ReLU(), network.middle[0], nn.ReLU(), network.last]
    joint = torch.cat((features.expand(6, -1, -1), candidates), -1)
    assert torch.allclose(network(features, candidates), nn.Sequential(*layers)(joint).squeeze(-1))


@pytest.mark.parametrize("at_once", [1, 7, 8, 24])
def test_parts_give_the_values_and_gradients_of_the_whole(at_once):
    network = score(dropout=0.5)
    features, candidates = inputs()
    features.requires_grad_()
    whole = network(features, candidates)
    parts = network.in_parts(features, candidates, at_once=at_once)
    assert torch.allclose(whole, parts)
    wanted, found = (
        torch.autograd.grad(info_nce(values)[0], (features, *network.parameters()), allow_unused=True)
        for values in (whole, parts)
    )
    for one, other in zip(wanted, found, strict=True):
        assert one is other is None or torch.allclose(one, other)


def test_parts_drop_the_same_when_they_are_computed_again():
    """The gradient is that of what was computed: against a difference of the loss along one direction."""
    network = score(dropout=0.3)
    features, candidates = inputs()
    weight = network.middle[0].weight
    direction = torch.randn(weight.shape, generator=generator(5), dtype=torch.float64)

    def loss(step: float) -> torch.Tensor:
        with torch.no_grad():
            weight.add_(step * direction)
        found = network.in_parts(features, candidates, at_once=8, generator=generator(2)).square().mean()
        with torch.no_grad():
            weight.sub_(step * direction)
        return found

    (gradient,) = torch.autograd.grad(loss(0.0), weight)
    difference = (loss(1e-6) - loss(-1e-6)) / 2e-6
    assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=1e-4)


def test_dropout_keeps_the_mean_and_draws_from_the_generator():
    network = EnergyNetwork(3, 2, (20_000,), 0.25)
    values = torch.ones(1, 1, 20_000)
    dropped = network._dropped(values, generator())
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(dropped, network._dropped(values, generator()))
    assert network._dropped(values, None) is values


def test_slopes_are_the_derivative_by_the_action_alone():
    network = score()
    features, candidates = inputs()
    with torch.no_grad():
        found = network.slopes(features, candidates, at_once=7)
        step = torch.tensor([1e-6, 0.0], dtype=torch.float64)
        difference = (network(features, candidates + step) - network(features, candidates - step)) / 2e-6
    assert torch.allclose(found[..., 0], difference, atol=1e-6)
    assert all(value.grad is None for value in network.parameters())


def test_steepness_counts_what_is_beyond_the_limit():
    network = score()
    features, candidates = inputs()
    steepest = network.slopes(features, candidates).abs().amax(-1)
    assert network.steepness(features, candidates, limit=steepest.max().item()).item() == pytest.approx(0.0, abs=1e-12)
    found = network.steepness(features, candidates, limit=0.0)
    assert found.item() == pytest.approx(steepest.square().mean().item())
    found.backward()
    assert network.middle[0].weight.grad.abs().sum() > 0


def test_info_nce_is_the_cross_entropy_of_the_first():
    scores = torch.tensor([[2.0, 0.0], [1.0, 3.0], [0.0, 1.0]])
    loss, found = info_nce(scores)
    assert loss.item() == pytest.approx(F.cross_entropy(scores.T, torch.zeros(2, dtype=torch.long)).item())
    assert found == 0.5


def test_the_best_is_finite_where_anything_is():
    candidates = torch.arange(6.0).reshape(3, 2, 1)
    scores = torch.tensor([[math.nan, math.nan], [1.0, math.inf], [0.0, math.nan]])
    assert best(candidates, scores).flatten().tolist() == [2.0, 1.0]


def test_candidates_are_drawn_again_by_their_weight():
    candidates = torch.arange(3.0)[:, None, None].expand(3, 2, 1).repeat_interleave(2000, 0)
    weights = torch.tensor([[0.2, 0.3, 0.5], [0.0, 1.0, 0.0]]).T.repeat_interleave(2000, 0)
    drawn = _resampled(candidates, weights.log(), generator()).squeeze(-1)
    shares = [(drawn == value).float().mean(0).tolist() for value in range(3)]
    assert torch.allclose(torch.tensor(shares), torch.tensor([[0.2, 0.0], [0.3, 1.0], [0.5, 0.0]]), atol=0.03)


def peak(candidates: torch.Tensor) -> torch.Tensor:
    """A narrow peak at (0.3, −0.2) in each row, on a slope."""
    return -200 * (candidates - torch.tensor([0.3, -0.2])).square().sum(-1)


def test_resampling_finds_a_peak_within_the_bounds():
    seen = []

    def scored(candidates):
        seen.append(candidates)
        return peak(candidates)

    start = uniform(256, 5, LOW, HIGH, generator())
    search = DerivativeFree(steps=5, std=0.03, shrink=0.5)
    end = search.run(scored, start, LOW, HIGH, generator=generator(1), keep=2)
    seen.append(end)
    assert len(seen) == 5
    assert all((values >= LOW).all() and (values <= HIGH).all() for values in seen)
    assert all(torch.equal(values[:2], start[:2]) for values in seen)
    highest = torch.stack([peak(values).amax(0) for values in seen])
    assert (highest.diff(dim=0) >= 0).all(), "the best so far is kept"
    assert torch.allclose(best(end, peak(end)), torch.tensor([0.3, -0.2]), atol=0.01)
    assert (peak(end).amax(0) > peak(start).amax(0)).all()


def test_langevin_steps_gather_at_a_peak_within_the_bounds():
    start = uniform(64, 3, LOW, HIGH, generator())
    slopes = torch.func.grad(lambda values: 0.05 * peak(values).sum())
    end = Langevin(steps=100).run(slopes, start, LOW, HIGH, generator=generator(1))
    assert (end >= LOW).all()
    assert (end <= HIGH).all()
    assert (end.mean((0, 1)) - torch.tensor([0.3, -0.2])).abs().max() < 0.05
    assert end.std(0).mean() > 0.01, "noise"


def test_without_noise_langevin_climbs_and_draws_nothing():
    start = uniform(1, 3, LOW, HIGH, generator())
    slopes = torch.func.grad(lambda values: 0.05 * peak(values).sum())
    draws = generator(1)
    before = draws.get_state()
    end = Langevin(steps=60, noise=0.0).run(slopes, start, LOW, HIGH, generator=draws)
    assert torch.equal(before, draws.get_state())
    assert torch.allclose(end, torch.tensor([0.3, -0.2]), atol=0.01)


def test_no_step_is_longer_than_the_limit():
    start = torch.zeros(1, 1, 2)
    end = Langevin(steps=1, noise=0.0).run(
        lambda values: 1e6 * torch.ones_like(values), start, LOW, HIGH, generator=generator()
    )
    assert torch.allclose(end, torch.full((1, 1, 2), 0.1))
