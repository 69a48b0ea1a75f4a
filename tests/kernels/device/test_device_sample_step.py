"""sample_step in Triton against the reference and torch.distributions."""

import itertools

import pytest
import torch
from cases import make_case
from judging import by_reference
from pcpo_kernels import NoiseKey, sample_step
from pcpo_kernels.launch import Plan
from pcpo_kernels.ops.sample_step import triton as kernels
from torch.distributions import Normal

LOW = [torch.float16, torch.bfloat16]


QUICK = {("tensor", LOW[0], "sum"), ("tensor", torch.float32, "mean"), ("key", LOW[1], "mean")}


@pytest.mark.parametrize(
    ("noise", "dtype", "reduction"),
    [
        pytest.param(*form, marks=() if form in QUICK else pytest.mark.slow)
        for form in itertools.product(("tensor", "key"), (*LOW, torch.float32), ("mean", "sum"))
    ],
)
def test_sample_step(device, noise, dtype, reduction) -> None:
    case = make_case(4, (41, 7)).cast(torch.float32).cast(dtype, "output")
    x, _, a, b, std = case.ends
    given = case.to(device).z if noise == "tensor" else case.to(device).key
    arguments = [value.to(device) for value in (x, case.output, a, b, std)]
    step = sample_step(*arguments, given, reduction=reduction)
    a, b, std = (value.double()[:, None, None] for value in (a, b, std))
    mean = a * x.double() + b * case.output.double()
    following = mean + std * case.z.double()
    log_prob = Normal(mean, std).log_prob(following).flatten(1)
    log_prob = log_prob.mean(1) if reduction == "mean" else log_prob.sum(1)
    assert step.next_latents.dtype == torch.float32
    torch.testing.assert_close(step.next_latents.double().cpu(), following, rtol=4e-7, atol=1e-6)
    torch.testing.assert_close(
        step.log_prob.double().cpu(), log_prob, rtol=2e-6, atol=1e-6 if reduction == "mean" else 1e-4
    )
    low = sample_step(
        *(v.to(device) for v in (x.to(dtype), case.output, case.ends.a, case.ends.b, case.ends.std, case.z))
    )
    assert low.next_latents.dtype == dtype
    torch.testing.assert_close(
        low.next_latents.double().cpu(), following, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize(
    ("rows", "elements"), [(1, 1), (3, 2050), pytest.param(1, 300_000, marks=pytest.mark.slow), (9, 3)]
)
def test_sample_step_sizes(device, rows, elements) -> None:
    case = make_case(rows, (elements,)).cast(torch.float32)
    x, _, a, b, std = case.ends
    arguments = [x, case.output, a, b, std]
    # Where in the noise a piece begins shows after two pieces; the sum of 147 does not ask where its noise comes from.
    for noise in (case.z,) if elements == 300_000 else (case.z, case.key):
        there = noise.to(device) if isinstance(noise, torch.Tensor) else NoiseKey(*(p.to(device) for p in noise))
        got = sample_step(*(v.to(device) for v in arguments), there)
        exact = by_reference(sample_step, *(v.double() for v in arguments), noise)
        torch.testing.assert_close(got.next_latents.double().cpu(), exact.next_latents, rtol=4e-7, atol=1e-6)
        torch.testing.assert_close(got.log_prob.double().cpu(), exact.log_prob, rtol=2e-6, atol=1e-6)


def test_one_step_for_all_rows_and_slices_of_trajectories(device) -> None:
    """Columns expanded from one step, latents sliced out of a trajectory: as the rollout hands them over."""
    case = make_case(3, (30,)).cast(torch.float32).to(device)
    x, f = case.ends.latents, case.output
    column = torch.tensor([0.9, -0.1, 0.2], device=device)
    expanded = [value.expand(3) for value in column]
    full = [value.expand(3).contiguous() for value in column]
    wide = torch.full((3, 2, 30), torch.nan, device=device)
    wide[:, 1] = x
    got = sample_step(wide[:, 1], f, *expanded, case.key)
    expected = sample_step(x, f, *full, case.key)
    assert torch.equal(got.next_latents, expected.next_latents)
    assert torch.equal(got.log_prob, expected.log_prob)


def test_step_without_noise_or_density(device) -> None:
    case = make_case(3, (30,)).cast(torch.float32).to(device)
    x, _, a, b, std = case.ends
    step = sample_step(x, case.output, a, b, std, None)
    torch.testing.assert_close(step.next_latents, a[:, None] * x + b[:, None] * case.output, rtol=3e-7, atol=1e-6)
    assert step.log_prob.tolist() == [0.0] * 3
    std = torch.tensor([0.1, 0.0, 0.2], device=device)
    step = sample_step(x, case.output, a, b, std, case.key)
    assert step.log_prob[1].item() == 0.0
    assert step.log_prob[0].item() != 0.0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empty_batches_and_rows(device, reduction) -> None:
    for rows, shape in ((0, (5,)), (3, (0,)), (2, (3, 0))):
        case = make_case(rows, shape).cast(torch.float32).to(device)
        x, _, a, b, std = case.ends
        for noise in (case.z, case.key, None):
            step = sample_step(x, case.output, a, b, std, noise, reduction=reduction)
            exact = by_reference(sample_step, x, case.output, a, b, std, noise, reduction=reduction)
            assert step.next_latents.shape == (rows, *shape)
            torch.testing.assert_close(step.log_prob, exact.log_prob)


@pytest.mark.parametrize("plan", [Plan(128, 3), Plan(256, 2), Plan(1024, 1)])
def test_nothing_depends_on_how_rows_are_cut(device, monkeypatch, plan) -> None:
    case = make_case(2, (1000,)).cast(torch.float32).to(device)
    x, _, a, b, std = case.ends
    expected = sample_step(x, case.output, a, b, std, case.key)
    monkeypatch.setattr(kernels, "plan_for", lambda _: plan)
    step = sample_step(x, case.output, a, b, std, case.key)
    assert torch.equal(step.next_latents, expected.next_latents)
    torch.testing.assert_close(step.log_prob, expected.log_prob, rtol=1e-6, atol=1e-6)
