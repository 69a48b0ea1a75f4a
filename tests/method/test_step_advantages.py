"""Credit for what a step changed: the formula, what it needs, its regressions, and that the baseline has no bias."""

import itertools
import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from pcpo_fast.config.schema import AdvantageConfig, RewardConfig
from pcpo_fast.method.step_advantages import KEPT, Regression, Segments, StepAdvantages, segment_credit
from pcpo_fast.rewards.composition import RewardUnits, compose_advantages

NOISY = (True, True, False, True, True, True, True, False)
"""Random steps 0, 1, 3, 4, 5, 6."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_definition(final: Tensor, predicted: Tensor, weights: Tensor, gain_lambda: float) -> Tensor:
    """The sum of lambda^k gains, one image and one segment at a time."""
    rows, count = predicted.shape
    credit = torch.zeros(rows, count, dtype=torch.float64)
    for row, segment in itertools.product(range(rows), range(count)):
        values = [float(weights[k] * predicted[row, k]) for k in range(count)] + [float(final[row])]
        for later in range(segment, count):
            credit[row, segment] += gain_lambda ** (later - segment) * (values[later + 1] - values[later])
    return credit


@pytest.mark.parametrize("gain_lambda", [0.0, 0.3, 0.9, 1.0])
def test_credit_is_the_discounted_sum_of_gains(gain_lambda: float) -> None:
    final, predicted, weights = normal(7), normal(7, 5, seed=1), normal(5, seed=2)
    credit = segment_credit(final, predicted, weights, gain_lambda)
    torch.testing.assert_close(credit, by_definition(final, predicted, weights, gain_lambda), rtol=1e-13, atol=1e-13)


def test_gains_add_up_to_the_final_value_minus_the_first() -> None:
    final, predicted, weights = normal(9), normal(9, 4, seed=1), normal(4, seed=2)
    total = segment_credit(final, predicted, weights, 0.0).sum(dim=1)
    torch.testing.assert_close(total, final - weights[0] * predicted[:, 0], rtol=0, atol=1e-14)


def test_branches_multiply_gains_of_predictions_as_they_are() -> None:
    final, predicted, slopes = normal(6), normal(6, 3, seed=1), torch.tensor([0.2, 0.5, 1.0]).double()
    ones = torch.ones(3, dtype=torch.float64)
    gains = by_definition(final, predicted, ones, 0.0) * slopes
    expected = torch.stack([gains[:, 0] + 0.4 * gains[:, 1] + 0.16 * gains[:, 2], gains[:, 1] + 0.4 * gains[:, 2]], 1)
    found = segment_credit(final, predicted, ones, 0.4, slopes)
    torch.testing.assert_close(found[:, :2], expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("every", [1, 2, 4, 9])
def test_segments_cover_the_steps_with_noise_in_order(every: int) -> None:
    segments = Segments.of(NOISY, every)
    random = [0, 1, 3, 4, 5, 6]
    assert segments.scored == tuple(random[::every])
    assert [step for step, segment in enumerate(segments.of_step) if segment == -1] == [2, 7]
    for position, step in enumerate(random):
        start = segments.scored[segments.of_step[step]]
        assert start == random[position - position % every]


@pytest.mark.parametrize("gain_lambda", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("every", [1, 2])
def test_only_needed_predictions_enter_and_none_is_asked_for_in_vain(gain_lambda: float, every: int) -> None:
    segments = Segments.of(NOISY, every)
    count = len(segments.scored)
    final, predicted, weights = normal(5), normal(5, count, seed=1), torch.ones(count, dtype=torch.float64)
    whole = segment_credit(final, predicted, weights, gain_lambda)
    for seed in range(20):
        chosen = torch.rand(len(NOISY), generator=torch.Generator().manual_seed(seed)) < 0.3
        chosen &= torch.tensor(NOISY)
        needed = segments.needed(chosen, gain_lambda)
        trained = sorted({segments.of_step[step] for step in chosen.nonzero().flatten().tolist()})
        credit = segment_credit(final, predicted.masked_fill(~needed, math.nan), weights, gain_lambda)
        assert torch.equal(credit[:, trained], whole[:, trained])
        for position in needed.nonzero().flatten().tolist():
            without = segment_credit(
                final, predicted.index_fill(1, torch.tensor([position]), math.nan), weights, gain_lambda
            )
            assert without[:, trained].isnan().any(), "a prediction is scored that no credit is made of"


def test_a_regression_forgets_and_leaves_out_what_is_not_known() -> None:
    regression = Regression(4)
    first, second = (normal(30, 2, seed=1), normal(30, 2, seed=2)), (normal(30, 2, seed=3), normal(30, 2, seed=4))
    second[0][3, 1] = second[1][5, 0] = math.nan
    for results, predictors in (first, second):
        regression.add([1, 3], results, predictors)
    for column, step in enumerate((1, 3)):
        weights, y, x = [], [], []
        for weight, (results, predictors) in ((KEPT, first), (1.0, second)):
            known = results[:, column].isfinite() & predictors[:, column].isfinite()
            y += results[known, column].tolist()
            x += predictors[known, column].tolist()
            weights += [math.sqrt(weight)] * int(known.sum())
        w = torch.tensor(weights, dtype=torch.float64)
        A, b = (torch.tensor(x, dtype=torch.float64) * w)[:, None], torch.tensor(y, dtype=torch.float64) * w
        slope = float(torch.linalg.lstsq(A, b[:, None]).solution)
        assert float(regression.slopes[step]) == pytest.approx(max(slope, 0.0), rel=1e-12)
    assert regression.slopes[[0, 2]].tolist() == [0, 0]


def settings_of(**values: object) -> AdvantageConfig:
    return AdvantageConfig.model_validate({"steps": "gain", "clip": 1e3, **values})


def test_a_first_epoch_has_the_final_advantages_and_the_next_one_its_regression() -> None:
    stepwise, segments = StepAdvantages(settings_of(), len(NOISY)), Segments.of(NOISY, 2)
    final, predicted = normal(12), normal(12, 3, seed=1) + normal(12, seed=0)[:, None]
    equal = torch.arange(12) < 3
    first, _ = stepwise.compute(final, predicted, segments, equal)
    assert torch.equal(first[:, [0, 5]], final.masked_fill(equal, 0)[:, None].expand(-1, 2))
    assert bool((first[:, [2, 7]] == 0).all())
    kept = ~equal
    beta = (final[kept, None] * predicted[kept]).sum(0) / (predicted[kept] ** 2).sum(0)
    second, metrics = stepwise.compute(final, predicted, segments, equal)
    credit = by_definition(final, predicted, beta.clamp(min=0), 0.0).masked_fill(equal[:, None], 0)
    assert bool((second[equal] == 0).all())
    torch.testing.assert_close(second[:, [0, 1, 3, 4, 5, 6]], credit[:, [0, 0, 1, 1, 2, 2]], rtol=1e-12, atol=1e-12)
    expected = torch.corrcoef(torch.stack([final[kept], predicted[kept, 1]]))[0, 1]
    assert metrics["stepwise/correlation_step_3"] == pytest.approx(float(expected), abs=0.2)  # not centred here
    assert metrics["stepwise/beta_step_3"] == pytest.approx(float(beta[1]))


@pytest.mark.parametrize("calibrated", [True, False, "branches"])
def test_the_slope_of_predictions_is_measured_whatever_the_credit_is_weighted_by(calibrated: object) -> None:
    stepwise, segments = StepAdvantages(settings_of(calibrated=calibrated), 3), Segments.of((True,) * 3, 1)
    final, predicted = normal(12), normal(12, 3, seed=1) + normal(12)[:, None]
    unequal = torch.zeros(12, dtype=torch.bool)
    stepwise.compute(final, predicted, segments, unequal)
    _, metrics = stepwise.compute(final, predicted, segments, unequal)
    beta = (final[:, None] * predicted).sum(0) / (predicted**2).sum(0)
    assert [metrics[f"stepwise/beta_step_{step}"] for step in range(3)] == pytest.approx(beta.tolist())


def test_the_rescaled_control_is_the_final_advantage_in_the_size_of_the_gain() -> None:
    segments = Segments.of((True,) * 4, 1)
    final, predicted, equal = normal(12), normal(12, 4, seed=1), torch.arange(12) < 3
    predicted[6:, 0] = torch.nan  # a step that no image of these groups trains
    gain, rescaled = (
        StepAdvantages(settings_of(calibrated=False, control=control), 4).compute(final, predicted, segments, equal)[0]
        for control in ("none", "rescaled")
    )
    assert torch.equal(gain.isnan(), rescaled.isnan()) and bool((rescaled[equal] == 0).all())
    for step in range(4):
        rows = ~equal & ~gain[:, step].isnan()
        ratio = rescaled[rows, step] / final[rows]
        torch.testing.assert_close(ratio, ratio[0].expand_as(ratio))
        assert float(ratio[0]) == pytest.approx(float(gain[rows, step].norm() / final[rows].norm()))
    nothing, _ = StepAdvantages(settings_of(calibrated=False, control="rescaled"), 4).compute(
        final, predicted, segments, equal | True
    )
    assert bool((nothing.nan_to_num() == 0).all())


def test_gains_of_every_two_steps_are_correlated_over_recent_epochs() -> None:
    """The reference is numpy's weighted covariance about 0: the second epoch counts 1, the first KEPT."""
    stepwise, segments, equal = StepAdvantages(settings_of(), 5), Segments.of((True,) * 5, 2), torch.arange(9) < 2
    gains, weights = [], []
    for epoch, weight in enumerate((KEPT, 1.0)):
        final, predicted = normal(9, seed=epoch), normal(9, 3, seed=10 + epoch)
        stepwise.compute(final, predicted, segments, equal)
        gains.append(torch.cat([predicted, final[:, None]], dim=1).diff(dim=1)[~equal])
        weights += [weight] * 7
    rows, weight = torch.cat(gains), torch.tensor(weights, dtype=torch.float64)[:, None]
    products = (weight * rows).T @ rows
    expected = products / products.diagonal().sqrt() / products.diagonal().sqrt()[:, None]
    again = StepAdvantages(settings_of(), 5)
    again.load_state_dict(stepwise.state_dict())
    found = again.gain_correlations()
    assert found["steps"] == [0, 2, 4]
    torch.testing.assert_close(torch.tensor(found["correlations"]).double(), expected, rtol=0, atol=1e-4)
    half = normal(9, 3, seed=20)
    half[:, 0] = math.nan  # the first gain is not known, and all else is
    fresh = StepAdvantages(settings_of(), 5)
    fresh.compute(final, half, segments, equal)
    assert fresh.gain_correlations()["steps"] == [2, 4]


