"""Norm and rotation of heads in plain PyTorch: the reference for the kernels' tests and the path on CPUs.

Arithmetic is float32, or float64 if an input is float64; results are rounded once.
"""

import torch
from torch import Tensor

from pcpo_kernels.arithmetic import wide_dtype
from pcpo_kernels.ops.rotary.inputs import Heads


def norm_rope(heads: Heads) -> Tensor:
    """Plain PyTorch version of :func:`pcpo_kernels.norm_rope`."""
    x, weight, cos, sin, second, second_weight, eps = heads
    wide = wide_dtype(x, weight, cos, sin, second_weight)

    def norm(sequence: Tensor, factor: Tensor | None) -> Tensor:
        h = sequence.to(wide)
        plain = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
        return plain if factor is None else plain * factor.to(wide)

    y = norm(x, weight)
    if second is not None:
        y = torch.cat((y, norm(second, second_weight)), dim=1)
    if cos is not None and sin is not None:
        even, odd = y.unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack((-odd, even), dim=-1).flatten(-2)
        y = y * cos.to(wide)[:, None] + rotated * sin.to(wide)[:, None]
    return y.to(x.dtype)
