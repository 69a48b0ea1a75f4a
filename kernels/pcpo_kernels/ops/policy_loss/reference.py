"""The policy loss in plain PyTorch: the reference for the kernels' tests and the path on CPUs.

Arithmetic is float32, or float64 if the model output is float64, whatever the dtypes of the other inputs.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pcpo_kernels.arithmetic import per_row, reduce_rows, wide_dtype
from pcpo_kernels.ops.guidance.reference import guided
from pcpo_kernels.ops.noise.reference import resolve_noise
from pcpo_kernels.ops.policy_loss.inputs import LossInputs
from pcpo_kernels.types import Endpoints, PolicyLoss


def taylor_error(log_ratio: Tensor, surplus: Tensor) -> Tensor:
    """``|e^l - 1 - l| / |e^l - 1|``, 0 where ``l`` is 0 and 1 where ``e^l`` overflows.

    Near 0 the difference cancels and its series is used instead, so the result is accurate to the dtype's precision.
    """
    series = torch.full_like(log_ratio, 1 / math.factorial(9))
    for order in range(8, 1, -1):
        series = series * log_ratio + 1 / math.factorial(order)
    gap = torch.where(log_ratio.abs() < 0.1, series * log_ratio * log_ratio, surplus - log_ratio)
    error = torch.where(log_ratio == 0, torch.zeros_like(gap), (gap / surplus).abs())
    return torch.where(torch.isinf(surplus), torch.ones_like(error), error)


class _PolicyLossFunction(torch.autograd.Function):
    """Loss with an explicit gradient: only three row vectors and the inputs are saved for the backward."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, output: Tensor, unconditional: Tensor | None, noise: Tensor, rows: Tensor, inputs: LossInputs
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        linear, quadratic, scale, advantage, kl, divergence = rows.unbind(0)
        clip_range, reduction = float(inputs.clip_range), inputs.reduction
        old_output, reference = inputs.old_output, inputs.reference
        f = guided(output.to(rows.dtype), unconditional, inputs.guidance_scale)
        log_ratio, distance = torch.zeros_like(linear), torch.zeros_like(linear)
        if old_output is not None:
            delta = f - old_output.to(f.dtype)
            with_noise, with_itself = reduce_rows(delta * noise, reduction), reduce_rows(delta * delta, reduction)
            log_ratio = linear * with_noise - quadratic * with_itself
            distance = divergence * with_itself
        surplus = torch.expm1(log_ratio)  # the ratio minus 1, without cancellation
        change = log_ratio if inputs.objective == "hinge" else surplus
        # A row with advantage 0 contributes nothing, even if its ratio has overflowed (0 * inf is NaN).
        gain = torch.where(advantage == 0, torch.zeros_like(advantage), advantage * change)
        margin = clip_range * advantage.abs() - gain
        clipped = margin < 0
        if inputs.objective == "divergence_mask":
            clipped = (distance >= clip_range) & (log_ratio.sign() * advantage.sign() > 0)
        if inputs.objective == "hinge":
            policy_term = torch.clamp(margin, min=0)
            slope = -advantage
        else:
            bound = advantage if inputs.objective == "divergence_mask" else -clip_range * advantage.abs()
            policy_term = -advantage + torch.where(clipped, bound, -gain)
            slope = torch.where(advantage == 0, torch.zeros_like(advantage), -advantage * torch.exp(log_ratio))
        # where() instead of a product: 0 times the infinite slope of a clipped row would be NaN.
        slope = torch.where(clipped, torch.zeros_like(slope), slope)
        error = taylor_error(log_ratio, surplus)
        row_loss = scale * policy_term
        kl_term = torch.zeros_like(row_loss)
        if reference is not None:
            gap = f - reference.to(f.dtype)
            kl_term = kl * reduce_rows(gap * gap, reduction)
            row_loss = row_loss + kl_term
        count = max(rows.shape[1], 1)
        loss = row_loss.sum() / count
        elements = math.prod(output.shape[1:]) if reduction == "mean" else 1
        share = 1.0 / (count * max(elements, 1))
        weights = torch.stack((scale * slope * linear, -2 * scale * slope * quadratic, 2 * kl)) * share
        ctx.save_for_backward(output, unconditional, inputs.guidance_scale, old_output, noise, reference, weights)
        ctx.mark_non_differentiable(log_ratio, clipped, error, kl_term, distance)
        return loss, log_ratio, clipped, error, kl_term, distance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        output, unconditional, guidance_scale, old_output, noise, reference, weights = ctx.saved_tensors
        on_noise, on_delta, on_gap = (per_row(row, noise) for row in weights * grad_loss.to(weights.dtype))
        gradient = on_noise * noise
        if old_output is not None or reference is not None:
            f = guided(output.to(weights.dtype), unconditional, guidance_scale)
        if old_output is not None:
            gradient = gradient + on_delta * (f - old_output.to(f.dtype))
        if reference is not None:
            gradient = gradient + on_gap * (f - reference.to(f.dtype))
        if unconditional is None:
            return gradient.to(output.dtype), None, None, None, None
        g = per_row(guidance_scale, gradient)
        return (g * gradient).to(output.dtype), ((1 - g) * gradient).to(unconditional.dtype), None, None, None


def policy_loss(inputs: LossInputs) -> PolicyLoss:
    """Plain PyTorch version of :func:`pcpo_kernels.policy_loss`."""
    output, unconditional, old = inputs.output, inputs.unconditional, inputs.old_output
    dtype = wide_dtype(output)
    with torch.no_grad():
        behind = output.detach().to(dtype)
        if isinstance(inputs.noise, Endpoints):
            behind = guided(behind, unconditional, inputs.guidance_scale) if old is None else old.to(dtype)
        z = resolve_noise(inputs.noise, behind)
        kl = torch.zeros_like(inputs.linear) if inputs.kl is None else inputs.kl
        divergence = inputs.quadratic if inputs.divergence is None else inputs.divergence
        columns = inputs.linear, inputs.quadratic, inputs.scale, inputs.advantage, kl, divergence
        rows = torch.stack([column.to(dtype) for column in columns])
    result = PolicyLoss._make(_PolicyLossFunction.apply(output, unconditional, z, rows, inputs))
    return result if inputs.reference is not None else result._replace(kl=None)
