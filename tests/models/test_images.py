"""Images: crops, the network, and their place among the other observations."""

import pytest
import torch

from difftori.errors import ShapeError
from difftori.models.images import ImageEncoder, Images, SpatialSoftmax, cropped, resnet18
from difftori.models.window_encoder import WindowEncoder
from difftori.types import EntrySpec, TaskSpec

SMALL = Images(width=16, keypoints=4)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spec(**entries: EntrySpec) -> TaskSpec:
    return TaskSpec(entries, 1, 2, (-1.0,), (1.0,), n_obs_steps=2)


def test_crops_are_those_of_the_source():
    assert [Images().cropped_side(side) for side in (84, 96, 240)] == [76, 84, 216]
    assert Images(crop=0.5).cropped_side(96) == 48


def test_the_middle_is_seen_without_a_generator():
    images = torch.arange(36.0).reshape(1, 6, 6, 1)
    assert torch.equal(cropped(images, 4, 2), images[:, 1:5, 2:4])
    assert torch.equal(cropped(images, 6, 6), images)


def test_each_image_has_a_crop_of_its_own_and_all_are_met():
    places = torch.arange(36.0).reshape(1, 6, 6, 1).expand(400, -1, -1, 1)
    found = cropped(places, 4, 3, generator())
    first = found[:, 0, 0, 0].long()
    assert torch.equal(found[:, :, :, 0], first[:, None, None] + 6 * torch.arange(4)[:, None] + torch.arange(3.0))
    assert set(first.tolist()) == {6 * row + column for row in range(3) for column in range(4)}
    assert torch.equal(found, cropped(places, 4, 3, generator()))
    assert torch.equal(cropped(places, 6, 6, generator()), places)


def test_the_network_is_resnet18():
    """He et al. (2016): 11.7 million weights, of which the last layer, left out here, has 513,000."""
    network = resnet18(3)
    assert sum(p.numel() for p in network.parameters()) == 11_689_512 - 513_000
    assert network(torch.zeros(1, 3, 84, 84)).shape == (1, 512, 3, 3)


def test_keypoints_are_found_where_they_are():
    layer = SpatialSoftmax(1, 2)
    with torch.no_grad():
        layer.maps.weight.copy_(torch.tensor([50.0, -50.0])[:, None, None, None])
    image = torch.zeros(1, 1, 3, 5)
    image[0, 0, 2, 1], image[0, 0, 0, 4] = 1, -1
    assert torch.allclose(layer(image), torch.tensor([[-0.5, 1.0, 1.0, -1.0]]), atol=1e-4)


def test_images_that_leave_a_single_place_are_refused():
    with pytest.raises(ShapeError, match="33 pixels"):
        ImageEncoder((96, 32, 3), Images(crop=1.0))
    assert ImageEncoder((36, 40, 3), Images(crop=0.92, width=16)).size == (33, 37)


@pytest.mark.parametrize("settings", [{"crop": 0.0}, {"crop": 1.5}, {"width": 24}, {"keypoints": 0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ShapeError, match="images"):
        Images(**settings)


def test_images_stand_among_the_vectors():
    torch.manual_seed(0)
    encoder = WindowEncoder(spec(state=EntrySpec((3,)), view=EntrySpec((40, 37, 3), "uint8")), SMALL)
    obs = {"state": torch.randn(5, 2, 3), "view": torch.rand(5, 2, 40, 37, 3)}
    found = encoder(obs)
    assert found.shape == (5, encoder.width) == (5, 2 * 3 + 2 * 64)
    assert torch.equal(found[:, :6], obs["state"].flatten(1))
    assert torch.equal(encoder(obs), found), "the middle is always the same"
    assert torch.allclose(encoder({k: v[2:3] for k, v in obs.items()}), found[2:3], atol=1e-5)
    first, second = encoder(obs, generator(1)), encoder(obs, generator(2))
    assert torch.equal(first, encoder(obs, generator(1)))
    assert not torch.allclose(first, second, atol=1e-4)
    assert torch.equal(first[:, :6], second[:, :6])
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


def test_nothing_is_drawn_without_images():
    encoder = WindowEncoder(spec(state=EntrySpec((3,)), cloud=EntrySpec((7, 3))))
    draw = generator()
    before = draw.get_state()
    obs = {"state": torch.randn(5, 2, 3), "cloud": torch.randn(5, 2, 7, 3)}
    assert torch.equal(encoder(obs, draw), encoder(obs))
    assert torch.equal(draw.get_state(), before)


@pytest.mark.parametrize(
    "entry", [EntrySpec((2, 8, 8, 3)), EntrySpec((8, 8), "uint8"), EntrySpec((3,), "uint8"), EntrySpec(())]
)
def test_other_entries_are_refused_by_name(entry):
    with pytest.raises(ShapeError, match="'odd'"):
        WindowEncoder(spec(odd=entry))
