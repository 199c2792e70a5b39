"""Means with their uncertainty: normal and bootstrap intervals, paired comparisons, spread over seeds."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from difftori.errors import NonFiniteError, ShapeError
from difftori.rollout import wilson_interval

BOOTSTRAP_COVERAGE = {2: 0.51, 3: 0.74, 4: 0.80}
"""How often the 95 % percentile bootstrap interval of the mean of so few normally distributed values contains it (1500 trials)."""


@dataclass(frozen=True)
class Estimate:
    """An estimated value with the ends of its interval, in the unit of the data."""

    value: float
    low: float
    high: float

    @property
    def bounded(self) -> bool:
        """Whether the interval is finite. It is infinite for a single value."""
        return bool(np.isfinite(self.high - self.low))


def mean_interval(values: np.ndarray, *, confidence: float = 0.95) -> Estimate:
    """Return the mean of `values` (B) with its normal interval, mean ± z·s/√B. The interval of one value is infinite.

    For dozens of independent values or more. For few seeds, use `student_interval`, or report `spread`.
    """
    return _centred(values, lambda count: NormalDist().inv_cdf(0.5 + confidence / 2))


def paired_difference(values: np.ndarray, reference: np.ndarray, *, confidence: float = 0.95) -> Estimate:
    """Return the mean of values − reference (B, the same problems in the same order) with its normal interval.

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
    """Return mean(values)/mean(reference) with the percentile bootstrap interval over paired problems (B).

    Valid only if the reference's mean is clearly positive, because resamples with a mean near 0 widen the interval without bound.
    """
    values, reference = _checked(values), _paired(values, reference)
    rows = generator.integers(0, len(values), size=(resamples, len(values)))
    ratios = values[rows].mean(axis=1) / reference[rows].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Estimate(float(values.mean() / reference.mean()), float(low), float(high))


def paired_rates(successes: np.ndarray, reference: np.ndarray, *, z: float = 1.96) -> Estimate:
    """Return rate − rate of the reference over paired trials (B, 0 or 1), with Newcombe's interval for paired proportions.

    Unlike Student's, it stays in [−1, 1], and is not empty if all differences are equal (Newcombe, Statistics in Medicine 17,
    1998, 2635-2650, method 10: Wilson's limits, and the correlation with a continuity correction). z = 1.96: 95 %.
    """
    ours, theirs = _checked(successes), _paired(successes, reference)
    count = len(ours)
    both, neither = int((ours * theirs).sum()), int(((1 - ours) * (1 - theirs)).sum())
    first, second = int(ours.sum()), int(theirs.sum())
    product = both * neither - (first - both) * (second - both)
    scale = math.sqrt(first * (count - first) * second * (count - second))
    corrected = max(product - count / 2, 0.0) if product > 0 else float(product)
    correlation = corrected / scale if scale else 0.0
    (low, high), (low_ref, high_ref) = wilson_interval(first, count, z), wilson_interval(second, count, z)
    p, q = first / count, second / count

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * correlation * a * b + b * b, 0.0))

    return Estimate(p - q, p - q - reach(p - low, high_ref - q), p - q + reach(high - p, q - low_ref))


def student_interval(values: np.ndarray, *, confidence: float = 0.95) -> Estimate:
    """Return the mean of few `values` (B), such as seeds, with Student's interval, mean ± t·s/√B. The interval of one value is infinite."""
    return _centred(values, lambda count: student_quantile(0.5 + confidence / 2, count - 1))


def _centred(values: np.ndarray, quantile: Callable[[int], float]) -> Estimate:
    """Return the mean of `values` (B) ± the quantile for B values times the standard error."""
    values = _checked(values)
    mean = float(values.mean())
    if len(values) == 1:
        return Estimate(mean, -np.inf, np.inf)
    reach = quantile(len(values)) * float(values.std(ddof=1)) / len(values) ** 0.5
    return Estimate(mean, mean - reach, mean + reach)


