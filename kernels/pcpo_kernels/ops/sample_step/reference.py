"""A sampler step in plain PyTorch: the reference for the kernel's tests and the path on CPUs."""

import math

import torch
from torch import Tensor

from pcpo_kernels.arithmetic import per_row, reduce_rows, wide_dtype
from pcpo_kernels.ops.noise.reference import resolve_noise
from pcpo_kernels.types import NoiseKey, Reduction, SampledStep


@torch.no_grad()
def sample_step(
    latents: Tensor,
    output: Tensor,
    a: Tensor,
    b: Tensor,
    std: Tensor,
    noise: Tensor | NoiseKey | None,
    reduction: Reduction,
) -> SampledStep:
    """Plain PyTorch version of :func:`pcpo_kernels.sample_step`."""
    dtype = wide_dtype(latents, output)
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
