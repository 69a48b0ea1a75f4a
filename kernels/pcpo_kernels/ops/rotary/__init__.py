"""RMS norm of attention heads and rotary position embedding, with two sequences joined on the way."""

from torch import Tensor

from pcpo_kernels.checks import FLOATS, check_device, check_float, check_tensor, fits
from pcpo_kernels.dispatch import backend_for
from pcpo_kernels.ops.rotary.inputs import Heads

LARGEST_HEADS = 1 << 14


def norm_rope(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float = 1e-6,
    *,
    second: Tensor | None = None,
    second_weight: Tensor | None = None,
) -> Tensor:
    """Root-mean-square norm over each head's elements, times a weight, then a rotation of neighbouring pairs.

    Queries and keys of diffusion transformers: RMS norm (Zhang and Sennrich, arXiv 1910.07467), then rotary embedding
    (Su et al., arXiv 2104.09864) in FLUX's layout, where elements 2i and 2i + 1 are a pair:
    ``out[2i] = y[2i] cos[2i] - y[2i+1] sin[2i]`` and ``out[2i+1] = y[2i+1] cos[2i+1] + y[2i] sin[2i+1]``. A second
    sequence, such as the image after the text, with a weight of its own, follows the first in the result, which saves
    joining them in a pass of their own. Differentiable in both sequences and both weights.

    Args:
        x: [B, S, H, D], fp16, bf16, fp32 or fp64; a view is not copied where its last axis is contiguous. D is even.
        weight: [D], any float dtype, or None: no weight.
        cos, sin: [S, D] (of the joined sequence), any float dtype, or None: no rotation.
        eps: added to the mean square.
        second: [B, S2, H, D] in the dtype of ``x``.
        second_weight: [D], or None.

    Returns:
        [B, S + S2, H, D] in the dtype of ``x``; arithmetic in fp32 (fp64 where an input is fp64), rounded once.

    Raises:
        TypeError: a tensor is not floating point, or the sequences differ in dtype.
        ValueError: shapes or devices disagree.
    """
    check_tensor("x", x)
    if x.dim() != 4:
        raise ValueError(f"the heads must be [B, S, H, D], got shape {tuple(x.shape)}")
    check_float("x", x)
    images, tokens, heads, size = x.shape
    if size % 2 or size == 0:
        raise ValueError(f"the size of a head must be even and not 0, got {size}")
    if heads * size > LARGEST_HEADS:
        raise ValueError(f"a token's heads must hold at most {LARGEST_HEADS} elements, got {heads} heads of {size}")
    if second is None and second_weight is not None:
        raise ValueError("second_weight belongs to a second sequence: give second too")
    if second is not None:
        check_float("second", second)
        check_device("second", second, x)
        if second.dtype != x.dtype:
            raise TypeError(f"second must have the dtype of x, {x.dtype}, got {second.dtype}")
        if second.dim() != 4 or (second.shape[0], *second.shape[2:]) != (images, heads, size):
            raise ValueError(
                f"second must be [{images}, S2, {heads}, {size}] like the first, got {tuple(second.shape)}"
            )
        tokens += second.shape[1]
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin go together: give both or neither")
    for name, tensor, shape in (
        ("weight", weight, (size,)),
        ("second_weight", second_weight, (size,)),
        ("cos", cos, (tokens, size)),
        ("sin", sin, (tokens, size)),
    ):
        if tensor is not None and not fits(tensor, FLOATS, shape, x.device):
            check_float(name, tensor)
            check_device(name, tensor, x)
            if tensor.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if backend_for((x, weight, cos, sin, second_weight)) == "triton":
        from pcpo_kernels.ops.rotary.triton import norm_rope as backend
    else:
        from pcpo_kernels.ops.rotary.reference import norm_rope as backend
    return backend(Heads(x, weight, cos, sin, second, second_weight, float(eps)))
