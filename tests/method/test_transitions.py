"""Sampler tables against public implementations' numbers, published values, and independent derivations."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from pcpo_fast.method.transitions import (
    Transitions,
    check_times,
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

GOLDEN = Path(__file__).parents[1] / "golden"
SETTINGS = json.loads((GOLDEN / "steps.json").read_text())

steps_strategy = st.integers(2, 60)
shift_strategy = st.floats(0.2, 10)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "steps.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]).double() for name in arrays}


def golden_table(name, golden):
    chosen = SETTINGS[name]
    if name == "dance":
        return dance_sde(shifted_times(chosen["steps"], chosen["shift"]), chosen["eta"])
    if name == "flowgrpo":
        return flow_sde(golden["flowgrpo_sigmas"], chosen["noise_level"])
    alphas = stable_diffusion_alphas(beta_start=chosen["beta_start"], beta_end=chosen["beta_end"])
    return ddim(alphas, golden["ddim_timesteps"].long(), chosen["eta"])


OUTPUTS = {"dance": ("v", "vnew"), "flowgrpo": ("v", "vnew"), "ddim": ("eps", "epsnew")}


@pytest.fixture(params=list(OUTPUTS))
def public(request, golden):
    """(table, x, f_old, f_new, x', logp [N, 2, B], mean or None) of a public implementation."""
    name = request.param
    x, next_latents, logp = (golden[f"{name}_{part}"] for part in ("x", "next", "logp"))
    f_old, f_new = (golden[f"{name}_{part}"] for part in OUTPUTS[name])
    return golden_table(name, golden), x, f_old, f_new, next_latents, logp, golden.get(f"{name}_mean")


def per_step(column, like):
    return column.reshape(-1, *[1] * (like.ndim - 1))


def mean_of(table, x, f):
    return per_step(table.a, x) * x + per_step(table.b, x) * f


def over_elements(values):
    return values.flatten(2).mean(2)


# The public numbers are float32 and of size 1 to 4. Their means came out within 3 float32 roundings of ours, their
# log-probabilities (a difference divided by std, squared, averaged) within 13; twice that is allowed.
EPS32 = torch.finfo(torch.float32).eps


def test_public_times(golden):
    assert torch.allclose(golden_table("dance", golden).times, golden["dance_sigmas"], rtol=0, atol=EPS32)
    table = golden_table("ddim", golden)
    assert torch.equal(table.times, torch.cat([golden["ddim_timesteps"] / 1000, torch.zeros(1)]).double())
    assert torch.equal(golden["ddim_timesteps"].long(), ddim_timesteps(10))


@pytest.mark.parametrize("public", ["dance", "flowgrpo"], indirect=True)
def test_public_mean(public):
    table, x, f_old, _, _, _, mean = public
    assert torch.allclose(mean_of(table, x, f_old), mean, rtol=0, atol=6 * EPS32)


def test_public_step_with_its_noise_is_standard_normal(public):
    """The noise that our table recovers from x' must be the N(0, I) that was drawn, at every step."""
    table, x, f_old, _, next_latents, _, _ = public
    z = (next_latents - mean_of(table, x, f_old)) / per_step(table.std, x)
    count = z[0].numel()
    assert z.flatten(1).mean(1).abs().max() < 5 / math.sqrt(count)
    assert (z.flatten(1).var(1) - 1).abs().max() < 5 * math.sqrt(2 / count)


def test_public_std(golden):
    table = golden_table("flowgrpo", golden)
    assert torch.allclose(table.std, golden["flowgrpo_std"], rtol=6 * EPS32, atol=0)


def test_public_log_probabilities(public):
    table, x, f_old, f_new, next_latents, logp, _ = public
    for index, output in enumerate((f_old, f_new)):
        ours = over_elements(Normal(mean_of(table, x, output), per_step(table.std, x)).log_prob(next_latents))
        assert torch.allclose(ours, logp[:, index], rtol=0, atol=26 * EPS32)


def test_public_log_ratio_without_cancellation(public):
    table, x, f_old, f_new, next_latents, logp, _ = public
    kappa = (table.b / table.std)[:, None]
    z = (next_latents - mean_of(table, x, f_old)) / per_step(table.std, x)
    delta = f_new - f_old
    log_ratio = kappa * over_elements(delta * z) - kappa**2 / 2 * over_elements(delta * delta)
    assert log_ratio.abs().max() > 1e-2, "the new outputs must differ for this to test anything"
    assert torch.allclose(log_ratio, logp[:, 1] - logp[:, 0], rtol=0, atol=6 * EPS32)


def test_log_ratio_is_the_difference_of_log_probabilities(any_table):
    generator = torch.Generator().manual_seed(0)
    x, f_old, delta, z = torch.randn(4, any_table.steps, 2, 33, generator=generator, dtype=torch.float64)
    stochastic = any_table.std > 0
    next_latents = mean_of(any_table, x, f_old) + per_step(any_table.std, x) * z
    std = per_step(any_table.std, x)[stochastic]
    old, new = (
        Normal(mean_of(any_table, x, f)[stochastic], std).log_prob(next_latents[stochastic])
        for f in (f_old, f_old + delta)
    )
    kappa = (any_table.b / any_table.std)[stochastic][:, None]
    log_ratio = kappa * over_elements((delta * z)[stochastic]) - kappa**2 / 2 * over_elements((delta**2)[stochastic])
    assert torch.allclose(log_ratio, over_elements(new - old), rtol=1e-9, atol=1e-9)


TABLES = {
    "dance": lambda: dance_sde(shifted_times(16, 3.0), 0.3),
    "flow": lambda: flow_sde(shifted_times(10, 3.0), 0.7),
    "cps": lambda: coefficients_preserving(shifted_times(10, 3.0), 0.8),
    "ddim": lambda: ddim(stable_diffusion_alphas(), ddim_timesteps(50), 1.0),
    "reshaped": lambda: ddim(stable_diffusion_alphas(), ddim_timesteps(50), 1.0, variance="reshaped"),
    "exact": lambda: ddim(stable_diffusion_alphas(), ddim_timesteps(50), 1.0, variance="exact"),
}


@pytest.fixture(params=list(TABLES))
def any_table(request):
    return TABLES[request.param]()


# Independent derivations


def test_dance_row_from_the_papers_form():
    """mean = x - dt f + eta²/2 score dt, score = -(x - (1 - t) x0) / t², x0 = x - t f, with plain numbers."""
    table = dance_sde(shifted_times(7, 2.5), 0.4)
    for i in range(7):
        u, v = 1 - i / 7, 1 - (i + 1) / 7
        t, t_next = 2.5 * u / (1 + 1.5 * u), 2.5 * v / (1 + 1.5 * v)
        dt = t - t_next
        for x, f in ((1.0, 0.0), (0.0, 1.0), (-0.7, 2.2)):
            x0 = x - t * f
            score = -(x - (1 - t) * x0) / t**2
            mean = x - dt * f + 0.5 * 0.4**2 * score * dt
            assert float(table.a[i]) * x + float(table.b[i]) * f == pytest.approx(mean, rel=1e-12, abs=1e-14)
        assert float(table.std[i]) == pytest.approx(0.4 * math.sqrt(dt), rel=1e-14)


def test_flow_row_from_the_papers_form():
    """x' = x + [v + sigma²/(2t) (x + (1 - t) v)] dt + sigma sqrt(|dt|) z with dt < 0 (Flow-GRPO, eq. 9)."""
    times = shifted_times(6, 3.0)
    table = flow_sde(times, 0.7)
    for i in range(6):
        t, dt = float(times[i]), float(times[i + 1] - times[i])
        sigma = 0.7 * math.sqrt(t / (1 - (float(times[1]) if i == 0 else t)))
        for x, v in ((1.0, 0.0), (0.0, 1.0), (-0.7, 2.2)):
            mean = x + (v + sigma**2 / (2 * t) * (x + (1 - t) * v)) * dt
            assert float(table.a[i]) * x + float(table.b[i]) * v == pytest.approx(mean, rel=1e-12, abs=1e-14)
        assert float(table.std[i]) == pytest.approx(sigma * math.sqrt(-dt), rel=1e-14)


def test_flow_without_a_first_time_of_one_needs_no_exception():
    times = torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64)
    expected = 0.7 * math.sqrt(0.9 / (1 - 0.9)) * math.sqrt(0.4)
    assert float(flow_sde(times, 0.7).std[0]) == pytest.approx(expected, rel=1e-14)


