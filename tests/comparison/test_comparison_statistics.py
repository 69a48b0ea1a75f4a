"""Intervals of means, differences and ratios over a handful of seeds; and what is read off a curve."""

import numpy as np
import pytest
from scipy import stats

from pcpo_fast.comparison.analysis import verdict
from pcpo_fast.comparison.curves import Reached, first_reached, interpolated, last_value, trailing_mean, until
from pcpo_fast.comparison.decisions import decide, holm, t_test
from pcpo_fast.reporting.series import Series
from pcpo_fast.reporting.statistics import (
    Estimate,
    attainable,
    mean,
    mean_curve,
    mean_difference,
    ratio_of_means,
    tails,
)

# Quantiles


def test_tails_are_wider_for_few_values_and_plain_percentiles_for_many() -> None:
    assert tails(5)[0] == pytest.approx(stats.norm.cdf(-np.sqrt(5 / 4) * stats.t.ppf(0.975, 4)), rel=1e-8)
    assert tails(5)[0] < tails(10)[0] < tails(100)[0] < 0.025
    assert tails(100_000)[0] == pytest.approx(0.025, rel=1e-3)
    assert sum(tails(7)) == pytest.approx(1.0)


# Means


def test_interval_of_a_mean_is_as_long_as_students() -> None:
    values = np.random.default_rng(0).normal(3, 2, size=40)
    estimate = mean(values.tolist())
    half = stats.t.ppf(0.975, 39) * values.std(ddof=1) / np.sqrt(40)
    assert estimate.value == pytest.approx(values.mean()) and estimate.n == 40
    assert estimate.low is not None and estimate.high is not None
    # 10,000 resamples find the ends to about 2 % of the half width (and skewness shifts them a little).
    assert estimate.high - estimate.value == pytest.approx(half, rel=0.08)
    assert estimate.value - estimate.low == pytest.approx(half, rel=0.08)


def test_interval_of_a_mean_holds_the_truth_about_as_often_as_it_says() -> None:
    """Of 400 samples each; the standard error of the share is 1.1 points. Plain percentiles hold it 83 % for five."""
    generator = np.random.default_rng(1)
    for n, low, high in ((5, 0.88, 0.955), (10, 0.915, 0.98)):
        estimates = [mean(generator.normal(size=n).tolist()) for _ in range(400)]
        held = np.mean([e.low <= 0 <= e.high for e in estimates])  # type: ignore[operator]
        assert low < held < high, n


def test_intervals_are_the_same_every_time() -> None:
    values = [0.1, 0.4, 0.2, 0.9, 0.5]
    assert mean(values) == mean(values)


def test_one_value_has_no_interval_and_none_no_mean() -> None:
    assert mean([0.5]) == Estimate(0.5, None, None, 1)
    assert not mean([0.5]).excludes_zero
    with pytest.raises(ValueError, match="no values"):
        mean([])


def test_equal_values_have_an_interval_of_no_length() -> None:
    assert mean([2.0, 2.0, 2.0]) == Estimate(2.0, 2.0, 2.0, 3)


def test_no_interval_leaves_the_range_of_the_values() -> None:
    values = [1.0, 2.0, 4.0]
    estimate = mean(values)
    assert (estimate.low, estimate.high) == (1.0, 4.0)
    assert attainable(3) == 0.75  # two halves of a coin thrown three times: all on one side with 1/4


# Differences and ratios


def test_pairs_cancel_what_a_seed_does_to_both() -> None:
    generator = np.random.default_rng(2)
    seeds = generator.normal(0, 5, size=8)
    baseline, variant = seeds + generator.normal(0, 0.1, 8), seeds + 0.5 + generator.normal(0, 0.1, 8)
    paired = mean_difference(variant.tolist(), baseline.tolist(), paired=True)
    apart = mean_difference(variant.tolist(), baseline.tolist(), paired=False)
    assert paired.value == pytest.approx(apart.value) == pytest.approx((variant - baseline).mean())
    single = mean((variant - baseline).tolist())
    assert (paired.low, paired.high) == pytest.approx((single.low, single.high), rel=1e-9)
    assert paired.excludes_zero and not apart.excludes_zero


