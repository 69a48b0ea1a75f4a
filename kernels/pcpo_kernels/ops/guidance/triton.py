"""Guidance in one pass: two outputs in, one combination out; one gradient in, two out."""

# Kernels are compiled from their source; Triton's types are not Python's.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcpo_kernels.launch import on_device, plan_for, register, row_values, rows_contiguous


@triton.jit
def lerp(start, end, weight):
    """``start + weight (end - start)`` from the nearer end, with the arithmetic of the reference."""
    gap = end - start
    return tl.where(weight < 0.5, start + weight * gap, end - (1.0 - weight) * gap)


@triton.jit(do_not_specialize=["chunks"], do_not_specialize_on_alignment=["scale"])
def guidance_forward_kernel(
    reference,
    output,
    scale,
    result,
    reference_stride,
    output_stride,
    elements,
    chunks,
    BLOCK: tl.constexpr,
    ITERATIONS: tl.constexpr,
):
    """``reference + scale (output - reference)``, from the nearer end; float32, rounded once."""
    row = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    weight = tl.load(scale + row).to(tl.float32)
    reference += row.to(tl.int64) * reference_stride
    output += row.to(tl.int64) * output_stride
    result += row.to(tl.int64) * elements
    for i in range(ITERATIONS):
        index = (chunk * ITERATIONS + i) * BLOCK + tl.arange(0, BLOCK)
        mask = index < elements
        r = tl.load(reference + index, mask=mask, other=0.0).to(tl.float32)
        f = tl.load(output + index, mask=mask, other=0.0).to(tl.float32)
        tl.store(result + index, lerp(r, f, weight).to(result.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["chunks"], do_not_specialize_on_alignment=["scale"])
def guidance_backward_kernel(
    incoming,
    scale,
    reference_gradient,
    output_gradient,
    incoming_stride,
    elements,
    chunks,
    BLOCK: tl.constexpr,
    ITERATIONS: tl.constexpr,
):
    """``(1 - scale) g`` and ``scale g``; a gradient that nobody needs is None and not written."""
    row = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    weight = tl.load(scale + row).to(tl.float32)
    incoming += row.to(tl.int64) * incoming_stride
    for i in range(ITERATIONS):
        index = (chunk * ITERATIONS + i) * BLOCK + tl.arange(0, BLOCK)
        mask = index < elements
        g = tl.load(incoming + index, mask=mask, other=0.0).to(tl.float32)
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
    rows, elements = output.shape[0], output[0].numel()
    plan = plan_for(elements)
    chunks = plan.chunks(elements)
    reference, output = rows_contiguous(reference), rows_contiguous(output)
    with on_device(output):
        guidance_forward_kernel[(rows * chunks,)](
            reference,
            output,
            row_values(scale),
            result,
            reference.stride(0),
            output.stride(0),
            elements,
            chunks,
            **plan.options,
        )
    return result


def _forward_fake(reference: Tensor, output: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(output.shape, dtype=dtype, device=output.device)


def _backward(
    incoming: Tensor,
    scale: Tensor,
    reference_dtype: torch.dtype,
    output_dtype: torch.dtype,
    for_reference: bool,
    for_output: bool,
) -> tuple[Tensor, Tensor]:
    reference_gradient, output_gradient = results = _backward_fake(
        incoming, scale, reference_dtype, output_dtype, for_reference, for_output
    )
    if incoming.numel() == 0:
        return results
    rows, elements = incoming.shape[0], incoming[0].numel()
    plan = plan_for(elements)
    chunks = plan.chunks(elements)
    incoming = rows_contiguous(incoming)
    with on_device(incoming):
        guidance_backward_kernel[(rows * chunks,)](
            incoming,
            row_values(scale),
            reference_gradient if for_reference else None,
            output_gradient if for_output else None,
            incoming.stride(0),
            elements,
            chunks,
            **plan.options,
        )
    return results


def _backward_fake(
    incoming: Tensor,
    scale: Tensor,
    reference_dtype: torch.dtype,
    output_dtype: torch.dtype,
    for_reference: bool,
    for_output: bool,
) -> tuple[Tensor, Tensor]:
    def gradient(dtype: torch.dtype, wanted: bool) -> Tensor:
        return torch.empty(incoming.shape if wanted else (0,), dtype=dtype, device=incoming.device)

    return gradient(reference_dtype, for_reference), gradient(output_dtype, for_output)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    reference, guided, scale, _ = inputs
    ctx.save_for_backward(scale)
    ctx.dtypes = reference.dtype, guided.dtype


def _autograd_backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
    (scale,) = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:2]
    gradients = torch.ops.pcpo_kernels.guidance_backward(incoming, scale, *ctx.dtypes, *wanted)
    return *(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)), None, None


register(
    "guidance", "(Tensor reference, Tensor output, Tensor scale, ScalarType dtype) -> Tensor", _forward, _forward_fake
)
register(
    "guidance_backward",
    "(Tensor incoming, Tensor scale, ScalarType reference_dtype, ScalarType output_dtype, bool for_reference, "
    "bool for_output) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
torch.library.register_autograd("pcpo_kernels::guidance", _autograd_backward, setup_context=_setup_context)


def guidance(reference: Tensor, output: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Triton version of :func:`pcpo_kernels.guidance`."""
    result: Tensor = torch.ops.pcpo_kernels.guidance(reference, output, scale, dtype)
    return result