def test_cps_row_from_the_papers_form():
    times = shifted_times(6, 3.0)
    table = coefficients_preserving(times, 0.6)
    for i in range(6):
        t, end = float(times[i]), float(times[i + 1])
        s = end * math.sin(0.6 * math.pi / 2)
        for x, v in ((1.0, 0.0), (0.0, 1.0), (-0.7, 2.2)):
            clean, noise = x - t * v, x + (1 - t) * v
            mean = clean * (1 - end) + noise * math.sqrt(end**2 - s**2)
            assert float(table.a[i]) * x + float(table.b[i]) * v == pytest.approx(mean, rel=1e-12, abs=1e-14)
        assert float(table.std[i]) == pytest.approx(s, abs=1e-16)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_row_from_the_papers_form(eta):
    alphas = stable_diffusion_alphas()
    table = ddim(alphas, ddim_timesteps(20), eta)
    for i, t in enumerate(range(951, 0, -50)):
        alpha, after = float(alphas[t]), float(alphas[max(t - 50, 0)])
        s = eta * math.sqrt((1 - after) / (1 - alpha) * (1 - alpha / after))
        for x, eps in ((1.0, 0.0), (0.0, 1.0), (-0.7, 2.2)):
            clean = (x - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)
            mean = math.sqrt(after) * clean + math.sqrt(1 - after - s**2) * eps
            assert float(table.a[i]) * x + float(table.b[i]) * eps == pytest.approx(mean, rel=1e-9, abs=1e-10)
        assert float(table.std[i]) == pytest.approx(s, rel=1e-9)


