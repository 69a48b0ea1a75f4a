"""Layer norm with modulation, and gated residuals: the ops between the linear layers of a diffusion transformer.

One op covers adaLN-Zero (Peebles and Xie, arXiv 2212.09748, section 3.2), as FLUX and Stable Diffusion 3 use it.
"""

from torch import Tensor

from pcpo_kernels.checks import FLOATS, check_device, check_float, check_like, check_tensor, fits
from pcpo_kernels.dispatch import backend_for
from pcpo_kernels.ops.adaptive_norm.inputs import Tokens

MOST_CHANNELS = 8192


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer norm over the channels, then ``(1 + scale)`` times it plus ``shift``; differentiable in all three.

    Args:
        x: [B, S, C], fp16, bf16, fp32 or fp64.
        shift, scale: [B, C], any float dtype; views, such as the chunks of one linear layer's output, are not copied.
        eps: added to the variance.

    Returns:
        [B, S, C] in the dtype of ``x``; arithmetic in fp32 (fp64 where an input is fp64), rounded once.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes or devices disagree, or there are more than 8192 channels.
    """
    check_modulation(x, shift=shift, scale=scale)
    return _run(Tokens(x, shift=shift, scale=scale, eps=float(eps)))[1]


def gated_residual(residual: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """``residual + gate branch``; differentiable in all three.

    Args:
        residual: [B, S, C], fp16, bf16, fp32 or fp64.
        branch: [B, S, C], any float dtype.
        gate: [B, C], any float dtype; a view is not copied.

    Returns:
        [B, S, C] in the dtype of ``residual``; arithmetic in fp32 (fp64 where an input is fp64), rounded once.

    Raises:
        TypeError, ValueError: as :func:`modulated_norm`.
    """
    check_modulation(residual, gate=gate)
    check_like(residual, ("branch", branch))
    return _run(Tokens(residual, branch, gate))[0]


def gated_residual_norm(
    residual: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """:func:`gated_residual`, and :func:`modulated_norm` of its result, in one pass.

    The norm is taken of the returned sum, after rounding, so that the backward sees the same numbers.

    Args:
        residual, branch: [B, S, C].
        gate, shift, scale: [B, C].
        eps: added to the variance.

    Returns:
        The sum and its modulated norm, both [B, S, C] in the dtype of ``residual``.

    Raises:
        TypeError, ValueError: as :func:`modulated_norm`.
    """
    check_modulation(residual, gate=gate, shift=shift, scale=scale)
    check_like(residual, ("branch", branch))
    return _run(Tokens(residual, branch, gate, shift, scale, float(eps)))


def check_modulation(x: Tensor, **modulation: Tensor) -> None:
    """Raise unless ``x`` is [B, S, C] and every named tensor a float [B, C] on its device."""
    check_tensor("x", x)
    if x.dim() != 3:
        raise ValueError(f"the tokens must be [B, S, C], got shape {tuple(x.shape)}")
    check_float("x", x)
    if not 0 < x.shape[2] <= MOST_CHANNELS:
        raise ValueError(f"there must be 1 to {MOST_CHANNELS} channels, got {x.shape[2]}")
    expected, device = (x.shape[0], x.shape[2]), x.device
    for name, tensor in modulation.items():
        if not fits(tensor, FLOATS, expected, device):
            check_float(name, tensor)
            if tensor.shape != expected:
                raise ValueError(f"{name} must hold a row of channels per image, {expected}, got {tuple(tensor.shape)}")
            check_device(name, tensor, x)


def _run(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """The gated sum and its norm; without a branch or a shift the respective result is meaningless."""
    if backend_for(tokens[:-1]) == "triton":
        from pcpo_kernels.ops.adaptive_norm.triton import adaptive_norm as backend
    else:
        from pcpo_kernels.ops.adaptive_norm.reference import adaptive_norm as backend
    return backend(tokens)