def test_epochs_whose_images_are_all_equal_calibrate_nothing() -> None:
    """Until some images differ every step has the final advantage, also where a step is never asked for."""
    stepwise, segments = StepAdvantages(settings_of(), 6), Segments.of((True,) * 6, 2)
    final, predicted = normal(10), normal(10, 3, seed=1)
    predicted[:, 2] = torch.nan  # no trained step needs it
    equal = torch.ones(10, dtype=torch.bool)
    stepwise.compute(final, predicted, segments, equal)
    found, _ = stepwise.compute(final, predicted, segments, ~equal)
    assert torch.equal(found[:, :2], final[:, None].expand(-1, 2))
    beta = ((final[:, None] * predicted).sum(0) / (predicted**2).sum(0)).clamp(min=0)
    found, _ = stepwise.compute(final, predicted, segments, ~equal)
    torch.testing.assert_close(found[:, 0], beta[1] * predicted[:, 1] - beta[0] * predicted[:, 0])


def test_rewards_that_cancel_have_no_credit() -> None:
    """Images with different rewards whose weighted units are all 0."""
    segments, unequal = Segments.of((True,) * 3, 1), torch.zeros(4, dtype=torch.bool)
    final, predicted = torch.zeros(4, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)
    advantages, metrics = StepAdvantages(settings_of(), 3).compute(final, predicted, segments, unequal)
    assert not advantages.any() and "stepwise/left_step_0" not in metrics


