"""Adding stored partial sums in a fixed order, for bitwise reproducible results."""

# Kernels are compiled from their source; Triton's types are not Python's.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl
from torch import Tensor

from pcpo_kernels.launch import COMPILED, cdiv, launch

SUM_ROWS, SUM_COLUMNS = 32, 64


@triton.jit
def ordered_sum(values, count, BLOCK: tl.constexpr):
    """Sum of ``count`` stored floats in an order that depends only on ``count``; the loads bypass the L1 cache."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(values + index, mask=index < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total)


@triton.jit
def add_products(totals, x, y, LANES: tl.constexpr):
    """Add ``x y`` to a vector of sums, one for each ``LANES`` (a power of 2) neighbours, by fused multiply-adds.

    Sums of further neighbourhoods are added up, to as many as there are ``totals``. Where a thread holds whole groups
    of neighbours, nothing changes threads.
    """
    GROUPS: tl.constexpr = x.shape[0] // LANES
    FEWER: tl.constexpr = totals.shape[0]
    if GROUPS > FEWER:
        sums = _add_neighbours(tl.zeros((GROUPS,), tl.float32), x, y, LANES)
        totals += tl.sum(tl.reshape(sums, (GROUPS // FEWER, FEWER)), axis=0)
    else:
        totals = _add_neighbours(totals, x, y, LANES)
    return totals


@triton.jit
def _add_neighbours(totals, x, y, LANES: tl.constexpr):
    if LANES == 1:
        totals = tl.fma(x, y, totals)
    else:
        HALF: tl.constexpr = x.shape[0] // 2
        x0, x1 = tl.split(tl.reshape(x, (HALF, 2)))
        y0, y1 = tl.split(tl.reshape(y, (HALF, 2)))
        totals = _add_neighbours(totals, x0, y0, LANES // 2)
        totals = _add_neighbours(totals, x1, y1, LANES // 2)
    return totals


@triton.jit
def _add_two(x0, y0, x1, y1):
    return x0 + x1, y0 + y1


@triton.jit
def _add_three(x0, y0, z0, x1, y1, z1):
    return x0 + x1, y0 + y1, z0 + z1


@triton.jit
def sums_of_two(x, y):
    """The sums of two vectors, in one reduction: half the barriers."""
    if COMPILED:
        x, y = tl.reduce((x, y), 0, _add_two)
    else:  # which the interpreter does element by element
        x, y = tl.sum(x), tl.sum(y)
    return x, y


@triton.jit
def sums_of_three(x, y, z):
    """The sums of three vectors, in one reduction."""
    if COMPILED:
        x, y, z = tl.reduce((x, y, z), 0, _add_three)
    else:
        x, y, z = tl.sum(x), tl.sum(y), tl.sum(z)
    return x, y, z


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
        launch(token_sums_kernel, partials, grid, 4, (partials, result), count, channels, SUM_ROWS, SUM_COLUMNS)