def test_stable_diffusion_schedule_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False
    )
    assert torch.equal(stable_diffusion_alphas(), scheduler.alphas_cumprod.double())
    for steps in (2, 10, 25, 30, 50):
        scheduler.set_timesteps(steps)
        assert torch.equal(ddim_timesteps(steps), scheduler.timesteps)


def test_alphas_in_double_precision_stay_close():
    single, double = stable_diffusion_alphas(), stable_diffusion_alphas(dtype=torch.float64)
    assert not torch.equal(single, double)
    assert torch.allclose(single, double, rtol=1e-4)


def test_ode_is_plain_euler():
    times = shifted_times(8, 3.0)
    table = euler_ode(times)
    assert torch.equal(table.a, torch.ones(8).double())
    assert torch.equal(table.b, times[1:] - times[:-1])
    assert torch.equal(table.std, torch.zeros(8).double())


@pytest.mark.parametrize("sampler", [dance_sde, flow_sde])
def test_sde_without_noise_is_the_ode(sampler):
    times = shifted_times(8, 3.0)
    table, ode = sampler(times, 0.0), euler_ode(times)
    assert all(torch.equal(getattr(table, name), getattr(ode, name)) for name in ("a", "b", "std"))


def test_cps_without_noise_is_the_ode():
    times = shifted_times(8, 3.0)
    table, ode = coefficients_preserving(times, 0.0), euler_ode(times)
    assert torch.allclose(table.a, ode.a, rtol=1e-14) and torch.allclose(table.b, ode.b, rtol=1e-13)


# What the samplers do to the marginals of the flow x = (1 - t) x0 + t n, f = n - x0


@settings(deadline=None, max_examples=60)
@given(steps_strategy, shift_strategy, st.floats(0.01, 1.0))
def test_flow_samplers_preserve_the_signal(steps, shift, noise):
    times = shifted_times(steps, shift)
    start, end = times[:-1], times[1:]
    for sampler in (dance_sde, flow_sde, coefficients_preserving):
        table = sampler(times, noise)
        assert torch.allclose(table.a * (1 - start) - table.b, 1 - end, rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=60)
