"""Means with their uncertainty: normal and bootstrap intervals, paired comparisons, spread over seeds."""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from difftori.errors import NonFiniteError, ShapeError


@dataclass(frozen=True)
class Estimate:
    """A value with the ends of its interval, in the unit of what was estimated."""

    value: float
    low: float
    high: float


def mean_interval(values: np.ndarray, *, confidence: float = 0.95) -> Estimate:
    """The mean of `values` (B) with its normal interval, mean ± z·s/√B. One value has an infinite interval.

    For dozens of independent values or more; for few seeds report `spread` instead.
    """
    values = _checked(values)
    mean = float(values.mean())
    if len(values) == 1:
        return Estimate(mean, -np.inf, np.inf)
    reach = NormalDist().inv_cdf(0.5 + confidence / 2) * float(values.std(ddof=1)) / len(values) ** 0.5
    return Estimate(mean, mean - reach, mean + reach)


def paired_difference(values: np.ndarray, reference: np.ndarray, *, confidence: float = 0.95) -> Estimate:
    """Mean of values − reference (B, the same problems in the same order) with its normal interval.

    Pairing removes the spread between problems, which in Table 8 is several times the difference between methods.
    """
    return mean_interval(_checked(values) - _paired(values, reference), confidence=confidence)


def ratio_interval(
    values: np.ndarray,
    reference: np.ndarray,
    generator: np.random.Generator,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> Estimate:
    """mean(values)/mean(reference) with the percentile bootstrap interval over paired problems (B).

    Meaningful only where the reference's mean is clearly positive: resamples with a mean near 0 widen it without bound.
    """
    values, reference = _checked(values), _paired(values, reference)
    rows = generator.integers(0, len(values), size=(resamples, len(values)))
    ratios = values[rows].mean(axis=1) / reference[rows].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Estimate(float(values.mean() / reference.mean()), float(low), float(high))


def spread(values: np.ndarray) -> float | None:
    """Sample standard deviation (ddof 1), as over seeds; None for a single value."""
    values = _checked(values)
    return float(values.std(ddof=1)) if len(values) > 1 else None


def _checked(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ShapeError(f"statistics take one or more values in one dimension, not shape {values.shape}")
    broken = np.flatnonzero(~np.isfinite(values))
    if len(broken):
        raise NonFiniteError(f"{len(broken)} of {len(values)} values are NaN or Inf, the first at {broken[0]}")
    return values


def _paired(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    reference = _checked(reference)
    if reference.shape != np.shape(values):
        raise ShapeError(f"pairs need equal lengths, not {np.shape(values)} and {reference.shape}")
    return reference