def test_the_last_gain_of_a_window_is_taken_as_it_is() -> None:
    """An audit of the same step inside another window measured what later steps leave of it; here none follow."""
    stepwise = StepAdvantages(settings_of(calibrated="branches"), 4)
    stepwise.branches.add([0, 1], torch.full((5, 2), 0.5).double(), torch.ones(5, 2).double())
    stepwise.seen = {0, 1}
    final, predicted = normal(6), normal(6, 2, seed=1)
    found, _ = stepwise.compute(
        final, predicted, Segments.of((True, True, False, False), 1), torch.zeros(6, dtype=torch.bool)
    )
    torch.testing.assert_close(found[:, 0], 0.5 * (predicted[:, 1] - predicted[:, 0]))
    torch.testing.assert_close(found[:, 1], final - predicted[:, 1])


def test_a_state_of_other_steps_or_rewards_says_nothing() -> None:
    before = StepAdvantages(settings_of(), 4)
    before.learn_spreads([3.0])
    before.seen = {0, 1, 2, 3}
    after = StepAdvantages(settings_of(), 6)
    after.load_state_dict(before.state_dict())
    assert not after.seen and after.predictions.slopes.shape == (6,)
    before.learn_spreads([1.0, 2.0])
    assert before.spreads == [1.0, 2.0]