@given(steps_strategy, shift_strategy, st.floats(0.0, 1.0))
def test_cps_preserves_the_noise_level_and_the_sdes_exceed_it(steps, shift, noise):
    times = shifted_times(steps, shift)
    start, end = times[:-1], times[1:]

    def noise_variance(table):
        return (table.a * start + table.b) ** 2 + table.std**2

    assert torch.allclose(noise_variance(coefficients_preserving(times, noise)), end**2, rtol=1e-10, atol=1e-12)
    for sampler in (dance_sde, flow_sde):
        table = sampler(times, noise)
        injected = table.std**2  # sigma² dt
        excess = injected * table.deltas / start + (injected / (2 * start)) ** 2
        assert torch.allclose(noise_variance(table), end**2 + excess, rtol=1e-10, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 333), st.floats(0, 1))
def test_ddim_preserves_signal_and_noise_level(steps, eta):
    alphas = stable_diffusion_alphas()
    timesteps = ddim_timesteps(steps)
    alpha, after = alphas[timesteps], alphas[(timesteps - 1000 // steps).clamp(min=0)]
    table = ddim(alphas, timesteps, eta)
    assert torch.allclose(table.a * alpha.sqrt(), after.sqrt(), rtol=1e-12)
    level = (table.a * (1 - alpha).sqrt() + table.b) ** 2 + table.std**2
    assert torch.allclose(level, 1 - after, rtol=1e-9)


# PCPO's variances


def test_reshaped_variance_of_sd15():
    native, reshaped = TABLES["ddim"](), TABLES["reshaped"]()
    ratio = reshaped.std / native.std
    assert float(ratio.min()) == pytest.approx(0.712856, abs=5e-7)
    assert float(ratio.max()) == pytest.approx(1.247436, abs=5e-7)


def test_exact_variance_of_sd15():
    native, exact = TABLES["ddim"](), TABLES["exact"]()
    ratio = exact.std / native.std
    assert float(ratio.min()) == pytest.approx(0.043005, abs=5e-7)
    assert float(ratio.max()) == pytest.approx(0.606288, abs=5e-7)


def full(value):
    return torch.full((50,), value, dtype=torch.float64)


def sd15_c_and_beta(steps=50):
    alphas = stable_diffusion_alphas()
    timesteps = ddim_timesteps(steps)
    alpha, after = alphas[timesteps], alphas[(timesteps - 1000 // steps).clamp(min=0)]
    return ((1 - alpha) * after / alpha).sqrt(), 1 - after


@pytest.mark.parametrize("weight", [3.3, 4.5, 20.0])
def test_variances_solve_their_equations(weight):
    alphas, timesteps = stable_diffusion_alphas(), ddim_timesteps(50)
    c, beta = sd15_c_and_beta()
    exact = ddim(alphas, timesteps, 1.0, "exact", weight)
    assert torch.allclose((c - (beta - exact.std**2).sqrt()) / exact.std, full(weight), rtol=1e-9)
    assert torch.allclose(exact.b.abs() / exact.std, full(weight), rtol=1e-12)
    reshaped = ddim(alphas, timesteps, 1.0, "reshaped", weight)
    assert torch.allclose((c - weight * reshaped.std) ** 2, beta - reshaped.std**2, rtol=1e-9, atol=1e-12)
    formula = (weight * c + (beta * (weight**2 + 1) - c**2).sqrt()) / (weight**2 + 1)
    assert torch.allclose(reshaped.std, formula, rtol=1e-9)


def test_published_plus_root_solves_the_plus_equation():
    c, beta = sd15_c_and_beta()
    std = TABLES["reshaped"]().std
    assert torch.allclose((c + (beta - std**2).sqrt()) / std, full(4.5), rtol=1e-9)


def test_reshaped_table_knows_the_native_credit():
    native, reshaped = TABLES["ddim"](), TABLES["reshaped"]()
    assert torch.allclose(reshaped.reference_credit, native.b.abs() / native.std, rtol=1e-9)
    assert native.reference_credit is None and TABLES["exact"]().reference_credit is None


def test_native_variance_attains_the_smallest_weight():
    """The discriminant vanishes where the weight is the native one, and is negative below."""
    c, beta = sd15_c_and_beta()
    native = TABLES["ddim"]()
    weight = native.b.abs() / native.std
    assert torch.allclose(weight, (c**2 / beta - 1).sqrt(), rtol=1e-9)


@pytest.mark.parametrize("variance", ["reshaped", "exact"])
def test_smallest_weight_is_accepted_and_less_is_refused(variance):
    alphas, timesteps = stable_diffusion_alphas(), ddim_timesteps(50)
    smallest = float((TABLES["ddim"]().b.abs() / TABLES["ddim"]().std).max())
    assert smallest == pytest.approx(3.275, abs=5e-4)
    table = ddim(alphas, timesteps, 1.0, variance, smallest)
    native = TABLES["ddim"]()
    assert float(table.std[48] / native.std[48]) == pytest.approx(1, rel=1e-5)
    with pytest.raises(
        ValueError, match=r"step 48 \(timestep 21\) the credit weight 3\.27: at least 3\.2747\d\d is needed"
    ):
        ddim(alphas, timesteps, 1.0, variance, 3.27)


@pytest.mark.parametrize("variance", ["reshaped", "exact"])
def test_rounding_at_the_limits_is_no_refusal_and_no_nan(variance):
    """The weight that is just reached, and the eta that uses up all noise of a step, whatever their last digit."""
    alphas = stable_diffusion_alphas()
    for steps in range(2, 100):
        timesteps = ddim_timesteps(steps)
        c, beta = sd15_c_and_beta(steps)
        smallest = float((c**2 / beta - 1).sqrt().max())
        assert bool(ddim(alphas, timesteps, 1.0, variance, smallest).std.isfinite().all())
        native = ddim(alphas, timesteps, 1.0).std
        largest = float((beta.sqrt() / native).min())
        assert bool(ddim(alphas, timesteps, largest).b.isfinite().all())


def test_weight_named_in_the_refusal_works():
    alphas, timesteps = stable_diffusion_alphas(), ddim_timesteps(20)
    with pytest.raises(ValueError, match="at least") as refusal:
        ddim(alphas, timesteps, 1.0, "exact")
    needed = float(str(refusal.value).split("at least ")[1].split()[0])
    assert 5 < needed < 6
    assert bool(ddim(alphas, timesteps, 1.0, "exact", needed).std.isfinite().all())


@pytest.mark.parametrize("steps", [10, 20, 25, 27])
@pytest.mark.parametrize("variance", ["reshaped", "exact"])
def test_published_weight_is_refused_at_few_steps(steps, variance):
    with pytest.raises(ValueError, match="at least"):
        ddim(stable_diffusion_alphas(), ddim_timesteps(steps), 1.0, variance)


def test_a_fully_denoising_step_has_no_weight():
    alphas = torch.tensor([1.0, 0.9, 0.5, 0.2])
    assert float(ddim(alphas, torch.tensor([3, 1]), 1.0).std[1]) == 0
    with pytest.raises(ValueError, match="none is enough"):
        ddim(alphas, torch.tensor([3, 1]), 1.0, "exact", 100.0)


# The table itself


def test_tables_are_float64_and_finite(any_table):
    n = any_table.steps
    assert any_table.times.shape == (n + 1,)
    for name in ("times", "a", "b", "std"):
        column = getattr(any_table, name)
        assert column.dtype == torch.float64 and bool(column.isfinite().all())
        assert len(column) == n + (name == "times")
    assert bool((any_table.b < 0).all()), "every sampler here moves against its output"
    assert torch.equal(any_table.deltas, any_table.times[:-1] - any_table.times[1:])


@pytest.mark.parametrize(
    ("name", "final_step", "trained"),
    [
        ("dance", "clean", range(15)),
        ("flow", "noisy", range(10)),
        ("cps", "clean", range(9)),
        ("ddim", "noisy", range(50)),
    ],
)
def test_final_step_and_trainable_steps(name, final_step, trained):
    table = TABLES[name]()
    assert table.final_step == final_step
    assert trainable_steps(table) == list(trained)


def test_trainable_steps_follow_the_final_step():
    assert trainable_steps(replace(TABLES["dance"](), final_step="noisy")) == list(range(16))
    assert trainable_steps(replace(TABLES["cps"](), final_step="noisy")) == list(range(9)), "no noise, no density"
    assert trainable_steps(euler_ode(shifted_times(4, 1.0))) == []
    kept_above_zero = coefficients_preserving(torch.tensor([1.0, 0.6, 0.2]), 0.5)
    assert trainable_steps(kept_above_zero) == [0]


def test_final_row_decodes_the_clean_prediction():
    dance = TABLES["dance"]()
    assert dance.final_row == (1.0, -float(dance.times[15]), 0.0)
    noisy = replace(dance, final_step="noisy")
    assert noisy.final_row == (float(dance.a[15]), float(dance.b[15]), float(dance.std[15]))
    assert float(dance.std[15]) == pytest.approx(0.12, abs=0.005), "what decoding x' would leave in the latents"


def test_final_row_of_ddim():
    table = TABLES["ddim"]()
    assert table.final_row == (float(table.a[-1]), float(table.b[-1]), float(table.std[-1]))
    scale, slope, std = replace(table, final_step="clean").final_row
    alpha = float(stable_diffusion_alphas()[1])
    clean, noise = 0.3, -1.1
    x = math.sqrt(alpha) * clean + math.sqrt(1 - alpha) * noise
    assert scale * x + slope * noise == pytest.approx(clean, rel=1e-9)
    assert std == 0


def test_table_converts_and_owns_its_columns():
    a = torch.ones(2, dtype=torch.float64)
    table = Transitions(times=[1.0, 0.5, 0.0], a=a, b=np.float32([-0.5, -0.5]), std=torch.zeros(2, dtype=torch.float16))
    assert all(column.dtype == torch.float64 for column in (table.times, table.a, table.b, table.std))
    a.zero_()
    assert torch.equal(table.a, torch.ones(2).double())
    with pytest.raises(AttributeError):
        table.a = a


@settings(deadline=None, max_examples=60)
@given(steps_strategy, st.floats(1e-3, 1e3))
def test_shifted_times(steps, shift):
    times = shifted_times(steps, shift)
    assert times.dtype == torch.float64 and len(times) == steps + 1
    assert float(times[0]) == 1.0 and float(times[-1]) == 0.0
    assert bool((times[1:] < times[:-1]).all())
    u = torch.arange(steps, -1, -1).double() / steps
    odds = (times / (1 - times))[1:-1]  # the shift multiplies the odds of u
    assert torch.allclose(odds, (shift * u / (1 - u))[1:-1], rtol=1e-9)


def test_shifted_times_of_flux():
    assert shifted_times(4, 3.0).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0], rel=1e-15)
    assert torch.allclose(shifted_times(10, 1.0), torch.linspace(1, 0, 11, dtype=torch.float64), atol=1e-15)


# Refusals

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([1.0, 0.5, 0.5, 0.0], r"strictly decrease, but 0\.5 follows 0\.5 at position 2"),
        ([0.0, 0.5, 1.0], r"strictly decrease, but 0\.5 follows 0\.0 at position 1"),
        ([1.5, 0.5, 0.0], r"between 1 \(noise\) and 0 \(image\), got 1\.5 at position 0"),
        ([1.0, 0.5, -0.1], r"got -0\.1 at position 2"),
        ([1.0, NAN, 0.0], "finite, got nan at position 1"),
        ([1.0, 0.0], "at least 2 steps, got 1"),
        ([], "at least 2 steps, got 0"),
        ([[1.0, 0.5, 0.0]], "must be a vector"),
    ],
)
@pytest.mark.parametrize(
    "sampler",
    [lambda t: dance_sde(t, 0.3), lambda t: flow_sde(t, 0.7), lambda t: coefficients_preserving(t, 0.5), euler_ode],
    ids=["dance", "flow", "cps", "ode"],
)
def test_bad_times_are_refused(sampler, times, message):
    with pytest.raises(ValueError, match=message):
        sampler(torch.tensor(times, dtype=torch.float64))


