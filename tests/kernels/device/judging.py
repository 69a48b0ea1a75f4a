"""Kernel results against the float64 reference, with a tolerance that plain PyTorch sets."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import LossCase
from pcpo_kernels import PolicyLoss, guidance
from pcpo_kernels.ops.guidance.reference import guided
from torch import Tensor


def gradients(loss: Tensor, case: LossCase, incoming: Tensor | None = None) -> list[Tensor]:
    """Of the output, and of the unconditional half where there is one."""
    inputs = [case.output] + ([] if case.unconditional is None else [case.unconditional])
    return list(torch.autograd.grad(loss, inputs, incoming))


def require_grad(case: LossCase) -> LossCase:
    """A copy whose output (and unconditional half) wants a gradient."""
    half = None if case.unconditional is None else case.unconditional.detach().requires_grad_()
    return replace(case, output=case.output.detach().requires_grad_(), unconditional=half)


def run(case: LossCase) -> tuple[PolicyLoss, list[Tensor]]:
    """Result and gradients of 3 times the loss."""
    case = require_grad(case)
    result = case.run()
    return result, gradients(3 * result.loss, case)


def on_reference(case: LossCase) -> tuple[PolicyLoss, list[Tensor]]:
    """The same on the reference path, on the CPU, in the case's dtypes."""
    result: tuple[PolicyLoss, list[Tensor]] = by_reference(run, case.to("cpu"))
    return result


def by_reference(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """What a function gives on the reference path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PCPO_KERNELS", "reference")
        return function(*arguments, **keywords)


def edge_distance(case: LossCase, exact: PolicyLoss) -> Tensor:
    """How far each row is from the edge of being clipped or masked, [B]."""
    if case.objective == "divergence_mask":
        beyond = (exact.divergence - case.clip_range).cpu()
        return torch.where(beyond < 0, -beyond, torch.minimum(beyond, exact.log_ratio.abs().cpu()))
    change = exact.log_ratio if case.objective == "hinge" else torch.expm1(exact.log_ratio)
    return (case.clip_range - torch.sign(case.advantage.double().cpu()) * change.cpu()).abs()


def assert_close(got: Tensor, plain: Tensor, exact: Tensor, epsilon: float, name: str, floor: float = 0.0) -> None:
    """At most twice plain PyTorch's own error, plus a few roundings of the largest value."""
    error = (got.detach().double().cpu() - exact.detach()).abs()
    assert not torch.isnan(error).any(), f"{name} has NaN"
    if error.numel() == 0:
        return
    own = (plain.detach().double() - exact.detach()).abs().max().item()
    allowed = 2 * own + epsilon * exact.abs().max().item() + floor
    assert error.max().item() <= allowed, f"{name}: error {error.max().item():.3g}, allowed {allowed:.3g}"


def size_of_terms(case: LossCase) -> dict[str, float]:
    """How large the terms are whose sum may be much smaller: the roundings of a sum go with them, not with it."""
    wide = case.to("cpu").cast(torch.float64)
    ratios = 0.0
    if wide.old_output is not None and wide.output.numel() > 0:
        delta = guided(wide.output, wide.unconditional, wide.guidance_scale) - wide.old_output
        count = delta[0].numel() if case.reduction == "sum" else 1
        ratios = count * (wide.linear * delta.flatten(1).square().mean(1).sqrt()).abs().max().item()
    losses = wide.scale * wide.advantage.abs() * (1 + ratios)
    return {"log_ratio": ratios, "loss": losses.mean().item() if losses.numel() else 0.0}


def check_against_judge(case: LossCase, device: torch.device) -> PolicyLoss:
    """Compare a low-precision case on ``device`` with the reference in the same dtypes and in float64."""
    got, got_gradients = run(case.to(device))
    plain, plain_gradients = on_reference(case)
    exact, exact_gradients = on_reference(case.cast(torch.float64))
    epsilon = 4 * torch.finfo(torch.float32).eps
    assert got.loss.dtype == torch.float32
    for name in ("loss", "log_ratio", "taylor_error", "kl", "divergence"):
        ours, theirs, truth = (getattr(result, name) for result in (got, plain, exact))
        if truth is None:
            assert ours is None
        elif name == "taylor_error":  # relative: it follows the log-ratio
            slack = 4 * (got.log_ratio.detach().double().cpu() - exact.log_ratio).abs() + 1e-5 * truth + 1e-12
            assert ((ours.double().cpu() - truth).abs() <= slack).all()
        else:
            assert_close(ours, theirs, truth, epsilon, name, epsilon * size_of_terms(case).get(name, 0.0))
    away = edge_distance(case, exact) > 1e-5
    assert torch.equal(got.clipped.cpu()[away], exact.clipped[away])
    if away.all():
        for ours, theirs, truth, half in zip(
            got_gradients, plain_gradients, exact_gradients, (case.output, case.unconditional), strict=False
        ):
            assert half is not None
            assert ours.dtype == half.dtype
            # One rounding to the gradient's dtype; the interpreter cuts bfloat16 off instead of rounding it.
            assert_close(ours, theirs, truth, max(epsilon, torch.finfo(half.dtype).eps), "gradient")
    return got


def on_policy(case: LossCase) -> LossCase:
    """The case with its own output as the old one, after guidance, exactly as the loss sees it."""
    old = case.output
    if case.unconditional is not None and case.guidance_scale is not None:
        old = guidance(case.unconditional, case.output, case.guidance_scale, dtype=torch.float32)
    return replace(case, old_output=old)
