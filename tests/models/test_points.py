"""Pooling over points: the plain computation's values and derivatives, also with equal points and dead features."""

import pytest
import torch
from torch import nn

from difftori.models import points
from difftori.models.points import pooled


def layers(dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU())
    with torch.no_grad():
        made[-2].bias[3] = -100.0  # a feature that is zero at every point
    return made.to(dtype)


def clouds(dtype=torch.float64) -> torch.Tensor:
    made = torch.randn(5, 2, 40, 3, generator=torch.Generator().manual_seed(1), dtype=dtype)
    made[:, :, 20:] = made[:, :, :1]  # clouds are filled up with copies of a point
    return made


def test_values_and_gradients_are_those_of_the_plain_computation(monkeypatch):
    net, seen = layers(), clouds().requires_grad_()
    calls = []
    monkeypatch.setattr(points, "_critical", lambda *given, run=points._critical: calls.append(1) or run(*given))
    found, plain = pooled(net, seen), net(seen).amax(-2)
    assert calls, "the short way is taken"
    assert torch.equal(found, plain)
    assert (found[..., 3] == 0).all()
    inputs = (*net.parameters(), seen)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=found.dtype)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), inputs, create_graph=True) for y in (found, plain))
    for a, b in zip(ours[:-1], theirs[:-1], strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    # Equal points: the sum over them is what the plain computation spreads.
    total = [grad[:, :, :1].sum(2) + grad[:, :, 20:].sum(2) for grad in (ours[-1], theirs[-1])]
    assert torch.allclose(*total)
    assert torch.allclose(ours[-1][:, :, 1:20], theirs[-1][:, :, 1:20])
    second, other = (
        torch.autograd.grad(sum((g**2).sum() for g in grads[:-1]), net[0].weight)[0] for grads in (ours, theirs)
    )
    assert torch.allclose(second, other)


def test_without_a_graph_the_values_are_the_same_for_any_number_of_clouds():
    net, seen = layers(torch.float32), clouds(torch.float32)
    with torch.no_grad():
        found = pooled(net, seen)
        assert torch.equal(found, net(seen).amax(-2))
        assert torch.equal(pooled(net, seen[:3]), found[:3])
        assert torch.equal(pooled(net, seen[0, 0]), found[0, 0])
    net.requires_grad_(False)
    assert not pooled(net, seen).requires_grad


@pytest.mark.parametrize("place", [(0, 0, 0, 0), (4, 1, 39, 2)])
def test_nan_does_not_pass(place):
    seen = clouds()
    seen[place] = torch.nan
    assert pooled(layers(), seen)[place[0], place[1]].isnan().any()


def test_no_clouds_and_functions_of_torch_func():
    net, seen = layers(), clouds()
    assert pooled(net, seen[:0]).shape == (0, 2, 16)
    assert torch.allclose(torch.func.vmap(lambda one: pooled(net, one))(seen), net(seen).amax(-2))
