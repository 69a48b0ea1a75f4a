"""policy_loss with classifier-free guidance as a trainer calls it: halves in the model's dtype, the rest in fp32.

The old output is ``guidance(unconditional, conditional, scale, dtype=torch.float32)`` of the rollout or of an extra
forward; the reference output is made in the same way from the frozen model's halves.
"""

from dataclasses import replace

import pytest
import torch
from cases import LossCase, make_case
from covering import every_pair
from judging import check_against_judge, on_reference, run
from pcpo_kernels import guidance

HALVES = [torch.bfloat16, torch.float16, torch.float32]
FORMS = ["detached", "key", "endpoints"]


def guided_case(
    form: str, halves: torch.dtype, rows: int = 5, shape: tuple[int, ...] = (8, 31), **settings
) -> LossCase:
    """Halves of a dtype; everything else in fp32."""
    noise = "endpoints" if form == "detached" else form
    case = make_case(rows, shape, noise=noise, detached=form == "detached", with_guidance=True, **settings)
    return case.cast(torch.float32).cast(halves, "output", "unconditional")


@every_pair(halves=HALVES, form=FORMS, objective=["hinge", "clip"], with_reference=[False, True])
def test_halves_of_one_dtype_and_the_rest_in_fp32(device, halves, form, objective, with_reference) -> None:
    """Loss, log-ratio, KL, and the gradients of both halves in their dtype."""
    case = guided_case(form, halves, with_reference=with_reference, objective=objective, clip_range=2e-4, seed=5)
    result = check_against_judge(case, device)
    if form != "detached":
        assert 0 < int(result.clipped.sum()) < 5, "the case should have clipped and unclipped rows"
    assert (result.kl is not None) == with_reference


@pytest.mark.parametrize(
    ("objective", "reduction"), [("hinge", "mean"), pytest.param("clip", "sum", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("form", [pytest.param(f, marks=pytest.mark.slow) if f == "key" else f for f in FORMS])
def test_ratio_is_exactly_1_where_the_halves_are_unchanged(device, form, objective, reduction) -> None:
    """Old outputs combined row by row, with the scale as a number, as a rollout in other batches does it."""
    for halves in HALVES:
        case = guided_case(
            form, halves, with_reference=True, objective=objective, reduction=reduction, seed=HALVES.index(halves)
        )
        case = replace(case, guidance_scale=torch.full((5,), 4.5)).to(device)
        both = zip(case.unconditional.split(1), case.output.split(1), strict=True)
        rows = [guidance(half, other, 4.5, dtype=torch.float32) for half, other in both]
        old = None if form == "detached" else torch.cat(rows)
        result, gradients = run(replace(case, old_output=old))
        assert torch.equal(result.log_ratio, torch.zeros_like(result.log_ratio))
        assert torch.equal(result.taylor_error, torch.zeros_like(result.taylor_error))
        assert not result.clipped.any()
        assert bool((result.kl > 0).all())
        assert [gradient.dtype for gradient in gradients] == [halves, halves]
        assert all(bool((gradient.flatten(1) != 0).any(dim=1).all()) for gradient in gradients)


def test_kl_of_an_unchanged_policy_is_exactly_0(device) -> None:
    """The reference's halves give the same fp32 output: no KL and, without advantage, no gradient."""
    for halves in HALVES:
        case = guided_case("detached", halves, with_reference=True).to(device)
        same = guidance(case.unconditional, case.output, case.guidance_scale, dtype=torch.float32)
        result, gradients = run(replace(case, reference=same, advantage=torch.zeros_like(case.advantage)))
        assert torch.equal(result.kl, torch.zeros_like(result.kl))
        assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


def test_rounding_the_old_output_would_bias_the_ratio(device) -> None:
    """Why it is kept in fp32: in the halves' own dtype an unchanged policy seems to have changed."""
    case = guided_case("key", torch.bfloat16).to(device)
    rounded = guidance(case.unconditional, case.output, case.guidance_scale)
    result, _ = run(replace(case, old_output=rounded))
    assert bool((result.log_ratio != 0).all())


def test_halves_out_of_one_batched_forward(device) -> None:
    """Both halves are slices of one output, and so are their gradients: chunks of it, and every second row."""
    case = guided_case("endpoints", torch.float16, with_reference=True, objective="clip").to(device)
    _, (conditional, unconditional) = run(case)
    for stacked, parts in (
        (torch.cat((case.unconditional, case.output)), lambda whole: whole.chunk(2)),
        (torch.stack((case.unconditional, case.output), 1).flatten(0, 1), lambda whole: (whole[0::2], whole[1::2])),
    ):
        whole = stacked.detach().requires_grad_()
        u, c = parts(whole)
        (got,) = torch.autograd.grad(3 * replace(case, output=c, unconditional=u).run().loss, [whole])
        assert got.dtype == torch.float16
        expected = torch.zeros_like(got)
        for part, gradient in zip(parts(expected), (unconditional, conditional), strict=True):
            part.copy_(gradient)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("halves", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_mixed_steps_idle_and_clipped_rows(device, halves) -> None:
    """A row without credit has the gradient of its KL alone, one without credit and KL none, beside rows that train."""
    case = guided_case("key", halves, with_reference=True, objective="clip", clip_range=1e-3)
    for column in (case.linear, case.quadratic, case.scale):
        column[:2] = 0
    case.kl[0] = 0
    check_against_judge(case, device)
    _, gradients = run(case.to(device))
    exact, _ = on_reference(case)
    for gradient in gradients:
        moved = (gradient.flatten(1) != 0).any(dim=1)
        assert moved.tolist() == [False] + [True] * 4
    assert exact.log_ratio[:2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("form", [pytest.param(f, marks=pytest.mark.slow) if f == "endpoints" else f for f in FORMS])
def test_odd_sizes(device, form) -> None:
    """One element, one row, lengths around a block, an empty batch and empty rows."""
    for rows, elements in ((1, 1), (2, 129), (1, 2049)):
        case = guided_case(form, torch.float16, rows, (elements,), with_reference=True, clip_range=1e-3)
        check_against_judge(case, device)
    for rows, elements in ((0, 5), (3, 0)):
        case = guided_case(form, torch.float16, rows, (elements,), with_reference=True).to(device)
        result, gradients = run(case)
        assert not torch.isnan(result.loss)
        assert [gradient.shape for gradient in gradients] == [(rows, elements)] * 2