def test_unpaired_sides_may_differ_in_number_and_their_variances_add() -> None:
    generator = np.random.default_rng(3)
    x, y = generator.normal(1, 1, size=60), generator.normal(0, 2, size=50)
    estimate = mean_difference(x.tolist(), y.tolist(), paired=False)
    half = stats.t.ppf(0.975, 49) * np.sqrt(x.var(ddof=1) / 60 + y.var(ddof=1) / 50)
    assert estimate.n == 50
    assert (estimate.high - estimate.low) / 2 == pytest.approx(half, rel=0.06)  # type: ignore[operator]
    with pytest.raises(ValueError, match="paired samples must have equal lengths"):
        mean_difference([1.0], [1.0, 2.0], paired=True)


def test_ratio_is_of_means_and_its_interval_positive() -> None:
    assert ratio_of_means([30.0, 60.0], [20.0, 40.0], paired=True) == Estimate(1.5, 1.5, 1.5, 2)  # exact in every seed
    apart = ratio_of_means([30.0, 60.0], [20.0, 40.0], paired=False)
    assert apart is not None and (apart.low, apart.high) == (30 / 40, 60 / 20)
    assert ratio_of_means([1.0, 2.0], [0.0, 3.0], paired=True) is None


def test_mean_curve_is_the_mean_at_every_point() -> None:
    table = np.random.default_rng(4).normal(size=(5, 7))
    middle, low, high = mean_curve(table.tolist())
    np.testing.assert_allclose(middle, table.mean(axis=0))
    assert low is not None and high is not None
    for point in range(7):
        at_point = mean(table[:, point].tolist())
        assert (low[point], high[point]) == pytest.approx((at_point.low, at_point.high))
    assert mean_curve([[1.0, 2.0]])[1:] == (None, None)


# Verdicts


@pytest.mark.parametrize(
    ("low", "high", "n", "better", "said"),
    [
        (0.1, 0.3, 5, "higher", "better"),
        (0.1, 0.3, 5, "lower", "worse"),
        (-0.3, -0.1, 5, "lower", "better"),
        (-0.3, -0.1, 9, None, "lower"),
        (0.1, 0.3, 9, None, "higher"),
        (0.1, 0.3, 4, "higher", "probably better"),
        (0.1, 0.3, 2, "higher", "too few seeds"),
        (-0.1, 0.3, 5, "higher", "no clear difference"),
        (0.0, 0.3, 5, "higher", "no clear difference"),
        (0.0, 0.0, 5, "higher", "no clear difference"),
    ],
)
def test_verdicts(low: float, high: float, n: int, better: str | None, said: str) -> None:
    assert verdict(Estimate((low + high) / 2, low, high, n), better) == said  # type: ignore[arg-type]


def test_a_variant_that_is_the_same_is_seldom_called_better_or_worse() -> None:
    generator = np.random.default_rng(5)
    said = [verdict(mean(generator.normal(size=6).tolist()), "higher") for _ in range(400)]
    assert said.count("no clear difference") / 400 > 0.9


# Curves


def test_trailing_mean_looks_back_only() -> None:
    smooth = trailing_mean(Series([0, 1, 2, 3, 4], [1.0, 2.0, 3.0, 4.0, 10.0]), 3)
    assert smooth == Series([0, 1, 2, 3, 4], [1.0, 1.5, 2.0, 3.0, pytest.approx(17 / 3)])
    curve = Series([0, 1], [1.0, 5.0])
    assert trailing_mean(curve, 1) == curve


def test_trailing_mean_goes_by_epochs_where_some_are_missing() -> None:
    assert trailing_mean(Series([0, 1, 7], [1.0, 3.0, 8.0]), 3).values == [1.0, 2.0, 8.0]


