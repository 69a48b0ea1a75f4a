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
from pcpo_kernels.ptx import approximate_rsqrt, wide_product


@triton.jit
def radius_of_uniform(word):
    """``sqrt(-2 log(u))`` for ``u = n 2^-25``, ``n = 2 (word >> 8) + 1``.

    The logarithm's relative error is below 1e-7, also for u nearly 1: n has 25 bits and float32 keeps 24, so
    ``word & ~255``, which is exact, stands for ``128 n``, and the missing 128 is added last.
    """
    even = (word & 0xFFFFFF00).to(tl.float32)
    # Sign and exponent of sqrt(2) 128 n; by its power of 2, 128 n lands in [sqrt(1/2), sqrt(2)).
    exponent = tl.fma(even, 1.4142135381698608, 181.01933288574219).to(tl.int32, bitcast=True) & -0x800000
    unit = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    f = tl.fma(unit, 128.0, tl.fma(even, unit, -1.0))
    # -2 log(1 + f): the factor is a power of two and lies in the constants.
    p = tl.fma(f, -0.14299507439136505, 0.231424018740654)
    p = tl.fma(f, p, -0.23323021829128265)
    p = tl.fma(f, p, 0.24822100996971130)
    p = tl.fma(f, p, -0.28499874472618103)
    p = tl.fma(f, p, 0.3333696126937866)
    p = tl.fma(f, p, -0.40001416206359863)
    p = tl.fma(f, p, 0.49999979138374329)
    p = tl.fma(f, p, -0.66666662693023682)
    scale = tl.fma(exponent.to(tl.float32), 1.1920928955078125e-07, -159.0)
    square = f * f
    tail = tl.fma(f * square, p, scale * 4.24388880e-4)  # ln 2 in two parts, the first with few bits
    x = tl.fma(scale, -1.38671875, tl.fma(f, -2.0, square + tail))
    # The square root, correctly rounded if the device's approximation is within 4 units in the last place. With one
    # step less it is not, for a few words.
    inverse = approximate_rsqrt(x)
    root, half = x * inverse, 0.5 * inverse
    error = tl.fma(half * -1.0, root, 0.5)
    root, half = tl.fma(root, error, root), tl.fma(half, error, half)
    return tl.fma(tl.fma(root * -1.0, root, x), half, root)


@triton.jit
def normal_pair(radius_word, angle_word):
    """Two normals from two words, by Box-Muller.

    The angle is ``2 pi u``, for the same u of its word, and is reduced to an eighth of a turn exactly.
    """
    radius = radius_of_uniform(radius_word)
    turned = angle_word + 0x20000000  # the upper two bits count quarters of a turn
    # (m + 128) 2^-29 - 1, which is exact
    y = tl.fma((turned & 0x3FFFFF00).to(tl.int32).to(tl.float32), 1.862645149230957e-09, -0.9999997615814209)
    v = y * y  # y in [-1, 1], times pi / 4
    s = tl.fma(v, -3.5954399209003896e-05, 0.0024900068528950214)
    s = tl.fma(v, s, -0.08074543625116348)
    s = tl.fma(v, s, -2.4273129284324568e-08)
    sine = tl.fma(y, 0.7853981852531433, y * s)
    c = tl.fma(v, 3.541959813446738e-06, -0.00032596138771623373)
    c = tl.fma(v, c, 0.01585433818399906)
    c = tl.fma(v, c, -0.3084251284599304)
    cosine = tl.fma(v, c, 1.0)
    odd = (turned & 0x40000000) != 0
    radius = (radius.to(tl.uint32, bitcast=True) ^ (turned & 0x80000000)).to(tl.float32, bitcast=True)
    # A minus sign is a subtraction from 0; a factor of -1 costs nothing.
    return radius * tl.where(odd, sine * -1.0, cosine), radius * tl.where(odd, cosine, sine)


@triton.jit
def philox_rounds(c0, c1, c2, c3, k0, k1):
    """Ten rounds over four uint32 words with the two words of a key.

    As ``tl.philox``, but each product is multiplied once for both of its halves.
    """
    for _ in tl.static_range(10):
        low0, high0 = wide_product(c0, 0xD2511F53)
        low1, high1 = wide_product(c2, 0xCD9E8D57)
        c0, c2 = high1 ^ c1 ^ k0, high0 ^ c3 ^ k1
        c1, c3 = low1, low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def philox_words(seed, counter):
    """The four words of each block; ``counter`` int64, ``seed`` an int64 scalar."""
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return philox_rounds(low, high, zero, zero, k0, k1)


