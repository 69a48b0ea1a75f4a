"""pytest-benchmark versions of the kernel benchmarks, for any machine: ``make bench``.

On a CPU they time the reference path against eager PyTorch as the public trainers write it.
"""

import kernel_baseline as baseline
import pytest
import torch
from kernel_cases import CLIP_RANGE, NOISE, SIZES, make_case
from pcpo_kernels import guidance, philox_normal, policy_loss, sample_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The demonstration's batch, and one image each of the real models.
CASES = [("demo", 96, 512), ("sd15_512", 4, SIZES["sd15_512"]), ("flux_1024", 1, SIZES["flux_1024"])]
cases = pytest.mark.parametrize(("rows", "elements"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])


def finish(value):
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return value


def case_for(rows: int, elements: int):
    return make_case(rows, elements, DEVICE, torch.float32 if DEVICE == "cpu" else torch.bfloat16)


@cases
@pytest.mark.parametrize("form", ["key", "endpoints", "detached", "public"])
def test_policy_loss(benchmark, rows, elements, form) -> None:
    case = case_for(rows, elements)
    case.output.requires_grad_()
    noise = case.key if form == "key" else case.endpoints
    columns = case.linear, case.quadratic, case.scale, case.advantage
    with torch.no_grad():
        mean, std = baseline.transition_mean(case.old_output, case.latents, case.time, case.following, NOISE)
        old = baseline.log_density(case.next_latents, mean, std)

    def ours():
        old_output = None if form == "detached" else case.old_output
        return policy_loss(case.output, old_output, noise, *columns, clip_range=CLIP_RANGE, objective="clip").loss

    def public():
        rest = case.latents, case.next_latents, old, case.time, case.following, NOISE, case.advantage, CLIP_RANGE
        return baseline.policy_loss(case.output, *rest)[0]

    benchmark.group = f"policy_loss forward+backward, {rows} x {elements}"
    loss = public if form == "public" else ours
    benchmark(lambda: finish(torch.autograd.grad(loss(), [case.output])))


@cases
@pytest.mark.parametrize("form", ["key", "public"])
def test_sample_step(benchmark, rows, elements, form) -> None:
    case = case_for(rows, elements)
    benchmark.group = f"sample_step, {rows} x {elements}"
    if form == "key":
        benchmark(lambda: finish(sample_step(case.latents, case.output, case.a, case.b, case.std, case.key)))
    else:
        arguments = case.latents, case.output, case.time, case.following, NOISE
        benchmark(lambda: finish(baseline.sample_step(*arguments)))


@cases
@pytest.mark.parametrize("form", ["ours", "public"])
def test_guidance(benchmark, rows, elements, form) -> None:
    case = case_for(rows, elements)
    halves = [case.unconditional.requires_grad_(), case.output.requires_grad_()]
    scale = torch.full((rows,), 4.5, device=DEVICE)
    combine = (lambda: guidance(*halves, scale)) if form == "ours" else (lambda: baseline.guidance(*halves, 4.5))
    incoming = torch.randn_like(case.output)
    benchmark.group = f"guidance forward+backward, {rows} x {elements}"
    benchmark(lambda: finish(torch.autograd.grad(combine(), halves, incoming)))


@cases
def test_philox_normal(benchmark, rows, elements) -> None:
    case = case_for(rows, elements)
    benchmark.group = f"philox_normal, {rows} x {elements}"
    benchmark(lambda: finish(philox_normal(*case.key, elements)))
