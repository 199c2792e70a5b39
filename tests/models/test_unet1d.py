"""The U-Net over the steps of a plan."""

import pytest
import torch

from difftori.errors import ShapeError
from difftori.models.unet1d import UNet1D, step_features


def network(**settings) -> UNet1D:
    torch.manual_seed(0)
    return UNet1D(2, 5, **{"dims": (16, 24, 32), "step_width": 8, **settings})


def inputs(horizon: int, rows: int = 3):
    draw = torch.Generator().manual_seed(1)
    return (
        torch.randn(rows, horizon, 2, generator=draw),
        torch.randint(100, (rows,), generator=draw),
        torch.randn(rows, 5, generator=draw),
    )


@pytest.mark.parametrize("horizon", [1, 2, 3, 4, 6, 7, 16, 17])
@pytest.mark.parametrize("settings", [{}, {"blocks": 1}, {"dims": (16,)}, {"kernel": 3}])
def test_any_horizon_keeps_its_length_and_every_step_gets_a_gradient(horizon, settings):
    actions, step, features = inputs(horizon)
    actions.requires_grad_()
    found = network(**settings)(actions, step, features)
    assert found.shape == actions.shape
    found.square().sum().backward()
    assert actions.grad is not None
    assert (actions.grad.abs().sum((0, 2)) > 0).all()


def test_rows_do_not_interact():
    unet, (actions, step, features) = network(), inputs(6)
    whole = unet(actions, step, features)
    single = torch.cat([unet(actions[i : i + 1], step[i : i + 1], features[i : i + 1]) for i in range(3)])
    assert torch.allclose(whole, single, atol=1e-5)


def test_step_and_features_change_what_is_said():
    unet, (actions, step, features) = network(), inputs(6)
    before = unet(actions, step, features)
    assert not torch.allclose(unet(actions, (step + 50) % 100, features), before, atol=1e-3)
    assert not torch.allclose(unet(actions, step, features + 1), before, atol=1e-3)


def test_its_size_is_that_of_diffusion_policy():
    """Counted in a network written down from the source for this purpose; with equal weights it said the same, to 1e-6."""
    with torch.device("meta"):
        unet = UNet1D(2, 10, dims=(256, 512, 1024), step_width=256)
    assert sum(p.numel() for p in unet.parameters()) == 65_353_218


def test_step_features_are_sines_and_cosines():
    found = step_features(torch.tensor([0, 3]), 4)
    expected = torch.tensor([[0, 0, 1, 1], [3.0, 3e-4, 3.0, 3e-4]])
    expected[1] = torch.cat((expected[1, :2].sin(), expected[1, 2:].cos()))
    assert torch.allclose(found, expected, atol=1e-6)
    assert step_features(torch.tensor([3]), 2).shape == (1, 2)


@pytest.mark.parametrize(
    "settings", [{"dims": ()}, {"dims": (16, 20)}, {"step_width": 7}, {"kernel": 4}, {"blocks": 0}]
)
def test_sizes_that_make_no_network_are_refused(settings):
    with pytest.raises(ShapeError, match="U-Net"):
        network(**settings)