@pytest.mark.parametrize("sampler", [dance_sde, flow_sde, coefficients_preserving])
@pytest.mark.parametrize("noise", [-0.1, NAN, INF])
def test_bad_noise_is_refused(sampler, noise):
    with pytest.raises(ValueError, match="noise"):
        sampler(shifted_times(4, 3.0), noise)


def test_cps_noise_above_one_is_refused():
    assert bool((coefficients_preserving(shifted_times(4, 3.0), 1.0).std[:-1] > 0).all())
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.01"):
        coefficients_preserving(shifted_times(4, 3.0), 1.01)


@pytest.mark.parametrize(
    ("steps", "shift"),
    [(1, 3.0), (1.5, 3.0), (True, 3.0), (0, 3.0), (-4, 3.0), (4, 0.0), (4, -1.0), (4, NAN), (4, INF)],
)
def test_bad_grids_are_refused(steps, shift):
    with pytest.raises(
        ValueError, match="must be an integer of at least 2" if steps < 2 else "shift must be a positive number"
    ):
        shifted_times(steps, shift)


def test_shift_that_merges_times_is_refused():
    with pytest.raises(ValueError, match="strictly decrease"):
        shifted_times(4, 1e20)


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ([1], "at least 2 steps"),
        ([501, 1001], "integers within"),
        ([501.5, 1.5], "integers within"),
        ([500, 0], "integers within"),
        ([1, 501], "decrease in steps of 500"),
        ([801, 1], "decrease in steps of 500"),
        ([501, 501], "decrease in steps of 500"),
    ],
)
def test_bad_timesteps_are_refused(timesteps, message):
    with pytest.raises(ValueError, match=message):
        ddim(stable_diffusion_alphas(), torch.tensor(timesteps), 1.0)


