"""Every op in plain PyTorch: the judge of the kernel tests and the path taken on CPUs.

Arithmetic is float32, or float64 where the model output is float64, whatever the dtype of the inputs.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pcpo_kernels.ops.noise.reference import philox_normal
from pcpo_kernels.types import Endpoints, NoiseKey, Objective, PolicyLoss, Reduction, SampledStep


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64 inputs, float32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """Reshape [B] to [B, 1, ...] so that it broadcasts over the elements of ``like``; cast to its dtype."""
    return values.to(like.dtype).reshape(-1, *([1] * (like.dim() - 1)))


def resolve_noise(noise: Tensor | NoiseKey | Endpoints, old_output: Tensor) -> Tensor:
    """The step's noise as a tensor like ``old_output`` (already in accumulation dtype), from any of its three forms."""
    if isinstance(noise, NoiseKey):
        count = math.prod(old_output.shape[1:])
        return philox_normal(noise.seed, noise.offset, count).reshape(old_output.shape).to(old_output.dtype)
    if isinstance(noise, Endpoints):
        mean = (
            per_row(noise.a, old_output) * noise.latents.to(old_output.dtype)
            + per_row(noise.b, old_output) * old_output
        )
        return (noise.next_latents.to(old_output.dtype) - mean) / per_row(noise.std, old_output)
    return noise.to(old_output.dtype)


@torch.no_grad()
def sample_step(
    latents: Tensor,
    output: Tensor,
    a: Tensor,
    b: Tensor,
    std: Tensor,
    noise: Tensor | NoiseKey | None,
    *,
    reduction: Reduction = "mean",
) -> SampledStep:
    """Plain PyTorch version of :func:`pcpo_kernels.sample_step`."""
    dtype = torch.promote_types(accumulation_dtype(latents), accumulation_dtype(output))
    x, f = latents.to(dtype), output.to(dtype)
    following = per_row(a, x) * x + per_row(b, x) * f
    if noise is None:
        return SampledStep(following.to(latents.dtype), torch.zeros(x.shape[0], dtype=dtype, device=x.device))
    z = resolve_noise(noise, f)
    following = following + per_row(std, x) * z
    squares = reduce_rows(z * z, reduction)
    count = 1 if reduction == "mean" else math.prod(x.shape[1:])
    s = std.to(dtype)
    noisy = s > 0
    constant = torch.log(torch.where(noisy, s, torch.ones_like(s))) + 0.5 * math.log(2 * math.pi)
    log_prob = torch.where(noisy, -0.5 * squares - count * constant, torch.zeros_like(s))
    return SampledStep(following.to(latents.dtype), log_prob)


def reduce_rows(values: Tensor, reduction: Reduction) -> Tensor:
    """Mean or sum over everything but the row axis: [B, ...] to [B]."""
    count = math.prod(values.shape[1:])
    sums = values.reshape(values.shape[0], count).sum(dim=1)
    return sums / max(count, 1) if reduction == "mean" else sums


def taylor_error(log_ratio: Tensor, surplus: Tensor) -> Tensor:
    """``|e^l - 1 - l| / |e^l - 1|``, 0 where ``l`` is 0 and 1 where ``e^l`` overflows.

    Near 0 the difference cancels, so its series is summed there: good to the dtype's precision everywhere.
    """
    series = torch.full_like(log_ratio, 1 / math.factorial(9))
    for order in range(8, 1, -1):
        series = series * log_ratio + 1 / math.factorial(order)
    gap = torch.where(log_ratio.abs() < 0.1, series * log_ratio * log_ratio, surplus - log_ratio)
    error = torch.where(log_ratio == 0, torch.zeros_like(gap), (gap / surplus).abs())
    return torch.where(torch.isinf(surplus), torch.ones_like(error), error)


