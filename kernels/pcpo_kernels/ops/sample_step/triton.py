"""One sampler step in one launch: ``x' = a x + b f + std z`` with z read or made in place, and its log-probability."""

# Kernels are compiled from their source; Triton's types are not Python's.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcpo_kernels.launch import FINISH, all_as_read, arrival_counters, empty_like, launch, plan_for, row_strides
from pcpo_kernels.operators import Operator
from pcpo_kernels.ops.noise.triton import lanes_of, stream_normals
from pcpo_kernels.ptx import widened
from pcpo_kernels.sums import add_products, ordered_sum
from pcpo_kernels.types import NoiseKey, Reduction, SampledStep

HALF_LOG_2PI = tl.constexpr(0.5 * math.log(2 * math.pi))
ROW_POINTERS = ["seed", "offset", "a", "b", "std", "log_prob", "partial_sums", "counters"]


@triton.jit(
    do_not_specialize=["a_stride", "b_stride", "std_stride", "mean"],
    do_not_specialize_on_alignment=ROW_POINTERS,
)
def sample_step_kernel(
    latents,
    output,
    noise,
    seed,
    offset,
    a,
    b,
    std,
    next_latents,
    log_prob,
    partial_sums,
    counters,
    latents_stride,
    output_stride,
    noise_stride,
    a_stride,
    b_stride,
    std_stride,
    elements,
    mean,
    BLOCK: tl.constexpr,
    ITERATIONS: tl.constexpr,
    FINISH: tl.constexpr,
):
    """Write a piece of a row; the row's last program adds the squares of its noise in a fixed order.

    Without ``noise`` and ``seed`` the step is taken without noise. Row vectors may have stride 0 (one step for all).
    ``mean`` is 0 or 1.
    """
    row, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row_a = tl.load(a + row * a_stride).to(tl.float32)
    row_b = tl.load(b + row * b_stride).to(tl.float32)
    row_std = tl.load(std + row * std_stride).to(tl.float32)
    latents += row.to(tl.int64) * latents_stride
    output += row.to(tl.int64) * output_stride
    next_latents += row.to(tl.int64) * elements
    LANES: tl.constexpr = lanes_of(output)
    squares = tl.zeros((min(BLOCK // LANES, 256),), tl.float32)  # at most two for a thread
    for i in range(ITERATIONS):
        begin = (chunk * ITERATIONS + i) * BLOCK
        index = begin + tl.arange(0, BLOCK)
        mask = index < elements
        x = widened(tl.load(latents + index, mask=mask, other=0.0))
        f = widened(tl.load(output + index, mask=mask, other=0.0))
        following = row_a * x + row_b * f
        if noise is not None:
            z = tl.load(noise + row.to(tl.int64) * noise_stride + index, mask=mask, other=0.0).to(tl.float32)
            following += row_std * z
            squares = add_products(squares, z, z, LANES)
        if seed is not None:
            z = stream_normals(tl.load(seed + row), tl.load(offset + row) + begin, BLOCK, LANES)
            following += row_std * z
            z = tl.where(mask, z, 0.0)
            squares = add_products(squares, z, z, LANES)
        tl.store(next_latents + index, following.to(next_latents.dtype.element_ty), mask=mask)

    if (noise is None) and (seed is None):
        tl.store(log_prob + row, 0.0, mask=chunk == 0)
    else:
        tl.store(partial_sums + row * chunks + chunk, tl.sum(squares))
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + row, 1, sem="acq_rel", scope="gpu")
        if arrived == chunks - 1:
            tl.store(counters + row, 0)
            total = ordered_sum(partial_sums + row * chunks, chunks, FINISH)
            count = tl.cast(elements, tl.float32)
            total = tl.where(mean != 0, total / tl.maximum(count, 1.0), total)
            count = tl.where(mean != 0, 1.0, count)
            density = -0.5 * total - count * (tl.log(tl.where(row_std > 0.0, row_std, 1.0)) + HALF_LOG_2PI)
            tl.store(log_prob + row, tl.where(row_std > 0.0, density, 0.0))


def _step(
    latents: Tensor,
    output: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    offset: Tensor | None,
    a: Tensor,
    b: Tensor,
    std: Tensor,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    next_latents, log_prob = results = _step_fake(latents)
    rows = latents.shape[0]
    if rows == 0:
        return results
    elements = latents.numel() // rows
    plan = plan_for(int(elements))
    chunks = plan.chunks(elements)
    read = all_as_read((latents, output, noise, seed, offset))
    columns = [column.float() if column.dtype == torch.float64 else column for column in (a, b, std)]
    noisy = noise is not None or seed is not None
    launch(
        sample_step_kernel, latents, (rows, chunks, 1), plan.warps,
        (
            *read, *columns, next_latents, log_prob,
            latents.new_empty(rows * chunks, dtype=torch.float32) if noisy else None,
            arrival_counters(latents, rows) if noisy else None,
        ),
        *row_strides(*read[:3]), *row_strides(*columns), elements, int(mean),
        plan.BLOCK, plan.ITERATIONS, FINISH,
    )  # fmt: skip
    return results


def _step_fake(latents: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return empty_like(latents), latents.new_empty(latents.shape[:1], dtype=torch.float32)


_sample_step = Operator("sample_step", _step, _step_fake)


def sample_step(
    latents: Tensor,
    output: Tensor,
    a: Tensor,
    b: Tensor,
    std: Tensor,
    noise: Tensor | NoiseKey | None,
    reduction: Reduction,
) -> SampledStep:
    """Triton version of :func:`pcpo_kernels.sample_step`."""
    seed, offset = noise if isinstance(noise, NoiseKey) else (None, None)
    z = None if isinstance(noise, NoiseKey) else noise
    return SampledStep(*_sample_step(latents, output, z, seed, offset, a, b, std, reduction == "mean"))
