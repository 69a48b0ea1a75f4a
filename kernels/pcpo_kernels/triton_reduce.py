"""Sums of stored partial sums, in a fixed order."""

# Kernels are compiled from their source; Triton's types are not Python's.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl


@triton.jit
def ordered_sum(values, count, BLOCK: tl.constexpr):
    """Sum of ``count`` stored floats in an order that depends on ``count`` alone, read past the first-level cache."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(values + index, mask=index < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total)