@triton.jit
def block_normals(seed, block):
    """The four normals of each Philox block, lane by lane."""
    w0, w1, w2, w3 = philox_words(seed, block)
    n0, n1 = normal_pair(w0, w1)
    n2, n3 = normal_pair(w2, w3)
    return n0, n1, n2, n3


@triton.constexpr_function
def lanes_of(pointer):
    """How many elements of an image a thread reads at once: 16 bytes, of elements of 2 or 4."""
    return 128 // pointer.dtype.element_ty.primitive_bitwidth


@triton.jit
def stream_normals(seed, first, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """Elements ``first .. first + BLOCK`` of a stream.

    Four elements are a Philox block where ``first`` is divisible by 4; otherwise they straddle two. A thread makes the
    blocks of as many elements as it reads at once, ``LANES``, 8 or 4, so that nothing changes threads.
    """
    shift = first & 3
    if LANES == 8:
        block = (first >> 2) + 2 * tl.arange(0, BLOCK // 8)
        z0, z1, z2, z3 = block_normals(seed, block)
        z4, z5, z6, z7 = block_normals(seed, block + 1)
        if shift != 0:
            n0, n1, n2, _ = block_normals(seed, block + 2)
            z0, z1, z2, z3 = later_lanes(shift, z0, z1, z2, z3, z4, z5, z6)
            z4, z5, z6, z7 = later_lanes(shift, z4, z5, z6, z7, n0, n1, n2)
        even = tl.interleave(tl.interleave(z0, z4), tl.interleave(z2, z6))
        odd = tl.interleave(tl.interleave(z1, z5), tl.interleave(z3, z7))
    else:
        block = (first >> 2) + tl.arange(0, BLOCK // 4)
        z0, z1, z2, z3 = block_normals(seed, block)
        if shift != 0:
            n0, n1, n2, _ = block_normals(seed, block + 1)
            z0, z1, z2, z3 = later_lanes(shift, z0, z1, z2, z3, n0, n1, n2)
        even, odd = tl.interleave(z0, z2), tl.interleave(z1, z3)
    return tl.interleave(even, odd)


@triton.jit
def later_lanes(shift, z0, z1, z2, z3, z4, z5, z6):
    """Four lanes of a block and the next, from lane ``shift`` on, which is 1, 2 or 3."""
    odd, far = shift != 2, shift != 1
    z0, z1, z2 = tl.where(far, z2, z0), tl.where(far, z3, z1), tl.where(far, z4, z2)
    z3, z4 = tl.where(far, z5, z3), tl.where(far, z6, z4)
    return tl.where(odd, z1, z0), tl.where(odd, z2, z1), tl.where(odd, z3, z2), tl.where(odd, z4, z3)


@triton.jit(do_not_specialize_on_alignment=["seed", "offset"])
def philox_normal_kernel(
    result,
    seed,
    offset,
    elements,
    BLOCK: tl.constexpr,
    ITERATIONS: tl.constexpr,
):
    """Write normals [rows, elements]."""
    row = tl.program_id(0)
    start = tl.program_id(1) * (BLOCK * ITERATIONS)
    key = tl.load(seed + row)
    first = tl.load(offset + row)
    result += row.to(tl.int64) * elements
    for i in range(ITERATIONS):
        begin = start + i * BLOCK
        index = begin + tl.arange(0, BLOCK)
        tl.store(result + index, stream_normals(key, first + begin, BLOCK, 4), mask=index < elements)


def _normal(seed: Tensor, offset: Tensor, count: int) -> Tensor:
    result = _normal_fake(seed, offset, count)
    if result.numel() == 0:
        return result
    plan = plan_for(int(count))
    launch(
        philox_normal_kernel, seed, (seed.shape[0], plan.chunks(count), 1), plan.warps,
        (result, seed.contiguous(), offset.contiguous()), count, plan.BLOCK, plan.ITERATIONS,
    )  # fmt: skip
    return result


def _normal_fake(seed: Tensor, offset: Tensor, count: int) -> Tensor:
    return torch.empty((seed.shape[0], count), dtype=torch.float32, device=seed.device)


_philox_normal = Operator("philox_normal", _normal, _normal_fake)


def philox_normal(seed: Tensor, offset: Tensor, count: int) -> Tensor:
    """Triton version of :func:`pcpo_kernels.philox_normal`."""
    result: Tensor = _philox_normal(seed, offset, count)
    return result
