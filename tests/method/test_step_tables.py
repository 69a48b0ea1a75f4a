"""The tables of an epoch: noise and credit inside a window, the plain sampler outside."""

from pathlib import Path

import pytest
import torch
from tiny_pipeline import tiny_config
from tiny_runs import Bench

from pcpo_fast.config.loading import load_config
from pcpo_fast.errors import UserError
from pcpo_fast.method.credit import RULES
from pcpo_fast.method.schedules import DiffusionSchedule, FlowSchedule
from pcpo_fast.method.step_tables import EpochTables, RunTables, noisy_only
from pcpo_fast.method.transitions import ddim, ddim_timesteps, euler_ode, shifted_times, stable_diffusion_alphas

CPU = torch.device("cpu")
COLUMNS = ("linear", "quadratic", "scale", "kl")
STEPS = 8
SAMPLERS = {
    "dance": ("sampler.name=dance", "sampler.noise=0.3"),
    "flow": ("sampler.name=flow", "sampler.noise=0.7"),
    "cps": ("sampler.name=cps", "sampler.noise=0.8"),
    "ddim": ("sampler.name=ddim", "sampler.noise=1.0"),
}
WINDOW = ("window.size=3", "window.interval=2")


def tables(sampler: str, *overrides: str) -> RunTables:
    config = load_config(None, [f"sampler.steps={STEPS}", "credit.rule=native", *SAMPLERS[sampler], *overrides])
    if sampler == "ddim":
        return RunTables(config, DiffusionSchedule(stable_diffusion_alphas(), ddim_timesteps(STEPS)), CPU)
    return RunTables(config, FlowSchedule(shifted_times(STEPS, 3.0)), CPU)


def without_noise(sampler: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``a`` and ``b`` of Euler's steps, or of DDIM's with eta 0."""
    if sampler == "ddim":
        plain = ddim(stable_diffusion_alphas(), ddim_timesteps(STEPS), 0.0)
    else:
        plain = euler_ode(shifted_times(STEPS, 3.0))
        assert torch.equal(plain.a, torch.ones(STEPS).double()) and torch.allclose(plain.b, -plain.deltas)
    return plain.a.float(), plain.b.float()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_only_the_window_has_noise(sampler: str) -> None:
    run, whole = tables(sampler, *WINDOW), tables(sampler).at(0)
    a, b = without_noise(sampler)
    for epoch in (0, 3, 9):
        at = run.at(epoch)
        assert at.steps == [epoch // 2 % 5 + offset for offset in range(3)]
        inside = torch.zeros(STEPS, dtype=torch.bool)
        inside[at.steps] = True
        for ours, noisy, plain in (
            (at.sampler.a, whole.sampler.a, a),
            (at.sampler.b, whole.sampler.b, b),
            (at.sampler.std, whole.sampler.std, torch.zeros(STEPS)),
        ):
            assert torch.equal(ours, torch.where(inside, noisy, plain))
        assert at.sampler.noisy == tuple(inside.tolist())
        assert torch.equal(at.sampler.times, whole.sampler.times)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("rule", RULES)
def test_a_window_changes_no_steps_credit(sampler: str, rule: str) -> None:
    """zeta and the rules' means belong to the sampler: a moving window must not rescale the loss as it moves."""
    run, whole = tables(sampler, *WINDOW, f"credit.rule={rule}"), tables(sampler, f"credit.rule={rule}")
    assert run.credit.zeta == whole.credit.zeta and run.credit.trained_steps == whole.credit.trained_steps
    for epoch in (0, 5, 8):
        at = run.at(epoch)
        outside = [step for step in range(STEPS) if step not in at.steps]
        for name in COLUMNS:
            column, expected = getattr(at.credit, name), getattr(whole.at(0).credit, name)
            assert torch.equal(column[at.steps], expected[at.steps])
            assert not column[outside].any()


def test_trained_steps_of_each_epoch() -> None:
    run = tables("flow", *WINDOW)
    assert run.trained_count == 3 and len({tuple(run.at(epoch).steps) for epoch in range(20)}) == 5
    assert run.at(0) is run.at(1) and run.at(0) is run.at(10), "tables are made once for each place"
    plain = tables("flow")
    assert plain.trained_count == 7 and plain.at(0) is plain.at(50) and plain.at(0).steps == list(range(7))


def final_row(at: EpochTables) -> tuple[float, float, float]:
    return tuple(float(column[-1]) for column in (at.sampler.a, at.sampler.b, at.sampler.std))  # type: ignore[return-value]


@pytest.mark.parametrize("sampler", ["flow", "ddim"])
def test_the_last_step_is_clean_until_the_window_reaches_it(sampler: str) -> None:
    run = tables(sampler, *WINDOW, "credit.train_last_step=true")
    assert run.at(11).steps == [5, 6, 7]
    stochastic = run.transitions
    noisy = tuple(float(column[-1].float()) for column in (stochastic.a, stochastic.b, stochastic.std))
    assert final_row(run.at(11)) == noisy and noisy[2] > 0
    a, b = without_noise(sampler)
    assert final_row(run.at(0)) == (float(a[-1]), float(b[-1]), 0.0)


def test_the_kl_coefficient_is_in_the_rows() -> None:
    whole, half = (tables("flow", f"credit.kl_coefficient={beta}") for beta in (1.0, 0.5))
    assert torch.allclose(half.at(0).credit.kl, 0.5 * whole.at(0).credit.kl) and bool(half.at(0).credit.kl.any())


def test_windows_are_refused_before_a_run_begins() -> None:
    with pytest.raises(UserError, match=r"^window\.size: 8 steps exceed the 7 that can be trained"):
        tables("flow", "window.size=8")
    with pytest.raises(UserError, match=r"^window\.start: 5 leaves no room"):
        tables("flow", "window.size=3", "window.start=5")


def test_noisy_only_of_no_step_is_the_plain_sampler() -> None:
    run = tables("flow")
    plain = noisy_only(run.transitions, run.deterministic, [])
    for name in ("times", "a", "b", "std"):
        assert torch.equal(getattr(plain, name), getattr(run.deterministic, name))
    assert plain.final_step == "clean"


# --------------------------------------------------------------------------------------------- on a tiny pipeline


@pytest.mark.usefixtures("process_group")
def test_a_windowed_rollout_takes_eulers_steps_outside(pipeline_folder: Path) -> None:
    """And the images of a group, which start from the same noise, part where the window begins."""
    overrides = ("algorithm=mixgrpo", "sampler.steps=6", "window.size=2", "window.interval=1")
    bench = Bench.build(tiny_config(pipeline_folder, *overrides, "train.micro_batch_size=4"), record=False)
    bench.collect(2)
    assert bench.at.steps == [2, 3]
    rollout, times = bench.rollout, bench.transitions.times.float()
    x, f = rollout.trajectories.latents, rollout.trajectories.outputs
    for step in range(6):
        euler = x[:, step] - (times[step] - times[step + 1]) * f[:, step]
        same = torch.allclose(x[:, step + 1], euler, rtol=0, atol=1e-6)
        assert same == (step not in (2, 3)), step
    group = rollout.groups == rollout.groups[0]
    spread = x[group].std(dim=0).flatten(1).amax(dim=1)
    assert bool((spread[:3] < 1e-6).all()) and bool((spread[3:] > 1e-2).all())
    assert set(rollout.plan.steps.flatten().tolist()) == {2, 3}
