"""Means over seeds with bootstrap intervals suited to few values; paired differences and ratios."""

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
"""Takes arrays of values and reduces the axis of the seeds."""


@dataclass(frozen=True)
class Estimate:
    """A value estimated from `n` seeds with its interval, which is None for fewer than two seeds."""

    value: float
    low: float | None
    high: float | None
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies entirely on one side of 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def mean(values: Sequence[float]) -> Estimate:
    """The mean over seeds. Raises ValueError without values."""
    return _estimate([np.asarray(values, float)], np.mean, paired=True)


def mean_difference(values: Sequence[float], baseline: Sequence[float], *, paired: bool) -> Estimate:
    """Mean of `values` minus mean of `baseline`.

    With `paired` the two are matched seed by seed (equal lengths, same order) and seeds are resampled as pairs, so the
    effect of a seed's prompts and noise on both cancels. Otherwise each side is resampled independently.
    """
    samples = [np.asarray(values, float), np.asarray(baseline, float)]
    return _estimate(samples, lambda x, y, axis: x.mean(axis) - y.mean(axis), paired=paired)


def ratio_of_means(numerator: Sequence[float], denominator: Sequence[float], *, paired: bool) -> Estimate | None:
    """Mean of `numerator` over mean of `denominator`; None if a denominator is not positive."""
    samples = [np.asarray(numerator, float), np.asarray(denominator, float)]
    if not (samples[1] > 0).all():
        return None
    return _estimate(samples, lambda x, y, axis: x.mean(axis) / y.mean(axis), paired=paired)


def mean_curve(curves: Sequence[Sequence[float]]) -> tuple[Floats, Floats | None, Floats | None]:
    """Mean of the curves [seeds, points] at every point, and the bounds of its interval (None for one seed)."""
    table = np.asarray(curves, float)
    if len(table) < 2:
        return table.mean(axis=0), None, None
    return table.mean(axis=0), *_interval([table.T], np.mean, paired=True)


def tails(n: int, level: float = LEVEL) -> tuple[float, float]:
    """The two quantiles of the bootstrap distribution that bound an interval from `n` values.

    The plain percentiles (2.5 % and 97.5 %) give too short intervals for few values: for the mean of five normal
    values they cover the true mean 83 % of the time. These quantiles are widened so that the interval of a mean is as
    long as Student's (the expanded percentile interval of Hesterberg, "What Teachers Should Know About the Bootstrap",
    The American Statistician 69, 2015). A bootstrap interval cannot reach beyond the smallest and largest values, so
    with four or fewer values the coverage remains below the nominal level: see :func:`attainable`.
    """
    from scipy.special import ndtr, stdtrit  # normal distribution function, quantiles of Student's t

    tail = float(ndtr(-math.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 + level) / 2)))
    return tail, 1 - tail


def attainable(n: int) -> float:
    """The highest coverage of the median that an interval within the range of `n` values can have."""
    return 1 - 2.0 ** (1 - n)


def _estimate(samples: Sequence[Floats], statistic: Statistic, *, paired: bool) -> Estimate:
    counts = [len(sample) for sample in samples]
    if min(counts) == 0:
        raise ValueError("no values given")
    if paired and len(set(counts)) > 1:
        raise ValueError(f"paired samples must have equal lengths, got {counts}")
    value, n = float(statistic(*samples, axis=-1)), min(counts)
    if n < 2:
        return Estimate(value, None, None, n)
    low, high = _interval(samples, statistic, paired=paired)
    return Estimate(value, float(low), float(high), n)


def _interval(samples: Sequence[Floats], statistic: Statistic, *, paired: bool) -> tuple[Floats, Floats]:
    """The bounds of the interval of a statistic of samples [..., seeds]."""
    from scipy.stats import bootstrap

    low, high = tails(min(sample.shape[-1] for sample in samples))
    found = bootstrap(
        samples,
        statistic,
        n_resamples=RESAMPLES,
        batch=RESAMPLES if samples[0].ndim == 1 else 500,  # limits memory for long curves
        vectorized=True,
        paired=paired,
        axis=-1,
        confidence_level=high - low,
        method="percentile",
        rng=np.random.default_rng(_SEED),
    )
    return found.confidence_interval.low, found.confidence_interval.high
