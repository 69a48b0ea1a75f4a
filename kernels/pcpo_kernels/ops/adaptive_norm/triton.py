"""Gated residual, layer norm and modulation in one pass over the tokens, and their gradients in another."""

# Kernels are compiled from their source; Triton's types are not Python's.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcpo_kernels.launch import block_for, cdiv, channels_contiguous, launch, row_strides, tokens_per_program
from pcpo_kernels.operators import Operator
from pcpo_kernels.ops.adaptive_norm.inputs import Tokens
from pcpo_kernels.sums import token_sums

FORWARD_TOKENS = 4


@triton.jit(do_not_specialize=["tokens", "chunks"], do_not_specialize_on_alignment=["mean", "rstd"])
def adaptive_norm_forward_kernel(
    source,
    branch,
    gate,
    shift,
    scale,
    hidden,
    normed,
    mean,
    rstd,
    source_image_stride,
    source_token_stride,
    branch_image_stride,
    branch_token_stride,
    gate_stride,
    shift_stride,
    scale_stride,
    tokens,
    channels,
    chunks,
    EPS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``h = source + gate branch``, rounded; ``(1 + scale) LN(h) + shift``. Parts whose pointer is None are skipped."""
    image = (tl.program_id(0) // chunks).to(tl.int64)
    start = (tl.program_id(0) % chunks) * TOKENS
    channel = tl.arange(0, BLOCK)
    mask = channel < channels
    source += image * source_image_stride
    if branch is not None:
        branch += image * branch_image_stride
        weight = tl.load(gate + image * gate_stride + channel, mask=mask, other=0.0).to(tl.float32)
    if normed is not None:
        offset = tl.load(shift + image * shift_stride + channel, mask=mask, other=0.0).to(tl.float32)
        factor = 1.0 + tl.load(scale + image * scale_stride + channel, mask=mask, other=0.0).to(tl.float32)
    for token in range(start, tl.minimum(start + TOKENS, tokens)):
        row = image * tokens + token
        h = tl.load(source + tl.cast(token, tl.int64) * source_token_stride + channel, mask=mask, other=0.0).to(
            tl.float32
        )
        if branch is not None:
            b = tl.load(branch + tl.cast(token, tl.int64) * branch_token_stride + channel, mask=mask, other=0.0)
            rounded = (h + weight * b.to(tl.float32)).to(hidden.dtype.element_ty)
            tl.store(hidden + row * channels + channel, rounded, mask=mask)
            h = rounded.to(tl.float32)
        if normed is not None:
            count = tl.cast(channels, tl.float32)
            centre = tl.sum(h) / count
            gap = tl.where(mask, h - centre, 0.0)
            inverse = tl.rsqrt(tl.sum(gap * gap) / count + EPS)
            tl.store(mean + row, centre)
            tl.store(rstd + row, inverse)
            value = gap * inverse * factor + offset
            tl.store(normed + row * channels + channel, value.to(normed.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "chunks", "groups"], do_not_specialize_on_alignment=["mean", "rstd"])
def adaptive_norm_backward_kernel(
    grad_hidden,
    grad_normed,
    hidden,
    branch,
    gate,
    scale,
    mean,
    rstd,
    grad_source,
    grad_branch,
    partials,
    grad_hidden_image_stride,
    grad_hidden_token_stride,
    grad_normed_image_stride,
    grad_normed_token_stride,
    hidden_image_stride,
    hidden_token_stride,
    branch_image_stride,
    branch_token_stride,
    gate_stride,
    scale_stride,
    tokens,
    channels,
    chunks,
    groups,
    SHIFT: tl.constexpr,
    SCALE: tl.constexpr,
    GATE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of the tokens, and sums over this program's tokens for shift, scale and gate.

    ``SHIFT``, ``SCALE`` and ``GATE`` are the slices of ``partials`` [K, images, chunks, C] for their sums; -1: none.
    """
    image = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    start = chunk * TOKENS
    channel = tl.arange(0, BLOCK)
    mask = channel < channels
    if grad_hidden is not None:
        grad_hidden += image * grad_hidden_image_stride
    if grad_normed is not None:
        grad_normed += image * grad_normed_image_stride
        hidden += image * hidden_image_stride
        factor = 1.0 + tl.load(scale + image * scale_stride + channel, mask=mask, other=0.0).to(tl.float32)
    if GATE >= 0:
        branch += image * branch_image_stride
    if grad_branch is not None:
        weight = tl.load(gate + image * gate_stride + channel, mask=mask, other=0.0).to(tl.float32)
    for_shift = tl.zeros((BLOCK,), tl.float32)
    for_scale = tl.zeros((BLOCK,), tl.float32)
    for_gate = tl.zeros((BLOCK,), tl.float32)
    for token in range(start, tl.minimum(start + TOKENS, tokens)):
        row = image * tokens + token
        position = tl.cast(token, tl.int64)
        if grad_normed is not None:
            g = tl.load(grad_normed + position * grad_normed_token_stride + channel, mask=mask, other=0.0)
            g = g.to(tl.float32)
            h = tl.load(hidden + position * hidden_token_stride + channel, mask=mask, other=0.0).to(tl.float32)
            inverse = tl.load(rstd + row)
            standard = tl.where(mask, (h - tl.load(mean + row)) * inverse, 0.0)
            if SHIFT >= 0:
                for_shift += g
            if SCALE >= 0:
                for_scale += g * standard
            if (grad_source is not None) or (grad_branch is not None) or (GATE >= 0):
                g = g * factor
                count = tl.cast(channels, tl.float32)
                along = tl.sum(g * standard) / count
                total = (g - tl.sum(g) / count - standard * along) * inverse
            else:
                total = g
            if grad_hidden is not None:
                direct = tl.load(grad_hidden + position * grad_hidden_token_stride + channel, mask=mask, other=0.0)
                total += direct.to(tl.float32)
        else:
            total = tl.load(grad_hidden + position * grad_hidden_token_stride + channel, mask=mask, other=0.0)
            total = total.to(tl.float32)
        place = row * channels + channel
        if grad_source is not None:
            tl.store(grad_source + place, total.to(grad_source.dtype.element_ty), mask=mask)
        if grad_branch is not None:
            tl.store(grad_branch + place, (weight * total).to(grad_branch.dtype.element_ty), mask=mask)
        if GATE >= 0:
            b = tl.load(branch + position * branch_token_stride + channel, mask=mask, other=0.0)
            for_gate += total * b.to(tl.float32)
    place = (image * chunks + chunk) * channels + channel
    size = tl.cast(groups, tl.int64) * channels
    if SHIFT >= 0:
        tl.store(partials + SHIFT * size + place, for_shift, mask=mask)
    if SCALE >= 0:
        tl.store(partials + SCALE * size + place, for_scale, mask=mask)
    if GATE >= 0:
        tl.store(partials + GATE * size + place, for_gate, mask=mask)


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


def _ready(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else channels_contiguous(tensor) for tensor in tensors]


def _forward(
    source: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, normed, mean, rstd = results = _forward_fake(source, branch, gate, shift, scale, eps)
    if source.numel() == 0:
        return results
    images, tokens, channels = source.shape
    chunks = cdiv(tokens, FORWARD_TOKENS)
    bulk = _ready(source, branch, gate, shift, scale)
    block, warps = block_for(int(channels))
    launch(
        adaptive_norm_forward_kernel, source, (images * chunks, 1, 1), warps,
        *bulk,
        None if branch is None else hidden,
        *((None, None, None) if shift is None else (normed, mean, rstd)),
        *_strides(bulk[0]), *_strides(bulk[1]), *row_strides(*bulk[2:]),
        tokens, channels, chunks, eps, FORWARD_TOKENS, block,
    )  # fmt: skip
    return results


def _forward_fake(
    source: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape, row = (source.shape, source.shape[:2]) if shift is not None else ((0,), (0,))
    return (
        source.new_empty((0,) if branch is None else source.shape),
        source.new_empty(shape),
        source.new_empty(row, dtype=torch.float32),
        source.new_empty(row, dtype=torch.float32),
    )


class Incoming(NamedTuple):
    """Inputs of the backward: gradients, saved tensors, and the dtypes of the gradients that are needed."""

    grad_hidden: Tensor | None
    grad_normed: Tensor | None
    hidden: Tensor | None
    branch: Tensor | None
    gate: Tensor | None
    scale: Tensor | None
    mean: Tensor
    rstd: Tensor
    source_dtype: torch.dtype | None
    branch_dtype: torch.dtype | None
    row_dtype: torch.dtype
    for_shift: bool
    for_scale: bool
    for_gate: bool

    @property
    def some(self) -> Tensor:
        """One of the two gradients: both are of the tokens' shape."""
        given = self.grad_hidden if self.grad_normed is None else self.grad_normed
        assert given is not None
        return given


def _backward(*arguments: Any) -> list[Tensor]:
    given = Incoming(*arguments)
    results = _backward_fake(*arguments)
    incoming = given.some
    images, tokens, channels = incoming.shape
    if incoming.numel() == 0:
        return [torch.zeros_like(result) for result in results]
    taken = tokens_per_program(tokens)
    chunks = cdiv(tokens, taken)
    left = iter(results)
    grad_source = None if given.source_dtype is None else next(left)
    grad_branch = None if given.branch_dtype is None else next(left)
    partials, slots, sums = None, [-1, -1, -1], 0
    if given.for_shift or given.for_scale or given.for_gate:
        for i, want in enumerate((given.for_shift, given.for_scale, given.for_gate)):
            if want:
                slots[i], sums = sums, sums + 1
        partials = incoming.new_empty((sums, images, chunks, channels), dtype=torch.float32)
    bulk = _ready(*given[:6])
    block, warps = block_for(int(channels), sums=sums)
    launch(
        adaptive_norm_backward_kernel, incoming, (images * chunks, 1, 1), warps,
        *bulk,
        *((None, None) if given.grad_normed is None else (given.mean, given.rstd)),
        grad_source, grad_branch, partials,
        *_strides(bulk[0]), *_strides(bulk[1]), *_strides(bulk[2]), *_strides(bulk[3]), *row_strides(*bulk[4:]),
        tokens, channels, chunks, images * chunks, *slots, taken, block,
    )  # fmt: skip
    if partials is not None:
        token_sums(partials, next(left))
    return results


def _backward_fake(*arguments: Any) -> list[Tensor]:
    """Unwritten gradients of what is wanted: of the source, of the branch, and as one tensor of shift, scale, gate."""
    given = Incoming(*arguments)
    incoming = given.some
    shape = incoming.shape
    results = [incoming.new_empty(shape, dtype=d) for d in (given.source_dtype, given.branch_dtype) if d is not None]
    if sums := given.for_shift + given.for_scale + given.for_gate:
        results.append(incoming.new_empty((sums, shape[0], shape[2]), dtype=given.row_dtype))
    return results


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    source, branch, gate, shift, scale, _ = inputs
    hidden, _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.has_branch, ctx.has_norm = branch is not None, shift is not None
    ctx.dtypes = [None if given is None else given.dtype for given in (source, branch, gate, shift, scale)]
    if not ctx.needs_input_grad[2]:  # the gate's, for which alone the branch is kept
        branch = None
    normed = (hidden if ctx.has_branch else source) if ctx.has_norm else None
    ctx.save_for_backward(normed, branch, gate, scale, mean, rstd)


def _autograd_backward(
    ctx: Any, grad_hidden: Tensor | None, grad_normed: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    hidden, branch, gate, scale, mean, rstd = ctx.saved_tensors
    for_source, for_branch, for_gate, for_shift, for_scale, _ = ctx.needs_input_grad
    if not ctx.has_branch:
        grad_hidden = None
    if not ctx.has_norm:
        grad_normed = None
    if grad_normed is None:
        if grad_hidden is None:
            return (None,) * len(ctx.needs_input_grad)
        hidden = scale = None
        for_shift = for_scale = False
    # Without a norm the residual's gradient is the incoming one.
    passed = grad_hidden if for_source and grad_normed is None else None
    of_source, of_branch, *of_rows = ctx.dtypes
    source_dtype = of_source if for_source and passed is None else None
    branch_dtype = of_branch if for_branch else None
    sums = for_shift or for_scale or for_gate
    if source_dtype is None and branch_dtype is None and not sums:
        return passed, None, None, None, None, None
    row_dtype = torch.float32
    if sums and len(kinds := set(of_rows) - {None}) == 1:
        row_dtype = kinds.pop()
    results = _norm_backward(
        grad_hidden, grad_normed, hidden, branch, gate if for_branch else None, scale, mean, rstd,
        source_dtype, branch_dtype, row_dtype, for_shift, for_scale, for_gate,
    )  # fmt: skip
    left = iter(results)
    if source_dtype is not None:
        passed = next(left)
    grad_branch = next(left) if for_branch else None
    grad_rows: list[Tensor | None] = [None, None, None]
    if sums:
        rows = iter(next(left).unbind(0))
        to_shift, to_scale, to_gate = (next(rows) if want else None for want in (for_shift, for_scale, for_gate))
        grad_rows = [
            None if row is None else row.to(dtype)
            for row, dtype in zip((to_gate, to_shift, to_scale), of_rows, strict=True)
        ]
    return passed, grad_branch, *grad_rows, None


_norm_backward = Operator("adaptive_norm_backward", _backward, _backward_fake, takes=(Incoming,))
_norm = Operator("adaptive_norm", _forward, _forward_fake, _setup_context, _autograd_backward)


def adaptive_norm(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Triton version of :func:`pcpo_kernels.ops.adaptive_norm.reference.adaptive_norm`."""
    hidden, normed, _, _ = _norm(*tokens)
    return tokens.source if tokens.branch is None else hidden, normed
