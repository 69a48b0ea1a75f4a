"""The policy loss in two launches: sums and row mathematics forward, one elementwise gradient kernel backward.

Forward, a program sums ``delta z``, ``delta^2`` and ``gap^2`` over its piece of a row and stores the three sums. The
last program of a row to arrive adds the pieces in a fixed order and does the row's mathematics; the last row to finish
adds the rows' losses. Nothing is added atomically but the arrival counts, so every run gives the same bits.

Backward, ``gradient = w_noise z + w_delta delta + w_gap gap`` with the row weights from the forward, times the incoming
gradient, which is read from device memory.
"""

# Kernels are compiled from their source; Triton's types are not Python's.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from typing import Any, NamedTuple, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcpo_kernels.launch import (
    FINISH,
    all_as_read,
    arrival_counters,
    empty_like,
    empty_scalar,
    launch,
    plan_for,
    row_strides,
)
from pcpo_kernels.operators import Operator
from pcpo_kernels.ops.guidance.triton import lerp
from pcpo_kernels.ops.noise.triton import lanes_of, stream_normals
from pcpo_kernels.ops.policy_loss.inputs import LossInputs
from pcpo_kernels.ptx import widened
from pcpo_kernels.sums import add_products, ordered_sum, sums_of_three, sums_of_two
from pcpo_kernels.types import Endpoints, NoiseKey, Objective, PolicyLoss


@triton.jit
def load_block(pointer, row, stride, index, mask):
    """One block of a row, as float32."""
    return widened(tl.load(pointer + row.to(tl.int64) * stride + index, mask=mask, other=0.0))


@triton.jit
def guided_block(output, unconditional, row, output_stride, unconditional_stride, weight, index, mask):
    """The new output after guidance."""
    f = load_block(output, row, output_stride, index, mask)
    if unconditional is not None:
        u = load_block(unconditional, row, unconditional_stride, index, mask)
        f = lerp(u, f, weight)
    return f


