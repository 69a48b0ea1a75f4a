"""Credit rules against published values and against formulas written out step by step."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from pcpo_fast.config.credit_rules import CREDIT_RULES
from pcpo_fast.method.credit import RULES, credit_table, native_credit, proportionate_credit
from pcpo_fast.method.transitions import (
    Transitions,
    coefficients_preserving,
    dance_sde,
    ddim,
    ddim_timesteps,
    euler_ode,
    flow_sde,
    shifted_times,
    stable_diffusion_alphas,
    trainable_steps,
)

COLUMNS = ("linear", "quadratic", "scale", "kl")


def flux():
    return dance_sde(shifted_times(16, 3.0), 0.3)


def sd15(variance="native", weight=None):
    return ddim(stable_diffusion_alphas(), ddim_timesteps(50), 1.0, variance, weight)


TABLES = {
    "dance": flux,
    "flow": lambda: flow_sde(shifted_times(10, 3.0), 0.7),
    "cps": lambda: coefficients_preserving(shifted_times(10, 3.0), 0.8),
    "ddim": sd15,
}


@pytest.fixture(params=list(TABLES))
def sampler(request):
    return TABLES[request.param]()


# Published values


def test_zeta_of_the_flux_default():
    assert credit_table(flux(), "proportionate").zeta == pytest.approx(13.343190914766362, rel=1e-14)
    native = native_credit(flux())
    assert float(native.min()) == pytest.approx(0.4915, abs=5e-5)
    assert float(native.max()) == pytest.approx(1.6670, abs=5e-5)


def test_zeta_without_the_last_step_of_the_flux_default():
    narrow = credit_table(flux(), "proportionate", range(15), normalize_over="trained")
    assert narrow.zeta == pytest.approx(14.011, abs=5e-4)


def test_zeta_of_the_sd3_default():
    table = TABLES["flow"]()
    assert credit_table(table, "proportionate").zeta == pytest.approx(4.29675, abs=5e-6)
    native = native_credit(table)
    assert float(native[1]) == pytest.approx(0.0694839, abs=5e-8)
    native[0] = native[1]
    assert float(native.sum() / table.deltas.sum()) == pytest.approx(4.3152134639895925, rel=1e-14)


def test_mean_credit_of_sd15():
    native = native_credit(sd15())
    assert float(native.mean()) == pytest.approx(0.5168997, abs=5e-8)
    assert float(native.min()) == pytest.approx(0.374, abs=5e-4)
    assert float(native[:47].max()) == pytest.approx(0.757, abs=5e-4)
    assert native[47:].tolist() == pytest.approx([1.017, 3.275, 1.003], abs=5e-4)


# Native credit


def test_native_credit_of_flow_models_in_closed_form():
    """sqrt(dt)/sigma (1 + (1 - t) sigma²/(2t))."""
    for table, sigma in (
        (flux(), lambda t, first: 0.3),
        (TABLES["flow"](), lambda t, first: 0.7 * math.sqrt(t / (1 - (first if t == 1 else t)))),
    ):
        for i, credit in enumerate(native_credit(table).tolist()):
            t, dt = float(table.times[i]), float(table.times[i] - table.times[i + 1])
            s = sigma(t, float(table.times[1]))
            assert credit == pytest.approx(math.sqrt(dt) / s * (1 + (1 - t) * s**2 / (2 * t)), rel=1e-12)


def test_native_credit_of_ddim_in_closed_form():
    """C / std with C = sqrt(1 - alpha)/sqrt(alpha/alpha') - sqrt(1 - alpha' - std²)."""
    alphas = stable_diffusion_alphas()
    for i, credit in enumerate(native_credit(sd15()).tolist()):
        alpha, after = float(alphas[981 - 20 * i]), float(alphas[max(961 - 20 * i, 0)])
        s = math.sqrt((1 - after) / (1 - alpha) * (1 - alpha / after))
        c = math.sqrt(1 - alpha) / math.sqrt(alpha / after) - math.sqrt(1 - after - s**2)
        assert credit == pytest.approx(c / s, rel=1e-8)


def test_native_credit_is_zero_without_noise():
    assert torch.equal(native_credit(euler_ode(shifted_times(4, 3.0))), torch.zeros(4).double())
    credit = native_credit(TABLES["cps"]())
    assert credit.dtype == torch.float64
    assert float(credit[-1]) == 0 and bool((credit[:-1] > 0).all())


# Every rule, step by step


def expected_row(rule, table, i, native, zeta):
    """(linear, quadratic, scale) of step i in plain numbers."""
    b, s = float(table.b[i]), float(table.std[i])
    dt = float(table.times[i] - table.times[i + 1])
    stochastic = [float(value) for value in table.std if value > 0]
    kappa, sign = b / s, math.copysign(1, b)
    w = abs(kappa)
    flat = sum(native) / len(stochastic)
    return {
        "native": (kappa, kappa * kappa / 2, 1),
        "proportionate": (sign * zeta * dt, (zeta * dt) ** 2 / 2, 1),
        "uniform": (sign * flat, flat**2 / 2, 1),
        "pcpo_ratio": (sign * zeta * dt, zeta * dt * w / 2, 1),
        "tempflow": (kappa, kappa * kappa / 2, s / (sum(stochastic) / len(stochastic))),
        "grpo_guard": (b, 0, 1 / dt),
        "fair_clip": (b * s, b * b / 2, 1 / (s * s)),
        "cps_published": (2 * s * b, b * b, 1),
    }[rule]


@pytest.mark.parametrize("rule", RULES)
def test_columns_of_every_rule(sampler, rule):
    table = credit_table(sampler, rule)
    native = native_credit(sampler).tolist()
    stochastic = [i for i in range(sampler.steps) if sampler.std[i] > 0]
    zeta = sum(native) / sum(float(sampler.times[i] - sampler.times[i + 1]) for i in stochastic)
    assert table.zeta == pytest.approx(zeta, rel=1e-13)
    assert table.rule == rule and table.trained_steps == tuple(stochastic)
    for i in range(sampler.steps):
        row = tuple(float(getattr(table, name)[i]) for name in ("linear", "quadratic", "scale"))
        if i in stochastic:
            assert row == pytest.approx(expected_row(rule, sampler, i, native, zeta), rel=1e-12)
        else:
            assert row == (0, 0, 0)


def test_the_configuration_knows_every_rule_and_the_settings_that_matter_to_it(sampler):
    assert tuple(CREDIT_RULES) == RULES
    for rule, takes in CREDIT_RULES.items():
        plain = credit_table(sampler, rule)
        scaled = credit_table(sampler, rule, normalize_scale=True)
        assert torch.allclose(scaled.scale, plain.scale, rtol=1e-12) != ("normalize_scale" in takes)
        some = plain.trained_steps[:-1]
        of_some = credit_table(sampler, rule, some, normalize_over="trained")
        expected = plain.restricted(some)
        same = all(
            torch.allclose(getattr(of_some, name), getattr(expected, name), rtol=1e-12)
            for name in ("linear", "quadratic", "scale")
        )
        assert same != ("normalize_over" in takes)


# What the rules mean for the loss: log-ratios written with the policies' densities


@pytest.fixture
def densities(sampler):
    """(delta z, delta delta, log-probabilities old and new, means, x') per stochastic step, reduced over elements."""
    generator = torch.Generator().manual_seed(1)
    stochastic = sampler.std > 0
    f_old, delta, z = torch.randn(3, int(stochastic.sum()), 200, generator=generator, dtype=torch.float64)
    b, std = sampler.b[stochastic][:, None], sampler.std[stochastic][:, None]
    old, new = b * f_old, b * (f_old + delta)  # a x cancels
    sample = old + std * z
    return {
        "stochastic": stochastic,
        "cross": (delta * z).mean(1),
        "square": (delta * delta).mean(1),
        "log_ratio": (Normal(new, std).log_prob(sample) - Normal(old, std).log_prob(sample)).mean(1),
        "moved": ((new - old) ** 2).mean(1),
        "squared_error": ((sample - new) ** 2 - (sample - old) ** 2).mean(1),
        "std": std[:, 0],
    }


def log_ratio_of(sampler, rule, d):
    table = credit_table(sampler, rule)
    on = d["stochastic"]
    return table.linear[on] * d["cross"] - table.quadratic[on] * d["square"]


def assert_same(actual, expected):
    assert torch.allclose(actual, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_native_and_tempflow_use_the_true_log_ratio(sampler, densities):
    assert_same(log_ratio_of(sampler, "native", densities), densities["log_ratio"])
    assert_same(log_ratio_of(sampler, "tempflow", densities), densities["log_ratio"])


def test_guard_removes_the_bias_of_the_log_ratio_and_multiplies_by_std(sampler, densities):
    """(log r + mean((mean_new - mean_old)²) / (2 std²)) std, GRPO-Guard's eq. 8."""
    std = densities["std"]
    expected = (densities["log_ratio"] + densities["moved"] / (2 * std**2)) * std
    assert_same(log_ratio_of(sampler, "grpo_guard", densities), expected)


def test_fair_clip_multiplies_the_log_ratio_by_the_variance(sampler, densities):
    expected = densities["log_ratio"] * densities["std"] ** 2
    assert_same(log_ratio_of(sampler, "fair_clip", densities), expected)


def test_pcpo_ratio_multiplies_the_log_ratio_by_target_over_native(sampler, densities):
    on = densities["stochastic"]
    factor = (proportionate_credit(sampler) / native_credit(sampler))[on]
    assert_same(log_ratio_of(sampler, "pcpo_ratio", densities), densities["log_ratio"] * factor)


def test_cps_published_is_the_difference_of_squared_errors(sampler, densities):
    assert_same(log_ratio_of(sampler, "cps_published", densities), -densities["squared_error"])


def test_exact_kl_is_that_of_the_two_gaussians(sampler):
    table = credit_table(sampler, "native")
    for i in table.trained_steps:
        change = 0.37
        std = sampler.std[i]
        divergence = kl_divergence(Normal(sampler.b[i] * change, std), Normal(torch.zeros(()).double(), std))
        assert float(table.kl[i]) * change**2 == pytest.approx(float(divergence), rel=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_published_kl_lacks_the_step_length_and_no_rule_changes_the_kl(sampler, rule):
    exact, published = (credit_table(sampler, rule, kl=kl).kl for kl in ("exact", "published"))
    stochastic = sampler.std > 0
    expected = torch.where(stochastic, sampler.b**2 / 2 / sampler.std.where(stochastic, sampler.b) ** 2, 0.0)
    assert torch.allclose(exact, expected, rtol=1e-14)
    assert torch.allclose(published, exact * sampler.deltas, rtol=1e-14)


def test_published_kl_of_sd3_is_4_to_28_times_weaker():
    factor = 1 / TABLES["flow"]().deltas
    assert float(factor.min()) == pytest.approx(4, abs=0.01) and float(factor.max()) == pytest.approx(28, abs=0.01)


# PCPO's properties

grids = st.builds(shifted_times, st.integers(2, 50), st.floats(0.3, 8))


@settings(deadline=None, max_examples=60)
@given(grids, st.floats(0.05, 1.0), st.sampled_from([dance_sde, flow_sde, coefficients_preserving]))
def test_targets_redistribute_the_native_credit(times, noise, make):
    sampler = make(times, noise)
    native = native_credit(sampler)
    target = credit_table(sampler, "proportionate").linear.abs()
    assert float(target.sum()) == pytest.approx(float(native.sum()), rel=1e-12)
    assert torch.allclose(target, proportionate_credit(sampler), rtol=1e-13)
    stochastic = sampler.std > 0
    per_length = (target / sampler.deltas)[stochastic]
    assert float(per_length.max()) == pytest.approx(float(per_length.min()), rel=1e-10)
    flat = credit_table(sampler, "uniform").linear.abs()
    assert float(flat.sum()) == pytest.approx(float(native.sum()), rel=1e-12)
    assert float(flat[stochastic].max()) == float(flat[stochastic].min())


@settings(deadline=None, max_examples=60)
@given(
    grids, st.floats(0.05, 1.0), st.sampled_from([dance_sde, flow_sde, coefficients_preserving]), st.sampled_from(RULES)
)
def test_rules_give_finite_columns_with_the_sign_of_the_transition(times, noise, make, rule):
    sampler = make(times, noise)
    table = credit_table(sampler, rule)
    for name in COLUMNS:
        column = getattr(table, name)
        assert column.dtype == torch.float64 and column.shape == (sampler.steps,)
        assert bool(column.isfinite().all())
        assert bool((column[sampler.std == 0] == 0).all())
    assert torch.equal(table.linear.sign(), torch.where(sampler.std > 0, sampler.b.sign(), 0.0))
    assert bool((table.quadratic >= 0).all()) and bool((table.scale >= 0).all())


def test_sign_follows_the_transition():
    up = Transitions([1.0, 0.6, 0.0], [1.0, 1.0], [0.4, -0.6], [0.2, 0.3])
    for rule in RULES:
        assert credit_table(up, rule).linear.sign().tolist() == [1, -1]


# Trained subsets


@settings(deadline=None, max_examples=80)
@given(st.sets(st.integers(0, 14), min_size=1), st.sampled_from(RULES), st.sampled_from(["exact", "published"]))
def test_a_subset_changes_no_row_and_no_zeta(subset, rule, kl):
    whole, part = credit_table(flux(), rule, kl=kl), credit_table(flux(), rule, subset, kl=kl)
    assert part.zeta == whole.zeta
    assert part.trained_steps == tuple(sorted(subset))
    trained = torch.zeros(16, dtype=torch.bool)
    trained[list(subset)] = True
    for name in COLUMNS:
        assert torch.equal(getattr(part, name)[trained], getattr(whole, name)[trained])
        assert getattr(part, name)[~trained].abs().tolist() == [0.0] * int((~trained).sum())


def test_means_are_narrowed_only_when_asked():
    sampler, trained = flux(), [0, 5, 14]
    native = native_credit(sampler)[trained]
    table = credit_table(sampler, "uniform", trained, normalize_over="trained")
    assert table.linear[trained].tolist() == pytest.approx([-float(native.mean())] * 3, rel=1e-14)
    proportionate = credit_table(sampler, "proportionate", trained, normalize_over="trained")
    assert float(proportionate.linear.abs().sum()) == pytest.approx(float(native.sum()), rel=1e-14)
    assert proportionate.zeta == pytest.approx(float(native.sum() / sampler.deltas[trained].sum()), rel=1e-14)
    tempflow = credit_table(sampler, "tempflow", trained, normalize_over="trained")
    assert float(tempflow.scale[trained].mean()) == pytest.approx(1, rel=1e-14)


@pytest.mark.parametrize("rule", RULES)
def test_scale_can_be_normalised(sampler, rule):
    plain, unit = credit_table(sampler, rule), credit_table(sampler, rule, normalize_scale=True)
    on = sampler.std > 0
    assert float(unit.scale[on].mean()) == pytest.approx(1, rel=1e-13)
    ratio = plain.scale[on] / unit.scale[on]
    assert float(ratio.max()) == pytest.approx(float(ratio.min()), rel=1e-12)
    for name in ("linear", "quadratic", "kl"):
        assert torch.equal(getattr(plain, name), getattr(unit, name))


def test_trained_steps_may_come_in_any_order_and_as_a_tensor():
    first = credit_table(flux(), "native", [7, 2])
    second = credit_table(flux(), "native", torch.tensor([2, 7]))
    assert first.trained_steps == second.trained_steps == (2, 7)
    assert all(type(step) is int for step in second.trained_steps)


def test_trainable_steps_are_accepted(sampler):
    assert credit_table(sampler, "proportionate", trainable_steps(sampler)).trained_steps == tuple(
        trainable_steps(sampler)
    )


def test_stochastic_window_with_deterministic_steps_around_it():
    sampler, ode = flux(), euler_ode(shifted_times(16, 3.0))
    window = torch.zeros(16, dtype=torch.bool)
    window[4:8] = True
    rows = {name: torch.where(window, getattr(sampler, name), getattr(ode, name)) for name in ("a", "b", "std")}
    table = credit_table(Transitions(sampler.times, **rows), "proportionate")
    assert table.trained_steps == (4, 5, 6, 7)
    native = native_credit(sampler)[4:8]
    assert table.zeta == pytest.approx(float(native.sum() / sampler.deltas[4:8].sum()), rel=1e-14)


# PCPO for diffusion: variance and rule


def test_uniform_rule_on_the_reshaped_variance_takes_the_native_mean():
    reshaped = sd15("reshaped")
    table = credit_table(reshaped, "uniform")
    mean = float(native_credit(sd15()).mean())
    assert mean == pytest.approx(4.5 / 8.70575, abs=5e-5)
    assert table.linear.tolist() == pytest.approx([-mean] * 50, rel=1e-9)
    assert table.quadratic.tolist() == pytest.approx([mean**2 / 2] * 50, rel=1e-9)
    own = float(native_credit(reshaped).mean())
    assert abs(own - mean) > 0.01 * mean, "the reshaped sampler's own mean differs, or this test shows nothing"
    narrow = credit_table(reshaped, "uniform", [0, 1], normalize_over="trained")
    assert float(narrow.linear[0]) == pytest.approx(-float(native_credit(sd15())[:2].mean()), rel=1e-9)


def test_exact_variance_has_the_weight_as_native_credit():
    exact = sd15("exact", 6.0)
    assert native_credit(exact).tolist() == pytest.approx([6.0] * 50, rel=1e-12)
    native, uniform = credit_table(exact, "native"), credit_table(exact, "uniform")
    assert torch.allclose(native.linear, uniform.linear, rtol=1e-12)


# Refusals


@pytest.mark.parametrize("rule", RULES)
def test_a_sampler_without_noise_is_refused(rule):
    for table in (
        euler_ode(shifted_times(4, 3.0)),
        dance_sde(shifted_times(4, 3.0), 0.0),
        ddim(stable_diffusion_alphas(), ddim_timesteps(10), 0.0),
    ):
        with pytest.raises(ValueError, match=r"adds no noise at any step.*noise must be above 0"):
            credit_table(table, rule)


def test_proportionate_credit_without_noise_is_refused():
    with pytest.raises(ValueError, match="adds no noise at any step"):
        proportionate_credit(euler_ode(shifted_times(4, 3.0)))


@pytest.mark.parametrize(
    ("trained", "message"),
    [
        ([], "trained_steps is empty"),
        ([3, 16], r"integers from 0 to 15, got 16"),
        ([-1], r"integers from 0 to 15, got -1"),
        ([1.5], r"integers from 0 to 15, got 1\.5"),
        ([math.nan], r"integers from 0 to 15, got nan"),
        ([True], r"integers from 0 to 15, got True"),
        (["3"], r"integers from 0 to 15, got '3'"),
        ([3, 3], "contains step 3 twice"),
        ([14, 15], r"step 15 is the last one and its noise is dropped"),
    ],
)
def test_bad_trained_steps_are_refused(trained, message):
    with pytest.raises(ValueError, match=message):
        credit_table(flux(), "native", trained)


def test_a_noisy_last_step_can_be_trained():
    table = credit_table(replace(flux(), final_step="noisy"), "native", [15])
    assert table.trained_steps == (15,)


def test_a_step_without_noise_cannot_be_trained():
    for final_step in ("clean", "noisy"):
        with pytest.raises(ValueError, match="step 9 adds no noise, so it has no density"):
            credit_table(replace(TABLES["cps"](), final_step=final_step), "native", [0, 9])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "fair"}, "rule must be one of native, proportionate, .*, cps_published, got 'fair'"),
        ({"rule": "native", "kl": "none"}, "kl must be one of exact, published, got 'none'"),
        ({"rule": "native", "normalize_over": "some"}, "normalize_over must be one of all, trained, got 'some'"),
    ],
)
def test_bad_choices_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        credit_table(flux(), **arguments)


@pytest.mark.parametrize("rule", RULES)
def test_vanishing_noise_is_refused_not_nan(rule):
    with pytest.raises(ValueError, match="noise is too small"):
        credit_table(dance_sde(shifted_times(4, 3.0), 1e-200), rule)
