"""Statistics over tasks equal rliable's, on published returns; `make_golden_rliable.py` beside this made the numbers."""

import json
from pathlib import Path

import numpy as np
import pytest

from difftori.experiments.analyse import OVER
from difftori.experiments.statistics import (
    improvement,
    improvement_interval,
    performance_profile,
    stratified_band,
    stratified_interval,
)
from difftori.paper.curves import published_curves

GOLDEN = json.loads(Path(__file__).with_name("golden_rliable.json").read_text())


def strata(method: str) -> list[np.ndarray]:
    """The same returns as the golden numbers': three seeds of each of 15 tasks."""
    curves = sorted((curve for curve in published_curves("state") if curve.method == method), key=lambda c: c.task)
    return [curve.at(GOLDEN["steps"])[:3] / 1000 for curve in curves]


@pytest.mark.parametrize("method", GOLDEN["methods"])
@pytest.mark.parametrize("name", OVER)
def test_statistics_over_tasks(method, name):
    value, low, high = GOLDEN["methods"][method][name.replace(" ", "_")]
    estimate = stratified_interval(strata(method), OVER[name], np.random.default_rng(0), resamples=5000)
    assert estimate.value == pytest.approx(value, abs=1e-12)
    # Both intervals are of random draws; the median jumps from one task's mean to another's.
    near = 0.2 if name == "median" else 0.07
    assert [estimate.low, estimate.high] == pytest.approx([low, high], abs=near * (high - low))


@pytest.mark.parametrize("method", GOLDEN["methods"])
def test_performance_profiles(method):
    thresholds = np.array(GOLDEN["thresholds"])
    assert performance_profile(strata(method), thresholds) == pytest.approx(GOLDEN["methods"][method]["profile"])
    share, low, high = stratified_band(
        strata(method), lambda s: performance_profile(s, thresholds), np.random.default_rng(0)
    )
    assert share == pytest.approx(GOLDEN["methods"][method]["profile"])
    assert (low <= share).all()
    assert (share <= high).all()


@pytest.mark.parametrize("pair", GOLDEN["improvement"])
def test_probability_of_improvement(pair):
    ours, theirs = map(strata, pair.split(" over "))
    value, low, high = GOLDEN["improvement"][pair]
    estimate = improvement_interval(ours, theirs, np.random.default_rng(0))
    assert estimate.value == pytest.approx(value, abs=1e-12)
    assert [estimate.low, estimate.high] == pytest.approx([low, high], abs=0.2 * (high - low))
    assert improvement(theirs, ours) == pytest.approx(1 - value)


def test_ties_count_half():
    assert improvement([np.array([1.0, 2.0])], [np.array([1.0, 2.0])]) == pytest.approx(0.5)
    assert improvement([np.array([1.0])], [np.array([1.0, 0.0])]) == pytest.approx(0.75)


def test_one_seed_says_nothing_of_its_spread():
    estimate = improvement_interval([np.array([1.0])], [np.array([0.0, 0.5])], np.random.default_rng(0))
    assert (estimate.value, estimate.low, estimate.high) == (1.0, -np.inf, np.inf)