def test_spreads_are_those_of_images_that_are_told_apart() -> None:
    stepwise = StepAdvantages(settings_of(), 4)
    for spreads in ([0.0, 0.2], [0.5, 0.0], [1.5, 0.4]):
        stepwise.learn_spreads(spreads)
    assert stepwise.spreads == pytest.approx([0.9 * 0.5 + 0.1 * 1.5, 0.9 * 0.2 + 0.1 * 0.4])
    total, components = rewards()
    total[:5] = 0.3
    units = RewardUnits(total, components, SPECS, GROUPS, settings_of(scale="earlier"), "sum", [0.0])
    other = RewardUnits(total, components, SPECS, GROUPS, settings_of(), "each", [7.0])  # of a run with one reward
    assert torch.equal(other.final, RewardUnits(total, components, SPECS, GROUPS, settings_of(), "each").final)
    own = total.reshape(3, 5).std(dim=1, correction=0)
    assert units.spreads == pytest.approx([float(own[1:].mean())])
    assert float(units.divisors[0][5]) == pytest.approx(float(own[1]), rel=1e-6)


def test_a_saved_state_goes_on_as_if_it_had_not_stopped() -> None:
    segments, equal = Segments.of(NOISY, 1), torch.zeros(10, dtype=torch.bool)
    whole = StepAdvantages(settings_of(steps="baseline"), len(NOISY))
    halves = StepAdvantages(settings_of(steps="baseline"), len(NOISY))
    for epoch in range(4):
        final, predicted = normal(10, seed=epoch), normal(10, 6, seed=10 + epoch)
        for one in (whole, halves):
            one.learn_spreads([0.1 * epoch + 0.1])
        expected, _ = whole.compute(final, predicted, segments, equal)
        found, _ = halves.compute(final, predicted, segments, equal)
        assert torch.equal(expected, found)
        state, halves = halves.state_dict(), StepAdvantages(settings_of(steps="baseline"), len(NOISY))
        halves.load_state_dict(state)
    assert halves.spreads == whole.spreads


# Units


NORMALIZATION = AdvantageConfig.model_fields["normalization"].annotation
"""A new one is taught to RewardUnits, or refused together with what needs it."""
SPECS = (RewardConfig(name="a", weight=0.7), RewardConfig(name="b", weight=-1.0))
GROUPS = torch.arange(3).repeat_interleave(5)


