"""Gated residual, layer norm and modulation in one pass over the tokens, and their gradients in another."""

# Kernels are compiled from their source; Triton's types are not Python's.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code="assignment, misc"

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcpo_kernels.launch import cdiv, channels_contiguous, empty_like, launch, row_strides, tokens_per_program
from pcpo_kernels.operators import Operator
from pcpo_kernels.ops.adaptive_norm.inputs import Tokens
from pcpo_kernels.ptx import widened
from pcpo_kernels.sums import sums_of_two, token_sums
from pcpo_kernels.tuning import norm_plan

FORWARD_TOKENS = 4
NORM, RESIDUAL, BOTH = "norm", "residual", "residual-norm"  # kinds of calls


@triton.jit
def channels_of(part: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """The channels of a part, and which of them there are: all, as the compiler sees, but in the last one."""
    channel = part * BLOCK + tl.arange(0, BLOCK)
    return channel, channel < CHANNELS


@triton.jit
def load_row(pointer, PARTS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """A token's channels as a tuple of float32 parts; 0 past the last."""
    parts = ()
    for part in tl.static_range(PARTS):
        channel, inside = channels_of(part, CHANNELS, BLOCK)
        parts += (widened(tl.load(pointer + channel, mask=inside, other=0.0)),)
    return parts


@triton.jit
def zero_row(PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """As many zeros as a token has channels."""
    parts = ()
    for _ in tl.static_range(PARTS):
        parts += (tl.zeros((BLOCK,), tl.float32),)
    return parts


@triton.jit
def store_row(pointer, parts, PARTS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Write a token's channels in the pointer's dtype."""
    for part in tl.static_range(PARTS):
        channel, inside = channels_of(part, CHANNELS, BLOCK)
        tl.store(pointer + channel, parts[part].to(pointer.dtype.element_ty), mask=inside)


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
    chunks,
    EPS: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``h = source + gate branch``, rounded; ``(1 + scale) LN(h) + shift``. Parts whose pointer is None are skipped."""
    image = (tl.program_id(0) // chunks).to(tl.int64)
    start = (tl.program_id(0) % chunks) * TOKENS
    source += image * source_image_stride
    if branch is not None:
        branch += image * branch_image_stride
        weights = load_row(gate + image * gate_stride, PARTS, CHANNELS, BLOCK)
    if normed is not None:
        offsets = load_row(shift + image * shift_stride, PARTS, CHANNELS, BLOCK)
        factors = load_row(scale + image * scale_stride, PARTS, CHANNELS, BLOCK)
    for token in tl.range(start, tl.minimum(start + TOKENS, tokens), num_stages=STAGES):
        row = image * tokens + token
        position = tl.cast(token, tl.int64)
        h = load_row(source + position * source_token_stride, PARTS, CHANNELS, BLOCK)
        if branch is not None:
            b = load_row(branch + position * branch_token_stride, PARTS, CHANNELS, BLOCK)
            rounded = ()
            for part in tl.static_range(PARTS):
                rounded += (widened((h[part] + weights[part] * b[part]).to(hidden.dtype.element_ty)),)
            store_row(hidden + row * CHANNELS, rounded, PARTS, CHANNELS, BLOCK)
            h = rounded
        if normed is not None:
            total = h[0]
            for part in tl.static_range(1, PARTS):
                total += h[part]
            centre = tl.sum(total) / CHANNELS
            squares = tl.zeros((BLOCK,), tl.float32)
            for part in tl.static_range(PARTS):
                _, inside = channels_of(part, CHANNELS, BLOCK)
                gap = tl.where(inside, h[part] - centre, 0.0)
                squares = tl.fma(gap, gap, squares)
            inverse = tl.rsqrt(tl.sum(squares) / CHANNELS + EPS)
            tl.store(mean + row, centre)
            tl.store(rstd + row, inverse)
            values = ()
            for part in tl.static_range(PARTS):
                values += ((h[part] - centre) * inverse * (1.0 + factors[part]) + offsets[part],)
            store_row(normed + row * CHANNELS, values, PARTS, CHANNELS, BLOCK)


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
    chunks,
    groups,
    SHIFT: tl.constexpr,
    SCALE: tl.constexpr,
    GATE: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of the tokens, and sums over this program's tokens for shift, scale and gate.

    ``SHIFT``, ``SCALE`` and ``GATE`` are the slices of ``partials`` [K, images, chunks, C] for their sums; -1: none.
    """
    image = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    start = chunk * TOKENS
    if grad_hidden is not None:
        grad_hidden += image * grad_hidden_image_stride
    if grad_normed is not None:
        grad_normed += image * grad_normed_image_stride
        hidden += image * hidden_image_stride
        factors = load_row(scale + image * scale_stride, PARTS, CHANNELS, BLOCK)
    if GATE >= 0:
        branch += image * branch_image_stride
        for_gate = zero_row(PARTS, BLOCK)
    if grad_branch is not None:
        weights = load_row(gate + image * gate_stride, PARTS, CHANNELS, BLOCK)
    if SHIFT >= 0:
        for_shift = zero_row(PARTS, BLOCK)
    if SCALE >= 0:
        for_scale = zero_row(PARTS, BLOCK)
    for token in tl.range(start, tl.minimum(start + TOKENS, tokens), num_stages=STAGES):
        row = image * tokens + token
        position = tl.cast(token, tl.int64)
        if grad_normed is not None:
            g = load_row(grad_normed + position * grad_normed_token_stride, PARTS, CHANNELS, BLOCK)
            h = load_row(hidden + position * hidden_token_stride, PARTS, CHANNELS, BLOCK)
            centre, inverse = tl.load(mean + row), tl.load(rstd + row)
            standard = ()
            for part in tl.static_range(PARTS):
                _, inside = channels_of(part, CHANNELS, BLOCK)
                standard += (tl.where(inside, (h[part] - centre) * inverse, 0.0),)
            if SHIFT >= 0:
                grown = ()
                for part in tl.static_range(PARTS):
                    grown += (for_shift[part] + g[part],)
                for_shift = grown
            if SCALE >= 0:
                grown = ()
                for part in tl.static_range(PARTS):
                    grown += (tl.fma(g[part], standard[part], for_scale[part]),)
                for_scale = grown
            if (grad_source is not None) or (grad_branch is not None) or (GATE >= 0):
                scaled = ()
                for part in tl.static_range(PARTS):
                    scaled += (tl.fma(g[part], factors[part], g[part]),)
                plain, along = scaled[0], scaled[0] * standard[0]
                for part in tl.static_range(1, PARTS):
                    plain += scaled[part]
                    along = tl.fma(scaled[part], standard[part], along)
                plain_sum, along_sum = sums_of_two(plain, along)
                total = ()
                for part in tl.static_range(PARTS):
                    one = scaled[part] - plain_sum / CHANNELS - standard[part] * (along_sum / CHANNELS)
                    total += (one * inverse,)
                if grad_hidden is not None:
                    direct = load_row(grad_hidden + position * grad_hidden_token_stride, PARTS, CHANNELS, BLOCK)
                    both = ()
                    for part in tl.static_range(PARTS):
                        both += (total[part] + direct[part],)
                    total = both
        else:
            total = load_row(grad_hidden + position * grad_hidden_token_stride, PARTS, CHANNELS, BLOCK)
        if grad_source is not None:
            store_row(grad_source + row * CHANNELS, total, PARTS, CHANNELS, BLOCK)
        if grad_branch is not None:
            gated = ()
            for part in tl.static_range(PARTS):
                gated += (weights[part] * total[part],)
            store_row(grad_branch + row * CHANNELS, gated, PARTS, CHANNELS, BLOCK)
        if GATE >= 0:
            b = load_row(branch + position * branch_token_stride, PARTS, CHANNELS, BLOCK)
            grown = ()
            for part in tl.static_range(PARTS):
                grown += (tl.fma(total[part], b[part], for_gate[part]),)
            for_gate = grown
    place = (image * chunks + chunk) * CHANNELS
    size = tl.cast(groups, tl.int64) * CHANNELS
    if SHIFT >= 0:
        store_row(partials + SHIFT * size + place, for_shift, PARTS, CHANNELS, BLOCK)
    if SCALE >= 0:
        store_row(partials + SCALE * size + place, for_scale, PARTS, CHANNELS, BLOCK)
    if GATE >= 0:
        store_row(partials + GATE * size + place, for_gate, PARTS, CHANNELS, BLOCK)


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if tensor is None else tensor.stride()[:2]


def _ready(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else channels_contiguous(tensor) for tensor in tensors]


def _forward(
    source: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, eps: float
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    results = _forward_fake(source, branch, gate, shift, scale, eps)
    if source.numel() == 0:
        return results
    images, tokens, channels = source.shape
    chunks = cdiv(tokens, FORWARD_TOKENS)
    bulk = _ready(source, branch, gate, shift, scale)
    kind = RESIDUAL if shift is None else NORM if branch is None else BOTH
    plan = norm_plan(f"forward-{kind}", int(channels), source.element_size(), source.device)
    launch(
        adaptive_norm_forward_kernel, source, (images * chunks, 1, 1), plan.warps,
        (*bulk, *results), *_strides(bulk[0]), *_strides(bulk[1]), *row_strides(*bulk[2:]),
        tokens, chunks, eps, FORWARD_TOKENS, plan.STAGES, int(channels), plan.PARTS, plan.BLOCK,
    )  # fmt: skip
    return results


def _forward_fake(
    source: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, eps: float
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Unwritten sum, its norm, and the mean and the inverse standard deviation of each token; None: not asked for."""
    hidden = None if branch is None else empty_like(source)
    if shift is None:
        return hidden, None, None, None
    mean = source.new_empty(source.shape[:2], dtype=torch.float32)
    return hidden, empty_like(source), mean, empty_like(mean)


class Incoming(NamedTuple):
    """Inputs of the backward: gradients, saved tensors, and the dtypes of the gradients that are needed."""

    grad_hidden: Tensor | None
    grad_normed: Tensor | None
    hidden: Tensor | None
    branch: Tensor | None
    gate: Tensor | None
    scale: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None
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
    incoming, results = given.some, _unwritten(given)
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
    kind = RESIDUAL if given.grad_normed is None else NORM if given.grad_hidden is None else BOTH
    launched = f"backward-{kind}" if sums else f"backward-{kind}-frozen"
    plan = norm_plan(launched, int(channels), incoming.element_size(), incoming.device)
    launch(
        adaptive_norm_backward_kernel, incoming, (images * chunks, 1, 1), plan.warps,
        (
            *bulk, *((None, None) if given.grad_normed is None else (given.mean, given.rstd)),
            grad_source, grad_branch, partials,
        ),
        *_strides(bulk[0]), *_strides(bulk[1]), *_strides(bulk[2]), *_strides(bulk[3]), *row_strides(*bulk[4:]),
        tokens, chunks, images * chunks, *slots, taken, plan.STAGES, int(channels), plan.PARTS, plan.BLOCK,
    )  # fmt: skip
    if partials is not None:
        token_sums(partials, next(left))
    return results


def _backward_fake(*arguments: Any) -> list[Tensor]:
    return _unwritten(Incoming(*arguments))


def _unwritten(given: Incoming) -> list[Tensor]:
    """Unwritten gradients of what is wanted: of the source, of the branch, and as one tensor of shift, scale, gate."""
    incoming = given.some
    results = [empty_like(incoming, dtype) for dtype in (given.source_dtype, given.branch_dtype) if dtype is not None]
    if sums := given.for_shift + given.for_scale + given.for_gate:
        results.append(incoming.new_empty((sums, incoming.shape[0], incoming.shape[2]), dtype=given.row_dtype))
    return results


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    source, branch, gate, shift, scale, _ = inputs
    hidden, _, mean, rstd = output
    ctx.set_materialize_grads(False)
    if mean is not None:
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
    if not sums:
        return passed, grad_branch, None, None, None, None
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