def student_quantile(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t distribution with `freedom` degrees of freedom, for probabilities in [0.5, 1).

    With t = √ν tan θ, the distribution function is ½ + ∫₀^θ cos^{ν−1} / (2 ∫₀^{π/2} cos^{ν−1}), which is inverted by bisection.
    For more than 200 degrees, the normal quantile is used, with an error below half a percent.
    """
    if not 0.5 <= probability < 1 or freedom < 1:
        raise ShapeError(
            f"student_quantile: probability {probability}, {freedom} degrees of freedom. "
            "Fix: give a probability in [0.5, 1) and at least 1 degree"
        )
    if freedom > 200:
        return NormalDist().inv_cdf(probability)
    nodes, weights = np.polynomial.legendre.leggauss(100)

    def integral(angle: float) -> float:
        return angle / 2 * float(weights @ np.cos(angle / 2 * (nodes + 1)) ** (freedom - 1))

    wanted = (2 * probability - 1) * integral(np.pi / 2)
    low, high = 0.0, np.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if integral(middle) < wanted else (low, middle)
    return float(freedom**0.5 * np.tan(low))


Strata = Sequence[np.ndarray]
"""One array per stratum (a task). The last axis is over its values (seeds); the leading axes are equal."""


def mean_of_means(strata: Strata) -> np.ndarray:
    """Return the mean over strata of their means. Every task has the same weight, for any number of seeds."""
    return np.asarray(np.mean([stratum.mean(axis=-1) for stratum in strata], axis=0))


def interquartile_mean(strata: Strata) -> np.ndarray:
    """Return the mean of the pooled values of all strata without the lowest and the highest quarter, ⌊n/4⌋ of n at each end.

    Agarwal et al., 2021, arXiv 2108.13264: less noise than the median, less influence of single runs than the mean.
    """
    pooled = np.sort(np.concatenate(strata, axis=-1), axis=-1)
    cut = pooled.shape[-1] // 4
    return np.asarray(pooled[..., cut : pooled.shape[-1] - cut].mean(axis=-1))


def median_of_means(strata: Strata) -> np.ndarray:
    """Return the median over strata of their means."""
    return np.asarray(np.median([stratum.mean(axis=-1) for stratum in strata], axis=0))


def optimality_gap(strata: Strata) -> np.ndarray:
    """Return 1 − the mean of the pooled values of all strata; values above 1 count as 1 (Agarwal et al., 2021)."""
    return np.asarray(1 - np.minimum(np.concatenate(strata, axis=-1), 1).mean(axis=-1))


def performance_profile(strata: Strata, thresholds: np.ndarray) -> np.ndarray:
    """Return the share of the pooled values above each of the thresholds (T), on the last axis (Agarwal et al., 2021)."""
    return (np.concatenate(strata, axis=-1)[..., None] > thresholds).mean(axis=-2)


def improvement(values: Strata, reference: Strata) -> np.ndarray:
    """Return the probability that a run of `values` is above one of `reference`, mean over strata. A tie counts one half.

    Agarwal et al., 2021. For one stratum, it is the Mann–Whitney statistic divided by the number of pairs.
    """
    shares = []
    for ours, theirs in zip(values, reference, strict=True):
        above = np.sign(ours[..., :, None] - theirs[..., None, :])
        shares.append(0.5 + above.mean(axis=(-2, -1)) / 2)
    return np.asarray(np.mean(shares, axis=0))


def improvement_interval(
    values: Strata,
    reference: Strata,
    generator: np.random.Generator,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> Estimate:
    """Return `improvement` with its percentile bootstrap interval. Both sides are resampled independently within each stratum.

    The interval is infinite if a stratum has only one value on either side. Raises ShapeError if the numbers of strata differ.
    """
    values, reference = [_checked(v) for v in values], [_checked(r) for r in reference]
    if not values or len(values) != len(reference):
        raise ShapeError(f"improvement: {len(values)} and {len(reference)} strata. Fix: give both sides the same tasks")
    value = float(improvement(values, reference))
    if min(map(len, (*values, *reference))) == 1:
        return Estimate(value, -np.inf, np.inf)
    ours, theirs = (_resampled(side, generator, resamples) for side in (values, reference))
    low, high = _ends(improvement(ours, theirs), confidence)
    return Estimate(value, float(low), float(high))


def stratified_band(
    strata: Strata,
    statistic: Callable[[Strata], np.ndarray],
    generator: np.random.Generator,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a statistic of T numbers, such as a profile, with the ends of its percentile bootstrap intervals."""
    strata = [_checked(stratum) for stratum in strata]
    low, high = _ends(statistic(_resampled(strata, generator, resamples)), confidence)
    return statistic(strata), low, high


def stratified_interval(
    strata: Strata,
    statistic: Callable[[Strata], np.ndarray],
    generator: np.random.Generator,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> Estimate:
    """Return `statistic` of the strata (B_k each) with its percentile bootstrap interval, resampled within each stratum.

    As in Agarwal et al., 2021, the tasks are fixed and the seeds are resampled. The interval is infinite if a stratum has only
    one value. Raises ShapeError without strata.
    """
    if not strata:
        raise ShapeError("stratified_interval: no strata given. Fix: give the values of at least one task")
    strata = [_checked(stratum) for stratum in strata]
    value = float(statistic(strata))
    if min(len(stratum) for stratum in strata) == 1:
        return Estimate(value, -np.inf, np.inf)
    low, high = _ends(statistic(_resampled(strata, generator, resamples)), confidence)
    return Estimate(value, float(low), float(high))


def _resampled(strata: Strata, generator: np.random.Generator, resamples: int) -> list[np.ndarray]:
    """Resample each stratum with replacement, `resamples` times, on the first axis."""
    return [stratum[generator.integers(0, len(stratum), size=(resamples, len(stratum)))] for stratum in strata]


def _ends(samples: np.ndarray, confidence: float) -> np.ndarray:
    """Return the ends of the percentile interval of samples over the first axis."""
    tail = (1 - confidence) / 2
    return np.quantile(samples, [tail, 1 - tail], axis=0)


def spread(values: np.ndarray) -> float | None:
    """Return the sample standard deviation (ddof 1), such as over seeds; None for a single value."""
    values = _checked(values)
    return float(values.std(ddof=1)) if len(values) > 1 else None


def _checked(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ShapeError(f"statistics: values of shape {values.shape}. Fix: give at least one value in one dimension")
    broken = np.flatnonzero(~np.isfinite(values))
    if len(broken):
        raise NonFiniteError(
            f"statistics: {len(broken)} of {len(values)} values are NaN or Inf, the first at index {broken[0]}. "
            "Fix: remove them, or the runs that they are from"
        )
    return values


def _paired(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    reference = _checked(reference)
    if reference.shape != np.shape(values):
        raise ShapeError(
            f"statistics: paired values of shapes {np.shape(values)} and {reference.shape}. Fix: give equal lengths"
        )
    return reference
