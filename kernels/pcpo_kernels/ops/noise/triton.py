"""Element-indexed Gaussian noise inside kernels: Philox4x32-10 and a bounded Box-Muller transform in float32.

The numbers are those of :mod:`pcpo_kernels.ops.noise.reference`: integers identical, normals to 1e-6. Nothing here
calls a device library, whose sine and cosine bring in float64; every operation is a plain, correctly rounded float32
one, so compiled devices agree bit for bit.
"""

# Kernels are compiled from their source; Triton's types are not Python's.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcpo_kernels.launch import launch, plan_for
from pcpo_kernels.operators import Operator


@triton.jit
def log_of_uniform(word):
    """``log(u)`` for ``u = n 2^-25``, ``n = 2 (word >> 8) + 1``; relative error below 1e-7, also for u nearly 1."""
    n = ((word >> 8) * 2 + 1).to(tl.int32)
    rounded = n.to(tl.float32)
    bits = rounded.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # the mantissa lands in [sqrt(1/2), sqrt(2))
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    unit = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    # n has 25 bits and float32 keeps 24: the lost one comes back, exactly where log(u) is small.
    f = (mantissa - 1.0) + (n - rounded.to(tl.int32)).to(tl.float32) * unit
    p = tl.fma(f, 0.07149753719568253, -0.115712009370327)
    p = tl.fma(f, p, 0.11661510914564133)
    p = tl.fma(f, p, -0.12411050498485565)
    p = tl.fma(f, p, 0.14249937236309052)
    p = tl.fma(f, p, -0.1666848063468933)
    p = tl.fma(f, p, 0.20000708103179932)
    p = tl.fma(f, p, -0.24999989569187164)
    p = tl.fma(f, p, 0.3333333134651184)
    scale = (exponent - 25).to(tl.float32)
    square = f * f
    tail = tl.fma(f * square, p, scale * -2.12194440e-4)  # ln 2 in two parts, the first with few bits
    return tl.fma(scale, 0.693359375, f + tl.fma(square, -0.5, tail))


@triton.jit
def cosine_and_sine(word):
    """Of ``2 pi u`` for ``u = n 2^-25``, ``n = 2 (word >> 8) + 1``; the reduction to an eighth of a turn is exact."""
    n = ((word >> 8) * 2 + 1).to(tl.int32)
    quarter = (n + 4194304) >> 23
    y = (n - (quarter << 23)).to(tl.float32) * 2.384185791015625e-07  # in [-1, 1], times pi / 4
    v = y * y
    s = tl.fma(v, -3.5954399209003896e-05, 0.0024900068528950214)
    s = tl.fma(v, s, -0.08074543625116348)
    s = tl.fma(v, s, -2.4273129284324568e-08)
    sine = tl.fma(y, 0.7853981852531433, y * s)
    c = tl.fma(v, 3.541959813446738e-06, -0.00032596138771623373)
    c = tl.fma(v, c, 0.01585433818399906)
    c = tl.fma(v, c, -0.3084251284599304)
    cosine = tl.fma(v, c, 1.0)
    odd = (quarter & 1) != 0
    first = tl.where(odd, sine, cosine)
    second = tl.where(odd, cosine, sine)
    first = tl.where(((quarter + 1) & 2) != 0, -first, first)
    second = tl.where((quarter & 2) != 0, -second, second)
    return first, second


@triton.jit
def normal_pair(radius_word, angle_word):
    """Two normals from two words, by Box-Muller."""
    radius = tl.sqrt_rn(-2.0 * log_of_uniform(radius_word))
    cosine, sine = cosine_and_sine(angle_word)
    return radius * cosine, radius * sine


@triton.jit
def philox_words(seed, counter):
    """The four words of each block; ``counter`` int64, ``seed`` an int64 scalar."""
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, high, zero, zero, 10)


@triton.jit
def stream_normals(seed, first, BLOCK: tl.constexpr):
    """Elements ``first .. first + BLOCK`` of a stream.

    A thread's four elements are a Philox block where ``first`` is divisible by 4; otherwise they straddle two, and the
    loop makes both.
    """
    shift = first & 3
    block = (first >> 2) + tl.arange(0, BLOCK // 4)
    z0 = tl.zeros((BLOCK // 4,), tl.float32)
    z1, z2, z3 = z0, z0, z0
    for part in range(tl.where(shift == 0, 1, 2).to(tl.int32)):
        w0, w1, w2, w3 = philox_words(seed, block + part)
        n0, n1 = normal_pair(w0, w1)
        n2, n3 = normal_pair(w2, w3)
        # Rotated by the shift, lane k holds element (shift + k) mod 4 of the block; the first block has the lanes
        # below 4 - shift, the second the others.
        odd, far = (shift & 1) != 0, (shift & 2) != 0
        m0, m1 = tl.where(odd, n1, n0), tl.where(odd, n2, n1)
        m2, m3 = tl.where(odd, n3, n2), tl.where(odd, n0, n3)
        z0 = tl.where(part == 0, tl.where(far, m2, m0), z0)
        z1 = tl.where((shift < 3) == (part == 0), tl.where(far, m3, m1), z1)
        z2 = tl.where((shift < 2) == (part == 0), tl.where(far, m0, m2), z2)
        z3 = tl.where((shift < 1) == (part == 0), tl.where(far, m1, m3), z3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit(do_not_specialize=["chunks"], do_not_specialize_on_alignment=["seed", "offset"])
def philox_normal_kernel(
    result,
    seed,
    offset,
    elements,
    chunks,
    BLOCK: tl.constexpr,
    ITERATIONS: tl.constexpr,
):
    """Write normals [rows, elements]."""
    row = tl.program_id(0) // chunks
    start = (tl.program_id(0) % chunks) * (BLOCK * ITERATIONS)
    key = tl.load(seed + row)
    first = tl.load(offset + row)
    result += row.to(tl.int64) * elements
    for i in range(ITERATIONS):
        begin = start + i * BLOCK
        index = begin + tl.arange(0, BLOCK)
        tl.store(result + index, stream_normals(key, first + begin, BLOCK), mask=index < elements)


def _normal(seed: Tensor, offset: Tensor, count: int) -> Tensor:
    result = _normal_fake(seed, offset, count)
    if result.numel() == 0:
        return result
    plan = plan_for(int(count))
    chunks = plan.chunks(count)
    launch(
        philox_normal_kernel, seed, (seed.shape[0] * chunks, 1, 1), plan.warps,
        result, seed.contiguous(), offset.contiguous(), count, chunks, plan.BLOCK, plan.ITERATIONS,
    )  # fmt: skip
    return result


def _normal_fake(seed: Tensor, offset: Tensor, count: int) -> Tensor:
    return torch.empty((seed.shape[0], count), dtype=torch.float32, device=seed.device)


_philox_normal = Operator("philox_normal", _normal, _normal_fake)


def philox_normal(seed: Tensor, offset: Tensor, count: int) -> Tensor:
    """Triton version of :func:`pcpo_kernels.philox_normal`."""
    result: Tensor = _philox_normal(seed, offset, count)
    return result
