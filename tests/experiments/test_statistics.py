"""Intervals against known values and their promised coverage."""

import itertools
import math

import numpy as np
import pytest

from difftori.errors import NonFiniteError, ShapeError
from difftori.experiments.statistics import (
    interquartile_mean,
    mean_interval,
    mean_of_means,
    paired_difference,
    paired_rates,
    ratio_interval,
    spread,
    stratified_interval,
    student_interval,
    student_quantile,
)


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
    with pytest.raises(NonFiniteError, match="first at index 1"):
        spread(np.array([1.0, np.nan, 2.0]))


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706205), (2, 4.302653), (4, 2.776445), (9, 2.262157), (30, 2.042272), (200, 1.971896)],
)
def test_students_quantiles_are_those_of_the_tables(freedom, quantile):
    assert student_quantile(0.975, freedom) == pytest.approx(quantile, abs=1e-6)
    assert student_quantile(0.5, freedom) == pytest.approx(0, abs=1e-9)


def test_students_interval_by_hand():
    estimate = student_interval(np.array([1.0, 2.0, 3.0]))  # s = 1, t = 4.302653
    assert estimate.value == 2
    assert [estimate.high - 2, 2 - estimate.low] == pytest.approx([4.302653 / 3**0.5] * 2, abs=1e-6)
    assert student_interval(np.array([1.0])).high == np.inf
    with pytest.raises(ShapeError, match="degrees"):
        student_quantile(0.975, 0)


def test_interquartile_mean_by_hand():
    strata = [np.array([0.0, 1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0, 100.0])]
    assert interquartile_mean(strata) == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert interquartile_mean([np.array([9.0, 1.0, 2.0, 3.0, 4.0])]) == pytest.approx(3)  # one of five at each end
    assert interquartile_mean([np.array([1.0, 8.0, 3.0])]) == pytest.approx(4)  # too few to leave any out
    assert interquartile_mean([np.arange(8.0).reshape(2, 4)]) == pytest.approx([1.5, 5.5])


def test_every_task_counts_the_same():
    assert mean_of_means([np.array([1.0, 3.0]), np.array([10.0, 10.0, 10.0, 10.0])]) == pytest.approx(6)


def test_stratified_interval_by_hand():
    # A stratum {0, 2} has the resampled means 0, 1, 2 with chances ¼, ½, ¼; {5, 5} always 5.
    strata = [np.array([0.0, 2.0]), np.array([5.0, 5.0])]
    estimate = stratified_interval(strata, mean_of_means, np.random.default_rng(0))
    assert (estimate.value, estimate.low, estimate.high) == (3.0, 2.5, 3.5)
    narrow = stratified_interval(strata, mean_of_means, np.random.default_rng(0), confidence=0.4)
    assert (narrow.low, narrow.high) == (3.0, 3.0)


def test_strata_are_kept_apart():
    """Between tasks there is much spread and within them none: the interval must have no width."""
    strata = [np.full(3, value) for value in (0.0, 500.0, 1000.0)]
    for statistic in (mean_of_means, interquartile_mean):
        estimate = stratified_interval(strata, statistic, np.random.default_rng(0))
        assert estimate.low == estimate.value == estimate.high


def test_a_stratum_of_one_makes_the_interval_infinite():
    estimate = stratified_interval([np.array([1.0]), np.array([2.0, 3.0])], mean_of_means, np.random.default_rng(0))
    assert (estimate.value, estimate.low, estimate.high) == (1.75, -np.inf, np.inf)
    with pytest.raises(ShapeError, match="at least one task"):
        stratified_interval([], mean_of_means, np.random.default_rng(0))


def test_the_interval_of_paired_rates_is_possible_not_empty_and_covers():
    none, some = np.zeros(6), np.array([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    equal = paired_rates(none, none)
    assert (equal.value, -equal.low) == (0.0, equal.high)
    assert 0.3 < equal.high < 0.5  # Wilson's limit of 0 of 6 is .39
    forth, back = paired_rates(some, none), paired_rates(none, some)
    assert (forth.value, forth.low, forth.high) == pytest.approx((-back.value, -back.high, -back.low))
    worst = paired_rates(np.zeros(4), np.ones(4))
    assert worst.value == worst.low == -1.0

    # (both, only the first, only the second, neither): all outcomes of 15 trials, weighted with their probability
    chances, count, covered = (0.4, 0.25, 0.1, 0.25), 15, 0.0
    for cells in itertools.product(range(count + 1), repeat=3):
        rest = count - sum(cells)
        if rest >= 0:
            table = (*cells, rest)
            weight = math.factorial(count) * math.prod(
                c**k / math.factorial(k) for c, k in zip(chances, table, strict=True)
            )
            pairs = np.repeat([[1, 1], [1, 0], [0, 1], [0, 0]], table, axis=0).astype(float)
            found = paired_rates(pairs[:, 0], pairs[:, 1])
            covered += weight * (found.low <= chances[1] - chances[2] <= found.high)
    assert 0.93 < covered < 0.99
