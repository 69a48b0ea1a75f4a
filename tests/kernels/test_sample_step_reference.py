"""The reference path of sample_step against torch.distributions and float64."""

import pytest
import torch
from cases import make_case
from pcpo_kernels import philox_normal, sample_step
from torch.distributions import Normal

LOW = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def on_the_reference_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PCPO_KERNELS", "reference")


@pytest.mark.parametrize("reduction", ("mean", "sum"))
@pytest.mark.parametrize("noise", ["tensor", "key"])
def test_sample_step(reduction, noise) -> None:
    case = make_case(5, (6, 7))
    x, _, a, b, std = case.ends
    given = case.z if noise == "tensor" else case.key
    step = sample_step(x, case.output, a, b, std, given, reduction=reduction)
    a, b, std = (value[:, None, None] for value in (a, b, std))
    mean = a * x + b * case.output
    torch.testing.assert_close(step.next_latents, mean + std * case.z)
    log_prob = Normal(mean, std).log_prob(mean + std * case.z).flatten(1)
    torch.testing.assert_close(step.log_prob, log_prob.mean(1) if reduction == "mean" else log_prob.sum(1))


@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
def test_sample_step_precision(dtype) -> None:
    case = make_case(5, (300,)).cast(torch.float32).cast(dtype, "output")
    x, _, a, b, std = case.ends
    step = sample_step(x, case.output, a, b, std, case.z)
    judge = sample_step(x.double(), case.output.double(), a.double(), b.double(), std.double(), case.z.double())
    assert step.next_latents.dtype == step.log_prob.dtype == torch.float32
    torch.testing.assert_close(step.next_latents.double(), judge.next_latents, rtol=3e-7, atol=1e-6)
    torch.testing.assert_close(step.log_prob.double(), judge.log_prob, rtol=3e-7, atol=1e-6)
    low = sample_step(x.to(dtype), case.output, a, b, std, case.z).next_latents
    assert low.dtype == dtype


def test_sample_step_without_noise() -> None:
    case = make_case(3, (4,))
    x, _, a, b, std = case.ends
    step = sample_step(x, case.output, a, b, std, None)
    torch.testing.assert_close(step.next_latents, a[:, None] * x + b[:, None] * case.output)
    assert step.log_prob.tolist() == [0.0, 0.0, 0.0]
    std = torch.tensor([0.1, 0.0, 0.2], dtype=torch.float64)
    step = sample_step(x, case.output, a, b, std, case.z)
    assert step.log_prob[1].item() == 0.0
    assert step.log_prob[0].item() != 0.0
    torch.testing.assert_close(step.next_latents[1], a[1] * x[1] + b[1] * case.output[1])


def test_noise_of_a_key_is_philox_normal() -> None:
    case = make_case(3, (10,))
    x = torch.zeros(3, 10)
    step = sample_step(x, x, torch.ones(3), torch.ones(3), torch.ones(3), case.key)
    assert torch.equal(step.next_latents, philox_normal(*case.key, 10))


def test_errors() -> None:
    x, rows = torch.ones(3, 4), torch.ones(3)
    with pytest.raises(ValueError, match="output must have"):
        sample_step(x, torch.ones(3, 5), rows, rows, rows, None)
    with pytest.raises(ValueError, match="std must hold one value per row"):
        sample_step(x, x, rows, rows, rows[:1], None)
    with pytest.raises(TypeError, match="latents must be"):
        sample_step(x.long(), x, rows, rows, rows, None)
    with pytest.raises(ValueError, match="b is on meta"):
        sample_step(x, x, rows, rows.to("meta"), rows, None)
    with pytest.raises(ValueError, match="reduction"):
        sample_step(x, x, rows, rows, rows, None, reduction="none")  # type: ignore[arg-type]
