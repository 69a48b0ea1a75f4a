"""What the kernels of transformer blocks share: how tokens are cut, and sums of stored partial sums over tokens."""

# Kernels are compiled from their source; Triton's types are not Python's.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcpo_kernels.launch import on_device

SUM_ROWS, SUM_COLUMNS = 32, 64


def tokens_per_program(tokens: int) -> int:
    """How many consecutive tokens of one image a backward program takes.

    It depends on the length of the sequence alone, so an image's sums have the same bits in a batch of any size. Few
    for short sequences, so that there are programs enough; many for long ones, so that partial sums cost little.
    """
    return min(16, max(4, triton.next_power_of_2(tokens) // 256))


def launch_options(elements: int, *, sums: int = 0) -> dict[str, Any]:
    """Block and warps for rows of so many elements: 16 of them per thread of a large row, 8 where three sums are kept.

    So a thread needs at most 128 registers, and still loads 16 bytes of bf16 at once.
    """
    block = triton.next_power_of_2(elements)
    warps = min(16 if sums == 3 else 8, max(1, block // 256))
    return {"BLOCK": block, "num_warps": warps, "enable_fp_fusion": False}


def channels_contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself where its last axis is contiguous, whatever the other strides; otherwise a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


@triton.jit(do_not_specialize=["count"])
def token_sums_kernel(partials, result, count, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[G, count, C] to [G, C]: sums over the second axis in an order that depends on ``count`` alone."""
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


def token_sums(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum [..., P, C] float32 over its last axis but one, in a fixed order, to [..., C] of ``dtype``."""
    *groups, count, channels = partials.shape
    result = torch.empty((*groups, channels), dtype=dtype, device=partials.device)
    if result.numel() == 0:
        return result
    grid = (result.numel() // channels, triton.cdiv(channels, SUM_COLUMNS))
    with on_device(partials):
        token_sums_kernel[grid](
            partials, result, count, channels, ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS, num_warps=4, enable_fp_fusion=False
        )
    return result
