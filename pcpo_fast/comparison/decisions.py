"""The verdict on the measure that was named beforehand: Student's t, with Holm's correction for several variants."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from pcpo_fast.reporting.statistics import LEVEL, Estimate

VERY_FEW = 3
"""With fewer seeds than this there is no verdict."""


@dataclass(frozen=True)
class Decision:
    """The primary measure of a variant against the baseline.

    Attributes:
        difference: mean difference and its t-interval; no interval from fewer than two seeds.
        p: two-sided probability of so large a difference by chance; None from fewer than two seeds.
        adjusted: the same after Holm's correction.
        verdict: "better" or "worse" where `adjusted` is below 0.05, "no clear difference", or "too few seeds".
    """

    difference: Estimate
    p: float | None
    adjusted: float | None
    verdict: str


def decide(sides: Mapping[str, tuple[tuple[list[float], list[float]], bool]]) -> dict[str, Decision]:
    """The decision on every variant.

    Args:
        sides: by variant, its values and the baseline's, of which more is better, and whether they are pairs.
    """
    tests = {name: t_test(*both, paired=paired) for name, (both, paired) in sides.items()}
    adjusted = holm({name: p for name, (_, p) in tests.items() if p is not None})
    found = {}
    for name, (difference, p) in tests.items():
        verdict = "better" if difference.value > 0 else "worse"
        if difference.n < VERY_FEW:
            verdict = "too few seeds"
        elif adjusted[name] >= 1 - LEVEL:
            verdict = "no clear difference"
        found[name] = Decision(difference, p, adjusted.get(name), verdict)
    return found


def holm(probabilities: Mapping[str, float]) -> dict[str, float]:
    """Adjusted probabilities, with which the chance of any false verdict is that of a single one.

    S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6, 1979.
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(probabilities, key=probabilities.__getitem__)):
        adjusted[name] = largest = max(largest, min(1.0, (len(probabilities) - place) * probabilities[name]))
    return adjusted


def t_test(own: Sequence[float], other: Sequence[float], *, paired: bool) -> tuple[Estimate, float | None]:
    """The difference of two means with its interval, and p: Student's in pairs, Welch's otherwise."""
    from scipy import stats

    difference, n = fmean(own) - fmean(other), min(len(own), len(other))
    if n < 2:
        return Estimate(difference, None, None, n), None
    test = stats.ttest_rel(own, other) if paired else stats.ttest_ind(own, other, equal_var=False)
    if math.isnan(test.pvalue):  # nothing differs
        return Estimate(difference, difference, difference, n), 1.0
    low, high = test.confidence_interval(LEVEL)
    return Estimate(difference, float(low), float(high), n), float(test.pvalue)
