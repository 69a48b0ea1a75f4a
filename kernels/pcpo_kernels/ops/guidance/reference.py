"""Guidance in plain PyTorch: the reference for the kernels' tests and the path on CPUs."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pcpo_kernels.arithmetic import per_row, wide_dtype


def lerp(start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    """``start + weight (end - start)``, computed from the nearer end: weights 0 and 1 return an input bit for bit."""
    gap = end - start
    return torch.where(weight < 0.5, start + weight * gap, end - (1 - weight) * gap)


def guided(output: Tensor, unconditional: Tensor | None, guidance_scale: Tensor | None) -> Tensor:
    """Classifier-free guidance ``u + g (c - u)`` in the output's dtype; the output itself without ``unconditional``."""
    if unconditional is None or guidance_scale is None:
        return output
    return lerp(unconditional.to(output.dtype), output, per_row(guidance_scale, output))


class _GuidanceFunction(torch.autograd.Function):
    """Computes in a wide dtype and rounds once; only the scale is saved for the backward."""

    @staticmethod
    def forward(ctx: Any, reference: Tensor, output: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        f = output.to(wide_dtype(output, reference))
        ctx.save_for_backward(scale)
        ctx.dtypes = reference.dtype, output.dtype
        return lerp(reference.to(f.dtype), f, per_row(scale, f)).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (scale,) = ctx.saved_tensors
        wide = gradient.to(wide_dtype(gradient))
        g = per_row(scale, wide)
        return ((1 - g) * wide).to(ctx.dtypes[0]), (g * wide).to(ctx.dtypes[1]), None, None


def guidance(reference: Tensor, output: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Plain PyTorch version of :func:`pcpo_kernels.guidance`."""
    return _GuidanceFunction.apply(reference, output, scale, dtype)
