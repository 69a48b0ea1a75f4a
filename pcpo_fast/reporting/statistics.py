"""Means over seeds, and how far to trust them: bootstrap intervals for few values, differences and ratios in pairs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
RESAMPLES = 10_000
_SEED = 20_250  # the same intervals every time a report is written

Floats = NDArray[np.float64]
Statistic = Callable[..., Floats]
"""Takes arrays of values, seeds on the last axis but one where curves are compared, and reduces the seeds."""


@dataclass(frozen=True)
class Estimate:
    """A number estimated from `n` seeds, and its interval; no interval (None) from fewer than two seeds."""

    value: float
    low: float | None
    high: float | None
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def mean(values: Sequence[float]) -> Estimate:
    """The mean over seeds. Raises ValueError for no values."""
    return _estimate([np.asarray(values, float)], lambda x: x.mean(axis=-1), paired=True)


def mean_difference(values: Sequence[float], baseline: Sequence[float], *, paired: bool) -> Estimate:
    """Mean of `values` minus mean of `baseline`.

    With `paired` the two belong together seed by seed (equal lengths, equal order), and seeds are resampled as pairs:
    what a seed's prompts and noise do to both drops out. Otherwise each side is resampled by itself.
    """
    samples = [np.asarray(values, float), np.asarray(baseline, float)]
    return _estimate(samples, lambda x, y: x.mean(axis=-1) - y.mean(axis=-1), paired=paired)


def ratio_of_means(numerator: Sequence[float], denominator: Sequence[float], *, paired: bool) -> Estimate | None:
    """Mean of `numerator` over mean of `denominator`; None where a denominator is not positive."""
    samples = [np.asarray(numerator, float), np.asarray(denominator, float)]
    if not (samples[1] > 0).all():
        return None
    return _estimate(samples, lambda x, y: x.mean(axis=-1) / y.mean(axis=-1), paired=paired)


def mean_curve(curves: Sequence[Sequence[float]]) -> tuple[Floats, Floats | None, Floats | None]:
    """Mean of the curves [seeds, points] at every point, and the ends of its interval (None for one seed)."""
    table = np.asarray(curves, float)
    count = len(table)
    if count < 2:
        return table.mean(axis=0), None, None
    drawn = np.random.default_rng(_SEED).integers(count, size=(RESAMPLES, count))
    weights = np.stack([(drawn == seed).mean(axis=1) for seed in range(count)], axis=1)
    low, high = np.quantile(weights @ table, tails(count), axis=0)
    return table.mean(axis=0), low, high


def tails(n: int, level: float = LEVEL) -> tuple[float, float]:
    """Which quantiles of the bootstrap distribution bound an interval from `n` values.

    The plain percentiles (2.5 % and 97.5 %) make intervals that are too short for few values: for a mean of five
    normal values they hold the truth 83 % of the time. These are widened so that the interval of a mean is as long as
    Student's (Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician 69, 2015:
    the expanded percentile interval). No bootstrap interval reaches beyond the smallest and the largest value, so four
    or fewer values still get less than they ask for: see :func:`attainable`.
    """
    z = math.sqrt(n / (n - 1)) * student_quantile(level, n - 1)
    tail = 0.5 * math.erfc(z / math.sqrt(2))
    return tail, 1 - tail


def attainable(n: int) -> float:
    """How often an interval within the range of `n` values can hold the middle of their distribution, at most."""
    return 1 - 2.0 ** (1 - n)


def student_quantile(level: float, freedom: int) -> float:
    """The t with P(-t < T < t) = `level` for Student's distribution; exact finite sums, then bisection.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    low, high = 0.0, 1.0
    while _student_inside(high, freedom) < level:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_inside(middle, freedom) < level else (low, middle)
    return (low + high) / 2


def _student_inside(t: float, freedom: int) -> float:
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def _estimate(samples: Sequence[Floats], statistic: Statistic, *, paired: bool) -> Estimate:
    counts = [len(sample) for sample in samples]
    if min(counts) == 0:
        raise ValueError("there are no values")
    if paired and len(set(counts)) > 1:
        raise ValueError(f"pairs need as many values on either side, got {counts}")
    value, n = float(statistic(*samples)), min(counts)
    if n < 2:
        return Estimate(value, None, None, n)
    generator = np.random.default_rng(_SEED)
    drawn = [generator.integers(count, size=(RESAMPLES, count)) for count in counts[: 1 if paired else None]]
    resampled = [sample[drawn[0 if paired else side]] for side, sample in enumerate(samples)]
    low, high = np.quantile(statistic(*resampled), tails(n))
    return Estimate(value, float(low), float(high), n)
