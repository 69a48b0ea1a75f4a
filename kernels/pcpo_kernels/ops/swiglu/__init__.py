"""The gated activation of a transformer's feed-forward layer."""

from torch import Tensor

from pcpo_kernels.checks import check_float, check_tensor
from pcpo_kernels.dispatch import backend_for


def swiglu(x: Tensor) -> Tensor:
    """``silu(a) b`` of the first half ``a`` and the second half ``b`` of each token's channels; differentiable.

    SwiGLU (Shazeer, arXiv 2002.05202, equation 6) without its linear layers, in the layout of FLUX.2, where one layer
    computes both halves. Only ``x`` is kept for the backward.

    Args:
        x: [B, S, 2C], fp16, bf16, fp32 or fp64; a view is not copied where its last axis is contiguous.

    Returns:
        [B, S, C] in the dtype of ``x``; arithmetic in fp32 (fp64 for fp64), rounded once.

    Raises:
        TypeError: ``x`` is not floating point.
        ValueError: ``x`` does not have three axes, the last of an even length.
    """
    check_tensor("x", x)
    if x.dim() != 3 or x.shape[2] % 2:
        raise ValueError(f"x must be [B, S, 2C], got shape {tuple(x.shape)}")
    check_float("x", x)
    if backend_for(x) == "triton":
        from pcpo_kernels.ops.swiglu.triton import swiglu as backend
    else:
        from pcpo_kernels.ops.swiglu.reference import swiglu as backend
    return backend(x)