def rewards(seed: int = 0) -> tuple[Tensor, Tensor]:
    components = normal(15, 2, seed=seed)
    return components @ torch.tensor([0.7, -1.0], dtype=torch.float64), components


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("normalize", ["sum", "each"])
@pytest.mark.parametrize("normalization", sorted({*get_args(NORMALIZATION)} - {"running"}))
def test_final_rewards_in_units_are_the_usual_advantages(normalization: str, normalize: str, unbiased: bool) -> None:
    settings = settings_of(normalization=normalization, unbiased=unbiased)
    units = RewardUnits(*rewards(), SPECS, GROUPS, settings, normalize)
    usual = compose_advantages(*rewards(), SPECS, GROUPS, settings, normalize)
    torch.testing.assert_close(units.final, usual, rtol=1e-12, atol=1e-12)
    assert units.of(*rewards(), torch.arange(15)).allclose(usual, rtol=1e-12, atol=1e-12)


def test_predictions_are_centred_among_themselves_and_divided_as_the_final_rewards_are() -> None:
    units = RewardUnits(*rewards(), SPECS, GROUPS, settings_of(), "sum")
    rows, (total, components) = torch.arange(5, 15), rewards(seed=3)
    found = units.of(total[rows], components[rows], rows)
    final = rewards()[0]
    for group in (1, 2):
        members = group == GROUPS
        expected = (total[members] - total[members].mean()) / final[members].std(correction=0)
        torch.testing.assert_close(found[members[5:]], expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("unbiased", [False, True])
def test_the_spread_of_others_leaves_the_image_itself_out(unbiased: bool) -> None:
    total, components = rewards()
    units = RewardUnits(total, components, SPECS, GROUPS, settings_of(scale="others", unbiased=unbiased), "sum")
    for row in range(15):
        members = [other for other in range(15) if GROUPS[other] == GROUPS[row]]
        others = total[[other for other in members if other != row]].std(correction=int(unbiased))
        expected = float((total[row] - total[members].mean()) / (others + 1e-8))
        assert float(units.final[row]) == pytest.approx(expected, rel=1e-9)


def test_the_spread_of_earlier_epochs_and_the_least_spread() -> None:
    total, components = rewards()
    earlier = RewardUnits(total, components, SPECS, GROUPS, settings_of(scale="earlier"), "sum", [2.5])
    center = total - total.reshape(3, 5).mean(1).repeat_interleave(5)
    torch.testing.assert_close(earlier.final, center / (2.5 + 1e-8), rtol=1e-12, atol=1e-12)
    nearly = total * torch.tensor([1.0, 1e-9, 1.0]).double().repeat_interleave(5)
    guarded = RewardUnits(nearly, components, SPECS, GROUPS, settings_of(min_spread=0.2), "sum", [2.5])
    assert float(guarded.divisors[0][5]) == pytest.approx(0.5, rel=1e-6)
    assert float(guarded.divisors[0][0]) == pytest.approx(float(total[:5].std(correction=0)), rel=1e-6)
    first = RewardUnits(nearly, components, SPECS, GROUPS, settings_of(min_spread=0.2), "sum")
    assert float(first.divisors[0][5]) == pytest.approx(0.2 * first.spreads[0], rel=1e-6)  # of the epoch itself
    others = settings_of(steps="final", scale="others", min_spread=0.2)
    assert float(RewardUnits(nearly, components, SPECS, GROUPS, others, "sum", [2.5]).divisors[0][5]) == pytest.approx(
        0.5
    )
    same = torch.cat([torch.full((5,), 0.3, dtype=torch.float64), total[5:]])
    assert (
        RewardUnits(same, components, SPECS, GROUPS, settings_of(), "sum").equal.tolist() == [True] * 5 + [False] * 10
    )


@pytest.mark.parametrize("normalize", ["sum", "each"])
def test_branches_of_an_epoch_without_spread_say_nothing(normalize: str) -> None:
    """No standard deviation to divide by: the slopes of earlier audits must not be drowned by huge numbers."""
    same, components = torch.full((15,), 0.3).double(), rewards()[1]
    flat = torch.full_like(components, 0.3)
    units = RewardUnits(same, flat, SPECS, GROUPS, settings_of(), normalize, [0.5] if normalize == "sum" else [0.5, 1])
    assert not units.changes(normal(4), normal(4, 2, seed=1)).any()
    one = torch.stack([components[:, 0], flat[:, 1]], dim=1)
    if normalize == "each":
        units = RewardUnits(same, one, SPECS, GROUPS, settings_of(), normalize)
        changes = normal(4, 2)
        expected = changes[:, 0] * 0.7 / (units.spreads[0] + 1e-8) / units.divisor
        torch.testing.assert_close(units.changes(normal(4), changes), expected)


@pytest.mark.parametrize(("members", "min_spread"), [(slice(None), 0.1), (slice(0, 5), 0.0)])
def test_predictions_of_a_reward_whose_final_scores_are_equal_count_for_nothing(
    members: slice, min_spread: float
) -> None:
    """Of all images, or of one group with nothing that says how small a spread may be."""
    total, components = rewards()
    components[members, 1] = 1.0
    units = RewardUnits(total, components, SPECS, GROUPS, settings_of(min_spread=min_spread), "each")
    predicted = normal(15, 2, seed=5)
    found = units.of(total, predicted, torch.arange(15))
    predicted[members, 1] = 0.0
    assert torch.equal(found, units.of(total, predicted, torch.arange(15)))
    assert float(found.abs().max()) < 20


# Bias, on a chain whose gradient is known: x1 = x0 + theta + s z1, x2 = x1 + theta + s z2, reward x2²


def chain(groups: int, members: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Score functions [G, n, 2] of both steps, final rewards [G, n], and predictions' [G, n, 2]."""
    theta, s = 0.4, 0.7
    x0, z1, z2 = normal(3, groups, members, seed=seed)
    x1 = x0 + theta + s * z1
    final = (x1 + theta + s * z2) ** 2
    predicted = torch.stack([(x0 + 1.1) ** 2, (x1 + 0.2) ** 2], dim=-1)  # wrong on purpose
    return torch.stack([z1, z2], dim=-1) / s, final, predicted


def gradient(scale: str, members: int, weights: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and standard error of the baseline's and the final advantage's gradient estimates, over many groups."""
    groups = 60_000
    score, final, predicted = chain(groups, members, seed=members)
    labels = torch.arange(groups).repeat_interleave(members)
    specs, flat = (RewardConfig(name="a"),), final.flatten()
    units = RewardUnits(flat, flat[:, None], specs, labels, settings_of(scale=scale), "sum", [2.0])
    rows = torch.arange(len(flat))
    found = torch.stack(
        [units.of(column.flatten(), column.flatten()[:, None], rows) for column in predicted.unbind(-1)], 1
    )
    beta = torch.tensor(weights, dtype=torch.float64)
    baseline = segment_credit(units.final, found, beta, 1.0) - units.final[:, None]  # only what it adds to final
    estimates = (score.flatten(0, 1) * baseline).reshape(groups, members, 2).mean(dim=1)
    finals = (score.flatten(0, 1) * units.final[:, None]).reshape(groups, members, 2).mean(dim=1)
    return estimates.mean(dim=0), estimates.std(dim=0) / math.sqrt(groups), finals.mean(dim=0)


@pytest.mark.parametrize("scale", ["earlier", "others"])
def test_the_baseline_has_no_bias_where_the_divisor_does_not_depend_on_the_noise(scale: str) -> None:
    mean, error, final = gradient(scale, 6, (0.9, 0.6))
    assert bool((mean.abs() < 4.5 * error).all())
    if scale == "earlier":  # d E[reward] / d theta_i = 4 theta, divided by the spread, times 1 - 1/n of centring
        expected = 2 * 2 * 0.4 / 2.0 * (1 - 1 / 6)
        torch.testing.assert_close(final, torch.full_like(final, expected), rtol=0.05, atol=0)


def test_the_groups_own_spread_leaves_a_bias_that_shrinks_with_the_group() -> None:
    """To the numbers of docs/stepwise.md: of the first step, and beside it the final advantage's gradient."""
    for members, bias, signal in ((4, 0.220, 0.33), (12, 0.054, 0.41), (24, 0.028, 0.43)):
        mean, error, final = gradient("own", members, (0.9, 0.6))
        assert bool((mean.abs() > 4.5 * error).all())
        assert float(mean[0]) == pytest.approx(bias, abs=0.005) and float(final[0]) == pytest.approx(signal, abs=0.005)
