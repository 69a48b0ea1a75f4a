"""The kernel distance of CMMD: maximum mean discrepancy of CLIP embeddings."""

import math

import torch
from torch import Tensor

SIGMA = 10.0
SCALE = 1000.0
_BLOCK = 4096


def kernel_distance(first: Tensor, second: Tensor, sigma: float = SIGMA, scale: float = SCALE) -> float:
    """Squared maximum mean discrepancy with a Gaussian kernel, times ``scale``.

    The biased (minimum variance) estimator with the constants of CMMD (Jayasumana et al., arXiv 2401.09603, and its
    public code), whose embeddings have unit length. Zero for equal sets; needs no Gaussian assumption and far fewer
    images than a Fréchet distance.

    Args:
        first: [n, d] embeddings.
        second: [m, d].
        sigma: width of the kernel.
        scale: factor that makes the numbers readable.

    Raises:
        ValueError: shapes do not fit, a set is empty or a number is not finite.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1:] != second.shape[1:]:
        raise ValueError(f"embeddings must be [n, d] and [m, d], got {list(first.shape)}, {list(second.shape)}")
    if not (len(first) and len(second)):
        raise ValueError("there are no embeddings")
    x, y = (value.detach().to("cpu", torch.float64) for value in (first, second))
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("embeddings must be finite")
    # The kernels are nearly 1 and their means cancel: 1 - k loses no digits.
    gamma = 1 / (2 * sigma**2)
    spread = 2 * _mean_rest(x, y, gamma) - _mean_rest(x, x, gamma) - _mean_rest(y, y, gamma)
    return max(0.0, scale * spread)


def _mean_rest(x: Tensor, y: Tensor, gamma: float) -> float:
    """Mean of 1 - k over all pairs, some rows at a time."""
    sums = []
    for rows in x.split(_BLOCK):
        squared = (rows.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * rows @ y.T).clamp_min(0)
        sums.append(float(torch.expm1(-gamma * squared).sum()))
    return -math.fsum(sums) / (len(x) * len(y))
