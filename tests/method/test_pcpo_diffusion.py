"""PCPO for diffusion models from the configuration: three variances and their credit, refusals, v prediction."""

import math

import pytest
import torch
from pcpo_kernels import Endpoints, policy_loss
from torch import Tensor

from pcpo_fast.config.loading import load_config
from pcpo_fast.errors import UserError
from pcpo_fast.method.credit import native_credit
from pcpo_fast.method.schedules import DiffusionSchedule
from pcpo_fast.method.step_tables import RunTables
from pcpo_fast.method.transitions import PredictionType, ddim_timesteps, stable_diffusion_alphas

CPU = torch.device("cpu")
MEAN_CREDIT = 0.5168997  # of the native variance with 50 steps of Stable Diffusion 1.5
EPS32 = torch.finfo(torch.float32).eps


def schedule(steps: int, prediction: PredictionType = "epsilon") -> DiffusionSchedule:
    return DiffusionSchedule(stable_diffusion_alphas(), ddim_timesteps(steps), prediction)


def tables(*overrides: str, steps: int = 50, prediction: PredictionType = "epsilon") -> RunTables:
    config = load_config(None, ["algorithm=pcpo_ddpo", f"sampler.steps={steps}", *overrides])
    return RunTables(config, schedule(steps, prediction), CPU)


@pytest.mark.parametrize("algorithm", ["pcpo_ddpo", "pcpo_diffusion"])
def test_uniform_credit_is_the_mean_native_credit(algorithm: str) -> None:
    made = tables(f"algorithm={algorithm}")
    native = native_credit(made.transitions)
    assert float(native.mean()) == pytest.approx(MEAN_CREDIT, abs=5e-8)
    for step in made.credit.trained_steps:
        assert float(made.credit.linear[step]) == pytest.approx(-MEAN_CREDIT, abs=5e-8)
        assert float(made.credit.quadratic[step]) == pytest.approx(MEAN_CREDIT**2 / 2, abs=5e-8)
    # The mean runs over all 50 steps, also where the last one is not trained.
    assert made.trained_count == (50 if algorithm == "pcpo_ddpo" else 49)


def test_the_reshaped_variance_is_the_published_one() -> None:
    """Plus root, 4.5; the uniform credit is that of the native variance: 4.5 / 8.70575 in the authors' code."""
    native, reshaped = tables(), tables("sampler.variance=reshaped")
    ratio = reshaped.transitions.std / native.transitions.std
    assert float(ratio.min()) == pytest.approx(0.712856, abs=5e-7)
    assert float(ratio.max()) == pytest.approx(1.247436, abs=5e-7)
    assert torch.equal(reshaped.credit.linear, native.credit.linear)
    assert float(reshaped.credit.linear[0]) == pytest.approx(-4.5 / 8.70575076181, abs=1e-7)
    assert torch.equal(
        tables("sampler.variance=reshaped", "sampler.weight=4.5").transitions.std, reshaped.transitions.std
    )
    # The shape does not make the sampler's own credit uniform; the loss does.
    own = native_credit(reshaped.transitions)
    assert float(own.max() / own.min()) > 2


def test_the_exact_variance_has_the_credit_itself() -> None:
    native, exact = tables(), tables("sampler.variance=exact", "credit.rule=native")
    ratio = exact.transitions.std / native.transitions.std
    assert float(ratio.min()) == pytest.approx(0.043005, abs=5e-7)
    assert float(ratio.max()) == pytest.approx(0.606288, abs=5e-7)
    assert exact.credit.linear.tolist() == pytest.approx([-4.5] * 50, rel=1e-9)
    lower = tables("sampler.variance=exact", "sampler.weight=3.3", "credit.rule=native").credit
    assert lower.linear.tolist() == pytest.approx([-3.3] * 50, rel=1e-9)