@triton.jit
def noise_block(
    noise,
    next_latents,
    behind,
    row,
    noise_stride,
    next_stride,
    key,
    first,
    a,
    b,
    inverse_std,
    begin,
    index,
    mask,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """The step's noise: recovered from both ends, read, or made from its key, by which pointers there are."""
    if next_latents is not None:
        following = load_block(next_latents, row, next_stride, index, mask)
        x = load_block(noise, row, noise_stride, index, mask)
        z = (following - (a * x + b * behind)) * inverse_std
    elif noise is not None:
        z = load_block(noise, row, noise_stride, index, mask)
    else:
        z = stream_normals(key, first + begin, BLOCK, LANES)
    return z


@triton.jit
def row_constants(seed, offset, a, b, std, guidance_scale, row):
    """What noise and guidance need of a row; zeros where a pointer is missing."""
    key, first = row.to(tl.int64) * 0, row.to(tl.int64) * 0
    if seed is not None:
        key, first = tl.load(seed + row), tl.load(offset + row)
    row_a, row_b, inverse_std, weight = 0.0, 0.0, 0.0, 0.0
    if a is not None:
        row_a, row_b = tl.load(a + row).to(tl.float32), tl.load(b + row).to(tl.float32)
        inverse_std = 1.0 / tl.load(std + row).to(tl.float32)
    if guidance_scale is not None:
        weight = tl.load(guidance_scale + row).to(tl.float32)
    return key, first, row_a, row_b, inverse_std, weight


@triton.jit
def ratio_of(log_ratio):
    """``e^l``, ``e^l - 1`` and ``|e^l - 1 - l| / |e^l - 1|``; near 0 from the series of the gap, which cancels."""
    series = tl.fma(log_ratio, 1.0 / 5040.0, 1.0 / 720.0)
    series = tl.fma(log_ratio, series, 1.0 / 120.0)
    series = tl.fma(log_ratio, series, 1.0 / 24.0)
    series = tl.fma(log_ratio, series, 1.0 / 6.0)
    series = tl.fma(log_ratio, series, 0.5)
    small = tl.abs(log_ratio) < 0.1
    exponential = tl.exp(log_ratio)
    gap = tl.where(small, series * log_ratio * log_ratio, exponential - 1.0 - log_ratio)
    surplus = tl.where(small, log_ratio + gap, exponential - 1.0)
    error = tl.where(log_ratio == 0.0, 0.0, tl.abs(gap / surplus))
    ratio = tl.where(small, 1.0 + surplus, exponential)
    return ratio, surplus, tl.where(surplus == float("inf"), 1.0, error)


# Pointers to a value per row; the others are to images.
SHARED_ROWS = ["seed", "offset", "a", "b", "std", "guidance_scale"]
FORWARD_ROWS = ["linear", "quadratic", "scale", "advantage", "divergence", "kl"]
FORWARD_ROWS += ["scratch", "counters", "loss", "clipped_out", "statistics"]
BACKWARD_ROWS = ["statistics", "grad_loss"]


@triton.jit(
    do_not_specialize=["objective", "mean"],
    do_not_specialize_on_alignment=[*SHARED_ROWS, *FORWARD_ROWS],
)
def policy_loss_forward_kernel(
    output,
    old_output,
    noise,
    next_latents,
    reference,
    unconditional,
    seed,
    offset,
    a,
    b,
    std,
    guidance_scale,
    linear,
    quadratic,
    scale,
    advantage,
    divergence,
    kl,
    scratch,
    counters,
    loss,
    clipped_out,
    statistics,
    output_stride,
    old_stride,
    noise_stride,
    next_stride,
    reference_stride,
    unconditional_stride,
    elements,
    clip_range: tl.float32,
    objective,
    mean,
    BLOCK: tl.constexpr,
    ITERATIONS: tl.constexpr,
    FINISH: tl.constexpr,
):
    """Pieces of the inner products; then, in the program that finishes last, the rows' mathematics and the loss.

    ``scratch`` holds three sums for each of ``rows * chunks`` pieces, then one loss per row; ``statistics`` is
    [7, rows]: log-ratio, Taylor error, KL term, the weights of noise, difference and gap in the gradient, and the
    divergence from the old policy.

    ``noise`` is z, or x where ``next_latents`` is given; missing pointers are None and leave their code out. Without an
    old output there is no difference from it, and without a reference nothing to read at all. ``clip_range``,
    ``objective`` (its place among the names) and ``mean`` (0 or 1) matter to a row's mathematics alone, so one compiled
    kernel serves every setting.
    """
    row, chunk = tl.program_id(0), tl.program_id(1)
    rows, chunks = tl.num_programs(0), tl.num_programs(1)
    LANES: tl.constexpr = lanes_of(output)
    # At most two of each for a thread, which has 128 registers for everything.
    SUMS: tl.constexpr = min(BLOCK // LANES, 256)
    with_noise = tl.zeros((SUMS,), tl.float32)
    with_itself, from_reference = with_noise, with_noise
    if (old_output is not None) or (reference is not None):
        key, first, row_a, row_b, inverse_std, weight = row_constants(seed, offset, a, b, std, guidance_scale, row)
        for i in range(ITERATIONS):
            begin = (chunk * ITERATIONS + i) * BLOCK
            index = begin + tl.arange(0, BLOCK)
            mask = index < elements
            f = guided_block(output, unconditional, row, output_stride, unconditional_stride, weight, index, mask)
            # Past the row's end everything read is 0, so that made noise counts for nothing there.
            if reference is not None:
                gap = f - load_block(reference, row, reference_stride, index, mask)
                from_reference = add_products(from_reference, gap, gap, LANES)
            if old_output is not None:
                old = load_block(old_output, row, old_stride, index, mask)
                delta = f - old
                with_itself = add_products(with_itself, delta, delta, LANES)
                z = noise_block(
                    noise, next_latents, old, row, noise_stride, next_stride,
                    key, first, row_a, row_b, inverse_std, begin, index, mask, BLOCK, LANES,
                )  # fmt: skip
                with_noise = add_products(with_noise, delta, z, LANES)

    pieces = rows * chunks
    here = scratch + row * chunks + chunk
    if old_output is not None:
        if reference is not None:
            noise_sum, own_sum, gap_sum = sums_of_three(with_noise, with_itself, from_reference)
            tl.store(here + 2 * pieces, gap_sum)
        else:
            noise_sum, own_sum = sums_of_two(with_noise, with_itself)
        tl.store(here, noise_sum)
        tl.store(here + pieces, own_sum)
    elif reference is not None:
        tl.store(here + 2 * pieces, tl.sum(from_reference))
    tl.debug_barrier()
    arrived = tl.atomic_add(counters + 1 + row, 1, sem="acq_rel", scope="gpu")
    if arrived == chunks - 1:
        tl.store(counters + 1 + row, 0)
        unit = tl.where(mean != 0, 1.0 / tl.maximum(tl.cast(elements, tl.float32), 1.0), 1.0)
        mine = scratch + row * chunks
        row_linear = tl.load(linear + row).to(tl.float32)
        row_quadratic = tl.load(quadratic + row).to(tl.float32)
        row_scale = tl.load(scale + row).to(tl.float32)
        row_advantage = tl.load(advantage + row).to(tl.float32)
        log_ratio, distance = row_linear * 0.0, row_linear * 0.0
        if old_output is not None:
            square = ordered_sum(mine + pieces, chunks, FINISH) * unit
            log_ratio = row_linear * (ordered_sum(mine, chunks, FINISH) * unit) - row_quadratic * square
            distance = tl.load(divergence + row).to(tl.float32) * square
        ratio, surplus, taylor_error = ratio_of(log_ratio)
        on_ratio = objective != 0
        is_mask = objective == 2
        change = tl.where(on_ratio, surplus, log_ratio)
        slope = tl.where(on_ratio, -row_advantage * ratio, -row_advantage)
        # A row without advantage takes no part, even where its ratio has overflowed (0 * inf is NaN).
        idle = row_advantage == 0.0
        gain = tl.where(idle, 0.0, row_advantage * change)
        xi = tl.cast(clip_range, tl.float32)  # which Inductor passes as float64
        bound = xi * tl.abs(row_advantage)
        margin = bound - gain
        onwards = ((row_advantage > 0.0) & (log_ratio > 0.0)) | ((row_advantage < 0.0) & (log_ratio < 0.0))
        clipped = tl.where(is_mask, (distance >= xi) & onwards, margin < 0.0)
        slope = tl.where(clipped | idle, 0.0, slope)
        above = tl.where(clipped, 0.0, margin)
        limit = tl.where(is_mask, row_advantage, -bound)
        term = tl.where(on_ratio, -row_advantage + tl.where(clipped, limit, -gain), above)
        row_loss = row_scale * term
        count = tl.cast(rows, tl.float32)
        share = unit / count
        kl_term, on_gap = 0.0, 0.0
        if reference is not None:
            row_kl = tl.load(kl + row).to(tl.float32)
            kl_term = row_kl * (ordered_sum(mine + 2 * pieces, chunks, FINISH) * unit)
            row_loss += kl_term
            on_gap = 2.0 * row_kl * share
        tl.store(clipped_out + row, clipped)
        tl.store(statistics + row, log_ratio)
        tl.store(statistics + rows + row, taylor_error)
        tl.store(statistics + 2 * rows + row, kl_term)
        tl.store(statistics + 3 * rows + row, row_scale * slope * row_linear * share)
        tl.store(statistics + 4 * rows + row, -2.0 * row_scale * slope * row_quadratic * share)
        tl.store(statistics + 5 * rows + row, on_gap)
        tl.store(statistics + 6 * rows + row, distance)
        tl.store(scratch + 3 * pieces + row, row_loss)
        tl.debug_barrier()
        finished = tl.atomic_add(counters, 1, sem="acq_rel", scope="gpu")
        if finished == rows - 1:
            tl.store(counters, 0)
            tl.store(loss, ordered_sum(scratch + 3 * pieces, rows, FINISH) / count)


@triton.jit(do_not_specialize_on_alignment=[*SHARED_ROWS, *BACKWARD_ROWS])
def policy_loss_backward_kernel(
    output,
    old_output,
    noise,
    next_latents,
    reference,
    unconditional,
    seed,
    offset,
    a,
    b,
    std,
    guidance_scale,
    statistics,
    grad_loss,
    gradient,
    unconditional_gradient,
    output_stride,
    old_stride,
    noise_stride,
    next_stride,
    reference_stride,
    unconditional_stride,
    elements,
    BLOCK: tl.constexpr,
    ITERATIONS: tl.constexpr,
):
    """``(w_noise z + w_delta delta + w_gap gap)`` times the incoming gradient, in the dtype of each half.

    A row whose weights are all 0 (clipped, or not trained) is written without being read.
    """
    row, chunk, rows = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    incoming = tl.load(grad_loss).to(tl.float32)
    on_noise = tl.load(statistics + 3 * rows + row) * incoming
    on_delta = tl.load(statistics + 4 * rows + row) * incoming
    on_gap = on_noise * 0.0
    if reference is not None:
        on_gap = tl.load(statistics + 5 * rows + row) * incoming
    key, first, row_a, row_b, inverse_std, weight = row_constants(seed, offset, a, b, std, guidance_scale, row)
    trained = (on_noise != 0.0) | (on_delta != 0.0) | (on_gap != 0.0)
    gradient += row.to(tl.int64) * elements
    if unconditional is not None:
        unconditional_gradient += row.to(tl.int64) * elements
    for i in range(ITERATIONS):
        begin = (chunk * ITERATIONS + i) * BLOCK
        index = begin + tl.arange(0, BLOCK)
        mask = index < elements
        total = tl.zeros((BLOCK,), tl.float32)
        if trained:
            f = guided_block(output, unconditional, row, output_stride, unconditional_stride, weight, index, mask)
            behind = f
            if old_output is not None:
                behind = load_block(old_output, row, old_stride, index, mask)
            z = noise_block(
                noise, next_latents, behind, row, noise_stride, next_stride,
                key, first, row_a, row_b, inverse_std, begin, index, mask, BLOCK, lanes_of(output),
            )  # fmt: skip
            total = on_noise * z
            if old_output is not None:
                total = tl.fma(on_delta, f - behind, total)
            if reference is not None:
                gap = f - load_block(reference, row, reference_stride, index, mask)
                total = tl.fma(on_gap, gap, total)
        if unconditional is not None:
            kind = unconditional_gradient.dtype.element_ty
            tl.store(unconditional_gradient + index, ((1.0 - weight) * total).to(kind), mask=mask)
            total = weight * total
        tl.store(gradient + index, total.to(gradient.dtype.element_ty), mask=mask)


class Operands(NamedTuple):
    """What both kernels read, in the order of their parameters: images, then values per row.

    ``noise`` is z, or x where ``next_latents`` is given. The code of what is None is left out.
    """

    output: Tensor
    old_output: Tensor | None = None
    noise: Tensor | None = None
    next_latents: Tensor | None = None
    reference: Tensor | None = None
    unconditional: Tensor | None = None
    seed: Tensor | None = None
    offset: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    std: Tensor | None = None
    guidance_scale: Tensor | None = None


class Columns(NamedTuple):
    """Values per row that a row's mathematics needs, which the forward alone does."""

    linear: Tensor
    quadratic: Tensor
    scale: Tensor
    advantage: Tensor
    divergence: Tensor
    kl: Tensor | None


class LossSettings(NamedTuple):
    """What holds for every row, as the forward kernel takes it."""

    clip_range: float
    objective: int
    mean: bool


IMAGES = Operands._fields.index("seed")
OPERANDS, COLUMNS = len(Operands._fields), len(Columns._fields)
NO_GRADIENTS = (None,) * (OPERANDS + COLUMNS + len(LossSettings._fields))
UNCONDITIONAL = Operands._fields.index("unconditional")


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    output = arguments[0]
    loss, clipped, statistics = results = _forward_fake(output)
    rows = output.shape[0]
    if rows == 0:
        loss.zero_()
        return results
    elements = output.numel() // rows
    plan = plan_for(int(elements))
    tensors = all_as_read(arguments[: OPERANDS + COLUMNS])
    _, old_output, _, _, reference, *_ = tensors
    # On-policy without a reference nothing is summed: one program per row does the row's mathematics.
    chunks = 1 if old_output is None and reference is None else plan.chunks(elements)
    scratch = output.new_empty(3 * rows * chunks + rows, dtype=torch.float32)
    clip_range, objective, mean = arguments[OPERANDS + COLUMNS :]
    launch(
        policy_loss_forward_kernel, output, (rows, chunks, 1), plan.warps,
        (*tensors, scratch, arrival_counters(output, rows), loss, clipped, statistics),
        *row_strides(*tensors[:IMAGES]), elements, clip_range, objective, int(mean),
        plan.BLOCK, plan.ITERATIONS, FINISH,
    )  # fmt: skip
    return results


def _forward_fake(output: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Unwritten loss, clipped flags and row statistics."""
    rows = output.shape[0]
    flags, statistics = output.new_empty(rows, dtype=torch.bool), output.new_empty((7, rows), dtype=torch.float32)
    return empty_scalar(output), flags, statistics


def _backward(grad_loss: Tensor, statistics: Tensor, *operands: Any) -> list[Tensor]:
    gradient, *half = results = _backward_fake(grad_loss, statistics, *operands)
    rows = gradient.shape[0]
    if gradient.numel() == 0:
        return results
    elements = gradient.numel() // rows
    plan = plan_for(int(elements))
    tensors = all_as_read(operands)
    launch(
        policy_loss_backward_kernel, gradient, (rows, plan.chunks(elements), 1), plan.warps,
        (*tensors, statistics, grad_loss, gradient, half[0] if half else None),
        *row_strides(*tensors[:IMAGES]), elements, plan.BLOCK, plan.ITERATIONS,
    )  # fmt: skip
    return results


def _backward_fake(grad_loss: Tensor, statistics: Tensor, *operands: Any) -> list[Tensor]:
    """Unwritten gradients of the output and, where there is one, of the unconditional half."""
    halves = operands[0], operands[UNCONDITIONAL]
    return [empty_like(half) for half in halves if half is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, clipped, statistics = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(clipped, statistics)
    ctx.save_for_backward(statistics, *inputs[:OPERANDS])


def _autograd_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return NO_GRADIENTS
    gradient, *half = _loss_backward(grad_loss, *ctx.saved_tensors)
    if not half or not ctx.needs_input_grad[UNCONDITIONAL]:
        return gradient, *NO_GRADIENTS[1:]
    return gradient, *NO_GRADIENTS[1:UNCONDITIONAL], *half, *NO_GRADIENTS[UNCONDITIONAL + 1 :]


_loss_backward = Operator("policy_loss_backward", _backward, _backward_fake, takes=(Operands,))
_loss = Operator(
    "policy_loss", _forward, _forward_fake, _setup_context, _autograd_backward,
    takes=(Operands, Columns, LossSettings),
)  # fmt: skip
_OBJECTIVES = get_args(Objective)


def policy_loss(inputs: LossInputs) -> PolicyLoss:
    """Triton version of :func:`pcpo_kernels.policy_loss`."""
    noise = inputs.noise
    z = following = None
    key: tuple[Tensor | None, ...] = (None, None)
    transition: tuple[Tensor | None, ...] = (None, None, None)
    if isinstance(noise, NoiseKey):
        key = noise
    elif isinstance(noise, Endpoints):
        z, following, *rest = noise
        transition = tuple(rest)
    else:
        z = noise
    loss, clipped, statistics = _loss(
        inputs.output, inputs.old_output, z, following, inputs.reference, inputs.unconditional,
        *key, *transition, inputs.guidance_scale,
        inputs.linear, inputs.quadratic, inputs.scale, inputs.advantage,
        inputs.quadratic if inputs.divergence is None else inputs.divergence, inputs.kl,
        float(inputs.clip_range), _OBJECTIVES.index(inputs.objective), inputs.reduction == "mean",
    )  # fmt: skip
    log_ratio, taylor_error, kl_term, _, _, _, distance = statistics.unbind(0)
    return PolicyLoss(loss, log_ratio, clipped, taylor_error, None if inputs.reference is None else kl_term, distance)
