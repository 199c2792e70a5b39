"""The squashed Gaussian against torch's distributions and against numerical integration."""

import math

import torch
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from difftori.models.actor_critic import TwinCritics, bounded_log_std, make_trunk, squashed_gaussian


def test_the_log_density_is_that_of_torch():
    g = torch.Generator().manual_seed(0)
    mean, log_std, noise = torch.randn(3, 500, 4, generator=g, dtype=torch.float64)
    action, log_prob = squashed_gaussian(mean, log_std, noise)
    reference = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))
    u = mean + log_std.exp() * noise
    inside = (u.abs() < 8).all(-1)  # farther out, atanh of the rounded action is not u any more
    torch.testing.assert_close(action, torch.tanh(u))
    torch.testing.assert_close(log_prob[inside], reference.log_prob(action).sum(-1)[inside], rtol=1e-6, atol=1e-6)


def test_the_density_integrates_to_one_and_the_entropy_is_its_integral():
    u = torch.linspace(-9, 9, 20_001, dtype=torch.float64)[:, None]
    mean, log_std = torch.full_like(u, 0.4), torch.full_like(u, -0.3)
    action, log_prob = squashed_gaussian(mean, log_std, (u - mean) / log_std.exp())
    density = log_prob.exp()
    assert math.isclose(torch.trapezoid(density, action[:, 0]).item(), 1.0, abs_tol=1e-6)
    entropy = torch.trapezoid(-density * log_prob, action[:, 0]).item()
    noise = torch.randn(400_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, sampled = squashed_gaussian(torch.full_like(noise, 0.4), torch.full_like(noise, -0.3), noise)
    assert math.isclose(-sampled.mean().item(), entropy, abs_tol=4 * sampled.std().item() / 400_000**0.5)


def test_the_log_density_is_finite_far_outside_in_single_precision():
    mean = torch.tensor([[-60.0], [60.0]], requires_grad=True)
    action, log_prob = squashed_gaussian(mean, torch.zeros(2, 1), torch.zeros(2, 1))
    assert action.tolist() == [[-1.0], [1.0]]
    log_prob.sum().backward()
    assert log_prob.isfinite().all()
    torch.testing.assert_close(log_prob, torch.full((2,), 120 - math.log(4) - 0.5 * math.log(2 * math.pi)))
    torch.testing.assert_close(mean.grad, torch.tensor([[-2.0], [2.0]]))  # d/du of −log(1 − tanh²(u)) ≈ 2|u|


def test_the_log_standard_deviation_stays_between_its_bounds():
    values = bounded_log_std(torch.tensor([-100.0, 0.0, 100.0]), -5.0, 2.0)
    torch.testing.assert_close(values, torch.tensor([-5.0, -1.5, 2.0]))


def test_the_critics_differ_and_take_any_leading_dimensions():
    critics = TwinCritics(make_trunk(6, 4), 4, 2, 8)
    features, actions = torch.randn(3, 5, 6), torch.rand(3, 5, 2)
    q = critics(features, actions)
    assert q.shape == (2, 3, 5)
    assert not torch.equal(q[0], q[1])
    torch.testing.assert_close(critics(features[1], actions[1]), q[:, 1])