@pytest.mark.parametrize("steps", [1, 0, 1000, 2000])
def test_bad_ddim_steps_are_refused(steps):
    with pytest.raises(ValueError, match="steps"):
        ddim_timesteps(steps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eta": -1.0}, "eta must be"),
        ({"eta": NAN}, "eta must be"),
        ({"eta": 5.0}, r"more noise than a step allows: at most 1\.0\d+ is possible"),
        ({"eta": 1.0, "weight": 4.5}, "weight applies to"),
        ({"eta": 0.5, "variance": "exact"}, "replaces eta"),
        ({"eta": 1.0, "variance": "reshaped", "weight": NAN}, "weight must be a positive number"),
        ({"eta": 1.0, "variance": "reshaped", "weight": -4.5}, "weight must be a positive number"),
        ({"eta": 1.0, "variance": "reshaped", "weight": 1e200}, "must be finite"),
        ({"eta": 1.0, "variance": "flat"}, "variance must be one of native, reshaped, exact, got 'flat'"),
    ],
)
def test_bad_ddim_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ddim(stable_diffusion_alphas(), ddim_timesteps(50), **arguments)


def test_alphas_that_cannot_be_a_schedule_are_refused():
    with pytest.raises(ValueError, match="alphas_cumprod"):
        ddim(stable_diffusion_alphas().flip(0), ddim_timesteps(50), 1.0)
    zero_terminal = torch.cat([stable_diffusion_alphas()[:-1], torch.zeros(1)])
    with pytest.raises(ValueError, match="alphas_cumprod"):
        ddim(zero_terminal, ddim_timesteps(50) + 18, 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": [1.0]}, "a has 1 row, but 3 times define 2 steps"),
        ({"b": [1.0, NAN]}, "b must be finite, got nan at position 1"),
        ({"std": [0.1, -0.1]}, r"std must not be negative, got -0\.1 at step 1"),
        ({"std": [[0.1, 0.1]]}, "std must be a vector"),
        ({"final_step": "last"}, "final_step must be one of clean, noisy, got 'last'"),
        ({"reference_credit": [1.0]}, "reference_credit has 1 row"),
    ],
)
def test_bad_tables_are_refused(changes, message):
    columns = {"times": [1.0, 0.5, 0.0], "a": [1.0, 1.0], "b": [-0.5, -0.5], "std": [0.1, 0.1]} | changes
    with pytest.raises(ValueError, match=message):
        Transitions(**columns)


def test_check_times_takes_lists_and_float32():
    assert check_times([1, 0.5, 0]).dtype == torch.float64
    assert check_times(torch.tensor([1.0, 0.1, 0.0])).tolist() == torch.tensor([1.0, 0.1, 0.0]).tolist()
