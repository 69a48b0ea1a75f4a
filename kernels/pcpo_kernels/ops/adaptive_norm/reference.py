"""The transformer-block ops in plain PyTorch: the judge of the kernel tests and the path taken on CPUs.

Arithmetic is float32, or float64 where an input is float64; results are rounded once.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional


def wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where a tensor is float64, otherwise float32."""
    kinds = [tensor.dtype for tensor in tensors if tensor is not None]
    return functools.reduce(torch.promote_types, kinds, torch.float32)


def adaptive_norm(
    source: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """Gated residual (where there is a branch), then layer norm and modulation (where there is a shift)."""
    wide = wide_dtype(source, branch, gate, shift, scale)
    hidden, normed = source, None
    if branch is not None and gate is not None:
        hidden = (source.to(wide) + gate.to(wide)[:, None] * branch.to(wide)).to(source.dtype)
    if shift is not None and scale is not None:
        plain = functional.layer_norm(hidden.to(wide), hidden.shape[-1:], eps=eps)
        normed = (plain * (1 + scale.to(wide)[:, None]) + shift.to(wide)[:, None]).to(source.dtype)
    return hidden, normed


def norm_rope(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    second: Tensor | None,
    second_weight: Tensor | None,
    eps: float,
) -> Tensor:
    """Plain PyTorch version of :func:`pcpo_kernels.norm_rope`."""
    wide = wide_dtype(x, weight, cos, sin, second_weight)

    def norm(heads: Tensor, factor: Tensor | None) -> Tensor:
        h = heads.to(wide)
        plain = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
        return plain if factor is None else plain * factor.to(wide)

    y = norm(x, weight)
    if second is not None:
        y = torch.cat((y, norm(second, second_weight)), dim=1)
    if cos is not None and sin is not None:
        even, odd = y.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((-odd, even), dim=-1).flatten(-2)
        y = y * cos.to(wide)[:, None] + turned * sin.to(wide)[:, None]
    return y.to(x.dtype)
