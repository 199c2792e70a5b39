"""The random shift of images, against the same written with clamped indices."""

from itertools import product

import pytest
import torch

from difftori.models.encoders import random_shift


def random_images(rows: int) -> torch.Tensor:
    """Random ones, in which every shift shows: (rows 3 6 8)."""
    return torch.randint(0, 256, (rows, 3, 6, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def shift(images: torch.Tensor, pad: int, seed: int = 0) -> torch.Tensor:
    return random_shift(images, pad, torch.Generator().manual_seed(seed))


def moved(image: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """What a window that lies so much lower and further right shows of (C h w), whose edges go on for ever."""
    rows = (torch.arange(image.shape[1]) + down).clamp(0, image.shape[1] - 1)
    columns = (torch.arange(image.shape[2]) + right).clamp(0, image.shape[2] - 1)
    return image[:, rows][:, :, columns]


def test_each_image_is_shifted_by_itself_by_whole_pixels_up_to_pad():
    images = random_images(300)
    result = shift(images, 2)
    assert result.shape == images.shape
    assert result.dtype == images.dtype
    steps = range(-2, 3)
    found = []
    for image, out in zip(images, result, strict=True):
        fitting = [(i, j) for i, j in product(steps, steps) if torch.equal(moved(image, i, j), out)]
        assert len(fitting) == 1
        found += fitting
    counts = [found.count(pair) for pair in product(steps, steps)]  # 12 of each are to be expected
    assert min(counts) >= 1
    assert max(counts) < 40


def test_an_image_is_not_mixed_with_its_neighbours():
    images = random_images(5)
    others = images.clone()
    others[[0, 1, 3, 4]] = 255 - others[[0, 1, 3, 4]]
    assert torch.equal(shift(images, 2)[2], shift(others, 2)[2])


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_no_shift_changes_nothing(kind):
    images = random_images(5).to(kind)
    assert torch.equal(shift(images, 0), images)


def test_the_generator_alone_decides():
    images = random_images(20)
    assert torch.equal(shift(images, 2), shift(images, 2))
    assert not torch.equal(shift(images, 2), shift(images, 2, seed=1))


def test_leading_dimensions_are_images_of_their_own():
    images = random_images(6)
    assert torch.equal(shift(images.view(2, 3, 3, 6, 8), 2).flatten(0, 1), shift(images, 2))