@pytest.mark.parametrize("variance", ["reshaped", "exact"])
@pytest.mark.parametrize("steps", [10, 25, 26, 27])
def test_a_variance_that_does_not_exist_is_refused(variance: str, steps: int) -> None:
    """The authors' code takes the root of a negative number there: NaN."""
    reason = r"^sampler: no variance gives step \d+ \(timestep \d+\) the credit weight 4\.5: at least [\d.]+ is needed$"
    with pytest.raises(UserError, match=reason) as caught:
        tables(f"sampler.variance={variance}", steps=steps)
    needed = str(caught.value).split("at least ")[1].split(" ")[0]
    made = tables(f"sampler.variance={variance}", f"sampler.weight={needed}", steps=steps)
    assert bool(made.transitions.std.isfinite().all()) and bool((made.transitions.std > 0).all())
    tables(steps=steps)  # the native variance serves any number of steps


@pytest.mark.parametrize("steps", [28, 30, 40, 50, 100])
def test_the_published_weight_serves_28_steps_and_more(steps: int) -> None:
    made = tables("sampler.variance=reshaped", steps=steps)
    for column in (made.transitions.std, made.credit.linear, made.credit.quadratic):
        assert bool(column.isfinite().all()) and bool((column != 0).all())


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("sampler.weight=4.5",), "^sampler: weight applies to the variances reshaped and exact"),
        (("sampler.variance=exact", "sampler.weight=3.2"), "^sampler: no variance gives step 48"),
        (("sampler.variance=reshaped", "sampler.noise=0.5"), "^sampler: the variance reshaped replaces eta"),
        (("sampler.noise=3.0",), "^sampler: eta 3.0 adds more noise than a step allows"),
        (("algorithm=pcpo", "sampler.variance=exact"), "sampler.variance: only the sampler ddim lets you choose"),
    ],
)
def test_variances_that_cannot_be_are_refused(overrides: tuple[str, ...], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        tables(*overrides)


def test_pcpos_variances_are_for_epsilon() -> None:
    with pytest.raises(
        UserError, match=r"^sampler: the variance reshaped is derived for epsilon prediction; with v_pre"
    ):
        tables("sampler.variance=reshaped", prediction="v_prediction")


# ------------------------------------------------------------------------------------------------- v prediction


def log_ratio(made: RunTables, new: Tensor, old: Tensor, x: Tensor, following: Tensor) -> Tensor:
    at = made.at(0)
    ends = Endpoints(x, following, *(column.double() for column in (at.sampler.a, at.sampler.b, at.sampler.std)))
    ones = torch.ones(len(x), dtype=torch.float64)
    columns = (at.credit.linear, at.credit.quadratic, at.credit.scale)
    return policy_loss(new, old, ends, *(column.double() for column in columns), ones, clip_range=1.0).log_ratio


def test_native_credit_of_a_v_model_gives_the_log_ratio_of_its_epsilon() -> None:
    """One sampler in two coordinates: the density of x', and so the ratio, does not know which the network predicts."""
    of_epsilon = tables("algorithm=ddpo")
    of_v = tables("algorithm=ddpo", prediction="v_prediction")
    alphas = stable_diffusion_alphas()[ddim_timesteps(50)][:, None, None, None]
    x, v_old, change, z = (torch.randn(50, 4, 6, 5, dtype=torch.float64) for _ in range(4))
    v_new = v_old + 0.1 * change
    old, new = ((1 - alphas).sqrt() * x + alphas.sqrt() * v for v in (v_old, v_new))
    at = of_epsilon.at(0).sampler
    a, b, std = (column.double()[:, None, None, None] for column in (at.a, at.b, at.std))
    following = a * x + b * old + std * z
    expected = log_ratio(of_epsilon, new, old, x, following)
    # z is recovered from float32 columns, in which the v sampler's a and b are rounded differently.
    scale = 1 / float(at.std.min())
    assert torch.allclose(log_ratio(of_v, v_new, v_old, x, following), expected, rtol=1e-5, atol=40 * EPS32 * scale)
    assert bool((expected.abs() > 1e-3).any())
    # A step's credit is counted in the network's own output: sqrt(alpha) times that of epsilon.
    ratio = native_credit(of_v.transitions) / native_credit(of_epsilon.transitions)
    assert torch.allclose(ratio, alphas.flatten().sqrt(), rtol=1e-9)


def test_uniform_credit_of_a_v_model_is_the_mean_of_its_own() -> None:
    made = tables(prediction="v_prediction")
    mean = float(native_credit(made.transitions).mean())
    assert made.credit.linear.tolist() == pytest.approx([-mean] * 50) and not math.isclose(mean, MEAN_CREDIT)
