"""Intervals against known values and their promised coverage."""

import numpy as np
import pytest

from difftori.errors import NonFiniteError, ShapeError
from difftori.studies.statistics import mean_interval, paired_difference, ratio_interval, spread


def test_mean_interval_equals_the_textbook_value():
    estimate = mean_interval(np.array([1.0, 2.0, 3.0, 4.0]))
    reach = 1.959964 * np.sqrt(5 / 3) / 2
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((2.5, 2.5 - reach, 2.5 + reach), abs=1e-6)


def test_one_value_says_nothing_of_its_spread():
    estimate = mean_interval(np.array([3.0]))
    assert (estimate.value, estimate.low, estimate.high) == (3.0, -np.inf, np.inf)
    assert spread(np.array([3.0])) is None
    assert spread(np.array([1.0, 3.0])) == pytest.approx(2**0.5)


def test_pairing_removes_what_the_problems_share():
    generator = np.random.default_rng(0)
    shared = generator.normal(10, 16, 500)
    values = shared + 0.3 + generator.normal(0, 0.1, 500)
    estimate = paired_difference(values, shared)
    assert estimate.low < 0.3 < estimate.high
    assert estimate.high - estimate.low < 0.02


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    generator = np.random.default_rng(1)
    hits = ratio_hits = 0
    for _ in range(200):
        reference = generator.gamma(4.0, 2.5, 100)
        values = 1.1 * reference + generator.normal(0, 2, 100)
        estimate = paired_difference(values, reference)
        hits += estimate.low <= 1.0 <= estimate.high
        estimate = ratio_interval(values, reference, generator, resamples=200)
        ratio_hits += estimate.low <= 1.1 <= estimate.high
    assert 180 <= hits <= 199
    assert 175 <= ratio_hits <= 199


def test_ratio_is_that_of_the_means_and_follows_the_seed():
    values, reference = np.array([2.0, 4.0, 9.0]), np.array([1.0, 4.0, 5.0])
    first, second = (ratio_interval(values, reference, np.random.default_rng(2)) for _ in range(2))
    assert first == second
    assert first.value == pytest.approx(1.5)
    assert first.low <= 1.5 <= first.high


@pytest.mark.parametrize("values", [np.array([]), np.zeros((2, 2))])
def test_shapes_without_meaning_are_refused(values):
    with pytest.raises(ShapeError):
        mean_interval(values)


def test_unequal_pairs_are_refused():
    with pytest.raises(ShapeError, match="equal lengths"):
        paired_difference(np.ones(3), np.ones(4))


def test_nan_is_refused_where_it_stands():
    with pytest.raises(NonFiniteError, match="first at 1"):
        spread(np.array([1.0, np.nan, 2.0]))