class _PolicyLossFunction(torch.autograd.Function):
    """Loss and gradient by formula, so that nothing but two row vectors and the inputs is kept for the backward."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        output: Tensor,
        unconditional: Tensor | None,
        guidance_scale: Tensor | None,
        old_output: Tensor | None,
        noise: Tensor,
        rows: Tensor,
        reference: Tensor | None,
        clip_range: float,
        objective: Objective,
        reduction: Reduction,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        linear, quadratic, scale, advantage, kl = rows.unbind(0)
        f = guided(output.to(rows.dtype), unconditional, guidance_scale)
        log_ratio = torch.zeros_like(linear)
        if old_output is not None:
            delta = f - old_output.to(f.dtype)
            with_noise, with_itself = reduce_rows(delta * noise, reduction), reduce_rows(delta * delta, reduction)
            log_ratio = linear * with_noise - quadratic * with_itself
        surplus = torch.expm1(log_ratio)  # the ratio minus 1, without cancellation
        change = log_ratio if objective == "hinge" else surplus
        # A row without advantage takes no part, even where its ratio has overflowed (0 * inf is NaN).
        gain = torch.where(advantage == 0, torch.zeros_like(advantage), advantage * change)
        margin = clip_range * advantage.abs() - gain
        clipped = margin < 0
        if objective == "hinge":
            policy_term = torch.clamp(margin, min=0)
            slope = -advantage
        else:
            policy_term = -advantage + torch.maximum(-gain, -clip_range * advantage.abs())
            slope = torch.where(advantage == 0, torch.zeros_like(advantage), -advantage * torch.exp(log_ratio))
        # An infinite slope on a clipped row must not meet a 0: choose, do not multiply.
        slope = torch.where(clipped, torch.zeros_like(slope), slope)
        error = taylor_error(log_ratio, surplus)
        row_loss = scale * policy_term
        divergence = torch.zeros_like(row_loss)
        if reference is not None:
            gap = f - reference.to(f.dtype)
            divergence = kl * reduce_rows(gap * gap, reduction)
            row_loss = row_loss + divergence
        count = max(rows.shape[1], 1)
        loss = row_loss.sum() / count
        elements = math.prod(output.shape[1:]) if reduction == "mean" else 1
        share = 1.0 / (count * max(elements, 1))
        weights = torch.stack((scale * slope * linear, -2 * scale * slope * quadratic, 2 * kl)) * share
        ctx.save_for_backward(output, unconditional, guidance_scale, old_output, noise, reference, weights)
        ctx.mark_non_differentiable(log_ratio, clipped, error, divergence)
        return loss, log_ratio, clipped, error, divergence

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
            return gradient.to(output.dtype), *(None,) * 9
        g = per_row(guidance_scale, gradient)
        return (g * gradient).to(output.dtype), ((1 - g) * gradient).to(unconditional.dtype), *(None,) * 8


def lerp(start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    """``start + weight (end - start)``, taken from the nearer end: weights 0 and 1 return an input bit for bit."""
    gap = end - start
    return torch.where(weight < 0.5, start + weight * gap, end - (1 - weight) * gap)


def guided(output: Tensor, unconditional: Tensor | None, guidance_scale: Tensor | None) -> Tensor:
    """Classifier-free guidance in the output's dtype: ``u + g (c - u)``; the output itself without a second half."""
    if unconditional is None or guidance_scale is None:
        return output
    return lerp(unconditional.to(output.dtype), output, per_row(guidance_scale, output))


class _GuidanceFunction(torch.autograd.Function):
    """The combination in accumulation dtype, rounded once; nothing but the scale is kept for the backward."""

    @staticmethod
    def forward(ctx: Any, reference: Tensor, output: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        f = output.to(torch.promote_types(accumulation_dtype(output), accumulation_dtype(reference)))
        ctx.save_for_backward(scale)
        ctx.dtypes = reference.dtype, output.dtype
        return lerp(reference.to(f.dtype), f, per_row(scale, f)).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (scale,) = ctx.saved_tensors
        wide = gradient.to(accumulation_dtype(gradient))
        g = per_row(scale, wide)
        return ((1 - g) * wide).to(ctx.dtypes[0]), (g * wide).to(ctx.dtypes[1]), None, None


def guidance(reference: Tensor, output: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Plain PyTorch version of :func:`pcpo_kernels.guidance`."""
    return _GuidanceFunction.apply(reference, output, scale, dtype)


def policy_loss(
    output: Tensor,
    old_output: Tensor | None,
    noise: Tensor | NoiseKey | Endpoints,
    linear: Tensor,
    quadratic: Tensor,
    scale: Tensor,
    advantage: Tensor,
    *,
    clip_range: float,
    objective: Objective = "hinge",
    reduction: Reduction = "mean",
    reference: Tensor | None = None,
    kl: Tensor | None = None,
    unconditional: Tensor | None = None,
    guidance_scale: Tensor | None = None,
) -> PolicyLoss:
    """Plain PyTorch version of :func:`pcpo_kernels.policy_loss`."""
    dtype = accumulation_dtype(output)
    with torch.no_grad():
        old = old_output
        if isinstance(noise, Endpoints):
            behind = guided(output.detach().to(dtype), unconditional, guidance_scale) if old is None else old.to(dtype)
        else:
            behind = output.detach().to(dtype)
        z = resolve_noise(noise, behind)
        zero = torch.zeros_like(linear)
        rows = torch.stack([c.to(dtype) for c in (linear, quadratic, scale, advantage, zero if kl is None else kl)])
    loss, log_ratio, clipped, error, divergence = _PolicyLossFunction.apply(
        output, unconditional, guidance_scale, old, z, rows, reference, float(clip_range), objective, reduction
    )
    return PolicyLoss(loss, log_ratio, clipped, error, None if reference is None else divergence)
