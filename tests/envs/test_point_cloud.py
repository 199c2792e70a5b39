"""Depth to points, and the sampling of points, against slow and plain versions."""

import importlib.util
import sys

import numpy as np
import pytest

from difftori.envs.point_cloud import camera_rays, cropped, farthest_points, tilt
from difftori.errors import DataError, MissingExtraError

needs_fpsample = pytest.mark.skipif(
    importlib.util.find_spec("fpsample") is None, reason="needs the extra: pip install 'difftori[metaworld]'"
)


def test_rays_open_as_wide_as_the_field_of_view_and_row_by_row():
    rays = camera_rays(4, 6, 90.0).reshape(4, 6, 3)
    assert np.allclose(rays[..., 2], -1.0)
    assert np.allclose(rays[0, :, 1], 1.0)  # at 45° above the axis
    assert np.allclose(rays[2, 3, :2], 0.0)  # half of the height and of the width
    assert np.allclose(rays[1, :, 0], (np.arange(6) - 3) / 2)


def test_tilting_turns_about_x_after_y_and_keeps_lengths():
    assert np.allclose(tilt(90.0, 0.0) @ [0, 1, 0], [0, 0, -1])
    assert np.allclose(tilt(0.0, 90.0) @ [0, 0, 1], [1, 0, 0])
    both = tilt(61.4, -7.0)
    assert np.allclose(both, tilt(61.4, 0.0) @ tilt(0.0, -7.0))
    assert np.allclose(both @ both.T, np.eye(3))


def test_cropping_keeps_what_is_strictly_inside_in_order():
    points = np.array([[0.5, 0.5, 0.5], [1.0, 0.5, 0.5], [0.1, 0.9, 0.2], [0.5, -0.1, 0.5]])
    assert np.array_equal(cropped(points, np.zeros(3), np.ones(3)), points[[0, 2]])


@needs_fpsample
def test_each_point_is_the_farthest_from_those_before_it():
    points = np.random.default_rng(0).uniform(-1, 1, (900, 3)).astype(np.float32)
    chosen = farthest_points(points, 64)
    assert (chosen.shape, chosen.dtype) == ((64, 3), np.float32)
    nearest = np.linalg.norm(points - chosen[0], axis=1)
    for point in chosen[1:]:
        assert np.linalg.norm(points[nearest.argmax()] - point) < 1e-6
        nearest = np.minimum(nearest, np.linalg.norm(points - point, axis=1))
    assert np.array_equal(farthest_points(points, 64), chosen)


@needs_fpsample
@pytest.mark.parametrize(("there", "wanted"), [(2, 1), (5, 2), (9, 8)])
def test_small_clouds_are_sampled_too(there, wanted):
    points = np.arange(3.0 * there).reshape(there, 3)
    assert len(np.unique(farthest_points(points, wanted), axis=0)) == wanted


def test_too_few_points_are_repeated_and_none_is_an_error():
    points = np.array([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    assert farthest_points(points, 5)[:, 0].tolist() == [0, 3, 0, 3, 0]
    with pytest.raises(DataError, match="none is left inside the crop"):
        farthest_points(points[:0], 5)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fpsample", None)
    with pytest.raises(MissingExtraError, match=r"difftori\[metaworld\]"):
        farthest_points(np.eye(3), 2)
