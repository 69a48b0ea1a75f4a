"""Shared by the reference implementations: the dtype of the arithmetic, per-row values, and reductions over a row."""

import functools
import math

import torch
from torch import Tensor

from pcpo_kernels.types import Reduction


def wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is float64, otherwise float32."""
    kinds = [tensor.dtype for tensor in tensors if tensor is not None]
    return functools.reduce(torch.promote_types, kinds, torch.float32)


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """Reshape [B] to [B, 1, ...] so that it broadcasts over the elements of ``like``; cast to its dtype."""
    return values.to(like.dtype).reshape(-1, *([1] * (like.dim() - 1)))


def reduce_rows(values: Tensor, reduction: Reduction) -> Tensor:
    """Mean or sum over everything but the row axis: [B, ...] to [B]."""
    count = math.prod(values.shape[1:])
    sums = values.reshape(values.shape[0], count).sum(dim=1)
    return sums / max(count, 1) if reduction == "mean" else sums
