"""Guidance in one pass: two outputs in, one combination out; one gradient in, two out."""

# Kernels are compiled from their source; Triton's types are not Python's.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcpo_kernels.launch import all_as_read, empty_like, launch, plan_for, row_strides
from pcpo_kernels.operators import Operator
from pcpo_kernels.ptx import widened


@triton.jit
def lerp(start, end, weight):
    """``start + weight (end - start)`` from the nearer end, with the arithmetic of the reference."""
    gap = end - start
    return tl.where(weight < 0.5, start + weight * gap, end - (1.0 - weight) * gap)


@triton.jit(do_not_specialize_on_alignment=["scale"])
def guidance_forward_kernel(
    reference,
    output,
    scale,
    result,
    reference_stride,
    output_stride,
    elements,
    BLOCK: tl.constexpr,
    ITERATIONS: tl.constexpr,
):
    """``reference + scale (output - reference)``, from the nearer end; float32, rounded once."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    weight = tl.load(scale + row).to(tl.float32)
    reference += row.to(tl.int64) * reference_stride
    output += row.to(tl.int64) * output_stride
    result += row.to(tl.int64) * elements
    for i in range(ITERATIONS):
        index = (chunk * ITERATIONS + i) * BLOCK + tl.arange(0, BLOCK)
        mask = index < elements
        r = widened(tl.load(reference + index, mask=mask, other=0.0))
        f = widened(tl.load(output + index, mask=mask, other=0.0))
        tl.store(result + index, lerp(r, f, weight).to(result.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["scale"])
def guidance_backward_kernel(
    incoming,
    scale,
    reference_gradient,
    output_gradient,
    incoming_stride,
    elements,
    BLOCK: tl.constexpr,
    ITERATIONS: tl.constexpr,
):
    """``(1 - scale) g`` and ``scale g``; a gradient that is not needed is None and not written."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    weight = tl.load(scale + row).to(tl.float32)
    incoming += row.to(tl.int64) * incoming_stride
    for i in range(ITERATIONS):
        index = (chunk * ITERATIONS + i) * BLOCK + tl.arange(0, BLOCK)
        mask = index < elements
        g = widened(tl.load(incoming + index, mask=mask, other=0.0))
        place = row.to(tl.int64) * elements + index
        if reference_gradient is not None:
            kind = reference_gradient.dtype.element_ty
            tl.store(reference_gradient + place, ((1.0 - weight) * g).to(kind), mask=mask)
        if output_gradient is not None:
            kind = output_gradient.dtype.element_ty
            tl.store(output_gradient + place, (weight * g).to(kind), mask=mask)


def _forward(reference: Tensor, output: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    result = _forward_fake(reference, output, scale, dtype)
    if result.numel() == 0:
        return result
    rows = output.shape[0]
    elements = output.numel() // rows
    plan = plan_for(int(elements))
    read = all_as_read((reference, output, scale))
    launch(
        guidance_forward_kernel, output, (rows, plan.chunks(elements), 1), plan.warps,
        (*read, result), *row_strides(*read[:2]), elements, plan.BLOCK, plan.ITERATIONS,
    )  # fmt: skip
    return result


def _forward_fake(reference: Tensor, output: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return empty_like(output, dtype)


def _backward(
    incoming: Tensor, scale: Tensor, reference_dtype: torch.dtype | None, output_dtype: torch.dtype | None
) -> list[Tensor]:
    results = _backward_fake(incoming, scale, reference_dtype, output_dtype)
    if incoming.numel() == 0:
        return results
    rows = incoming.shape[0]
    elements = incoming.numel() // rows
    plan = plan_for(int(elements))
    left, read = iter(results), all_as_read((incoming, scale))
    launch(
        guidance_backward_kernel, incoming, (rows, plan.chunks(elements), 1), plan.warps,
        (*read, *(None if dtype is None else next(left) for dtype in (reference_dtype, output_dtype))),
        *row_strides(read[0]), elements, plan.BLOCK, plan.ITERATIONS,
    )  # fmt: skip
    return results


def _backward_fake(
    incoming: Tensor, scale: Tensor, reference_dtype: torch.dtype | None, output_dtype: torch.dtype | None
) -> list[Tensor]:
    """Unwritten gradients of the inputs whose dtype is given."""
    dtypes = reference_dtype, output_dtype
    return [empty_like(incoming, dtype) for dtype in dtypes if dtype is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    reference, guided, scale, _ = inputs
    ctx.save_for_backward(scale)
    ctx.dtypes = reference.dtype, guided.dtype


def _autograd_backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
    (scale,) = ctx.saved_tensors
    dtypes = [dtype if want else None for dtype, want in zip(ctx.dtypes, ctx.needs_input_grad, strict=False)]
    gradients = iter(_guidance_backward(incoming, scale, *dtypes))
    return *(None if dtype is None else next(gradients) for dtype in dtypes), None, None


_guidance_backward = Operator("guidance_backward", _backward, _backward_fake)
_guidance = Operator("guidance", _forward, _forward_fake, _setup_context, _autograd_backward)


def guidance(reference: Tensor, output: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Triton version of :func:`pcpo_kernels.guidance`."""
    result: Tensor = _guidance(reference, output, scale, dtype)
    return result
