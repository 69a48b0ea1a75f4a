"""Gated residual, layer norm and modulation in plain PyTorch: the reference for the tests and the path on CPUs.

Arithmetic is float32, or float64 if an input is float64; results are rounded once.
"""

from torch import Tensor
from torch.nn import functional

from pcpo_kernels.arithmetic import wide_dtype
from pcpo_kernels.ops.adaptive_norm.inputs import Tokens


def adaptive_norm(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Gated residual (if there is a branch), then layer norm and modulation (if there is a shift)."""
    source, branch, gate, shift, scale, eps = tokens
    wide = wide_dtype(source, branch, gate, shift, scale)
    hidden = normed = source
    if branch is not None and gate is not None:
        hidden = (source.to(wide) + gate.to(wide)[:, None] * branch.to(wide)).to(source.dtype)
    if shift is not None and scale is not None:
        plain = functional.layer_norm(hidden.to(wide), hidden.shape[-1:], eps=eps)
        normed = (plain * (1 + scale.to(wide)[:, None]) + shift.to(wide)[:, None]).to(source.dtype)
    return hidden, normed
