"""Single instructions of NVIDIA GPUs that their compiler does not find by itself; plain Triton for all others.

Each gives the same bits either way, but for the approximation.
"""

# Kernels are compiled from their source; Triton's types are not Python's.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from pcpo_kernels.launch import COMPILED


@triton.jit
def wide_product(word, FACTOR: tl.constexpr):
    """The lower and the upper word of the product of two uint32: one multiplication, where 64 bits become two."""
    if COMPILED and is_cuda():
        low, high = tl.inline_asm_elementwise(
            "{.reg .b64 wide; mul.wide.u32 wide, $2, $3; mov.b64 {$0, $1}, wide;}",
            "=r,=r,r,r",
            [word, FACTOR],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
    else:
        product = word.to(tl.uint64) * FACTOR
        low, high = product.to(tl.uint32), (product >> 32).to(tl.uint32)
    return low, high


@triton.jit
def approximate_rsqrt(x):
    """The device's approximation of ``1 / sqrt(x)``, without the three instructions for subnormal x."""
    if COMPILED and is_cuda():
        result = tl.inline_asm_elementwise(
            "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        result = tl.rsqrt(x)
    return result


@triton.jit
def widened(x):
    """As float32; of two bf16 numbers in a register each takes one instruction, where the upper one would take two."""
    if COMPILED and x.dtype == tl.bfloat16 and is_cuda():
        result = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        result = x.to(tl.float32)
    return result
