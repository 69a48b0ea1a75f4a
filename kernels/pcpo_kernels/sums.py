"""Adding stored partial sums in a fixed order, for bitwise reproducible results."""

# Kernels are compiled from their source; Triton's types are not Python's.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl
from torch import Tensor

from pcpo_kernels.launch import cdiv, launch

SUM_ROWS, SUM_COLUMNS = 32, 64


@triton.jit
def ordered_sum(values, count, BLOCK: tl.constexpr):
    """Sum of ``count`` stored floats in an order that depends only on ``count``; the loads bypass the L1 cache."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(values + index, mask=index < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total)


@triton.jit(do_not_specialize=["count"])
def token_sums_kernel(partials, result, count, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[G, count, C] to [G, C]: sum over the second axis in an order that depends only on ``count``."""
    group = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < channels
    partials += group.to(tl.int64) * count * channels
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & inside[None, :]
        total += tl.load(partials + row[:, None] * channels + column[None, :], mask=mask, other=0.0)
    result += group.to(tl.int64) * channels
    tl.store(result + column, tl.sum(total, axis=0).to(result.dtype.element_ty), mask=inside)


def token_sums(partials: Tensor, result: Tensor) -> None:
    """Sum float32 [..., P, C] over P in a fixed order, into ``result`` [..., C]."""
    count, channels = partials.shape[-2:]
    if result.numel() > 0:
        grid = (result.numel() // channels, cdiv(channels, SUM_COLUMNS), 1)
        launch(token_sums_kernel, partials, grid, 4, partials, result, count, channels, SUM_ROWS, SUM_COLUMNS)
