"""Counter-based Gaussian noise: a function of key and element index alone."""

import torch
from torch import Tensor

from pcpo_kernels.dispatch import backend_for


def philox_normal(seed: Tensor, offset: Tensor, count: int) -> Tensor:
    """Standard normal noise, element ``offset + j`` of each row's Philox4x32-10 stream.

    Args:
        seed: int64 [B], the key of each row.
        offset: int64 [B], not negative.
        count: elements per row.

    Returns:
        float32 [B, count] on the device of ``seed``; the same on every device to 1e-6.

    Raises:
        TypeError: seed or offset is not int64.
        ValueError: shapes or devices disagree, or a negative count.
    """
    if seed.shape != offset.shape or seed.dim() != 1:
        raise ValueError(f"seed and offset must both be [B], got {tuple(seed.shape)} and {tuple(offset.shape)}")
    if seed.dtype != torch.int64 or offset.dtype != torch.int64:
        raise TypeError(f"seed and offset must be int64, got {seed.dtype} and {offset.dtype}")
    if seed.device != offset.device:
        raise ValueError(f"seed is on {seed.device} but offset is on {offset.device}")
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    if backend_for(seed) == "triton":
        from pcpo_kernels.ops.noise.triton import philox_normal as backend
    else:
        from pcpo_kernels.ops.noise.reference import philox_normal as backend
    return backend(seed, offset, count)