def test_target_is_reached_at_the_first_point_at_or_above_it() -> None:
    curve = Series([0, 1, 2, 3], [0.1, 0.5, 0.4, 0.9])
    assert first_reached(curve, 0.5, 10, between=False) == Reached(1.0, True)
    assert first_reached(curve, 0.50001, 10, between=False) == Reached(3.0, True)
    assert first_reached(curve, 0.1, 10, between=True) == Reached(0.0, True)


def test_target_between_evaluations_is_on_the_straight_line() -> None:
    curve = Series([0, 10, 20], [0.2, 0.4, 0.8])
    assert first_reached(curve, 0.5, 20, between=True) == Reached(pytest.approx(12.5), True)
    assert first_reached(curve, 0.8, 20, between=True) == Reached(20.0, True)


def test_a_target_that_is_not_reached_in_time_is_censored_at_the_horizon() -> None:
    curve = Series([0, 1, 2, 3], [0.1, 0.2, 0.3, 0.4])
    assert first_reached(curve, 0.5, 4, between=False) == Reached(4.0, False)
    assert first_reached(curve, 0.4, 2, between=False) == Reached(2.0, False)
    assert first_reached(curve, 0.4, 2, between=True) == Reached(2.0, False)


def test_values_at_epochs() -> None:
    curve = Series([0, 10, 20], [1.0, 2.0, 4.0])
    assert [interpolated(curve, epoch) for epoch in (0, 10, 15, 20)] == [1.0, 2.0, 3.0, 4.0]
    assert interpolated(curve, 21) is None and interpolated(Series([], []), 0) is None
    assert [last_value(curve, epoch) for epoch in (9, 10, 19.5, 99)] == [1.0, 2.0, 2.0, 4.0]
    assert last_value(curve, -1) is None
    assert until(curve, 10) == Series([0, 10], [1.0, 2.0])


# The measure that decides


def test_pairs_give_students_interval() -> None:
    """Differences 1, 2, 3, 4, 5: mean 3, standard error sqrt(2.5 / 5), t(0.975, 4) = 2.7764 from a table."""
    own, other = [11.0, 4.0, 9.0, 1.0, 25.0], [10.0, 2.0, 6.0, -3.0, 20.0]
    estimate, p = t_test(own, other, paired=True)
    half = 2.7764 * np.sqrt(0.5)
    assert (estimate.value, estimate.n) == (3.0, 5)
    assert (estimate.low, estimate.high) == (pytest.approx(3 - half, abs=1e-4), pytest.approx(3 + half, abs=1e-4))
    assert p == pytest.approx(2 * stats.t.sf(3 / np.sqrt(0.5), 4))


def test_holms_correction_of_a_worked_example() -> None:
    """Four tests: 4 x .005, 3 x .01, 2 x .03, and .04, which may not be below the one before it."""
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.7, "b": 0.6}) == {"a": 1.0, "b": 1.0}


def test_a_decision_needs_what_is_left_after_the_correction() -> None:
    steps = [0.1, 0.2, 0.3, 0.4]
    clear = ([0.5 + x + x / 10 for x in steps], [0.3 + x for x in steps])
    weak = ([0.03 + x + x / 10 * (-1) ** i for i, x in enumerate(steps)], steps)  # p is .08
    found = decide({"clear": (clear, True), "weak": (weak, True), "same": ((steps, steps), True)})
    assert {name: one.verdict for name, one in found.items()} == {
        "clear": "better", "weak": "no clear difference", "same": "no clear difference"
    }  # fmt: skip
    assert found["same"].p == 1.0 and found["same"].difference.low == 0.0
    assert decide({"worse": ((clear[1], clear[0]), True)})["worse"].verdict == "worse"
    alone = decide({"one": (([1.0], [0.0]), True), "two": (([1.0, 1.1], [0.0, 0.2]), True)})
    assert (alone["one"].verdict, alone["two"].verdict) == ("too few seeds", "too few seeds")
    assert (alone["one"].p, alone["one"].adjusted) == (None, None)
