"""RMS norm of heads and rotary embedding in one pass over queries or keys, and their gradients in another."""

# Kernels are compiled from their source; Triton's types are not Python's.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcpo_kernels.launch import as_read, cdiv, channels_contiguous, empty_like, launch, tokens_per_program
from pcpo_kernels.operators import Operator
from pcpo_kernels.ops.rotary.inputs import Heads
from pcpo_kernels.sums import token_sums


@triton.jit
def turned(y, HEADS: tl.constexpr, SIZE: tl.constexpr):
    """Each pair (a, b) as (-b, a), [HEADS, SIZE]."""
    even, odd = tl.split(tl.reshape(y, (HEADS, SIZE // 2, 2)))
    return tl.reshape(tl.join(-odd, even), (HEADS, SIZE))


@triton.jit(do_not_specialize=["tokens", "heads", "first"])
def norm_rope_forward_kernel(
    x,
    weight,
    cos,
    sin,
    result,
    x_image_stride,
    x_token_stride,
    x_head_stride,
    tokens,
    heads,
    size,
    first,
    result_image_stride,
    EPS: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """One token of one image: all its heads. ``first`` is the token's place in the result, and in cos and sin."""
    image = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    head = tl.arange(0, HEADS)
    place = tl.arange(0, SIZE)
    inside = place < size
    mask = (head < heads)[:, None] & inside[None, :]
    start = image * x_image_stride + token * x_token_stride
    y = tl.load(x + start + head[:, None] * x_head_stride + place[None, :], mask=mask, other=0.0).to(tl.float32)
    y = y * tl.rsqrt(tl.sum(y * y, axis=1) / tl.cast(size, tl.float32) + EPS)[:, None]
    if weight is not None:
        y = y * tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)[None, :]
    if cos is not None:
        position = (first + token) * size + place
        c = tl.load(cos + position, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + position, mask=inside, other=0.0).to(tl.float32)
        y = y * c[None, :] + turned(y, HEADS, SIZE) * s[None, :]
    start = image * result_image_stride + (first + token) * heads * size
    tl.store(result + start + head[:, None] * size + place[None, :], y.to(result.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "heads", "first", "chunks"])
def norm_rope_backward_kernel(
    incoming,
    x,
    weight,
    cos,
    sin,
    gradient,
    partials,
    incoming_image_stride,
    incoming_token_stride,
    incoming_head_stride,
    x_image_stride,
    x_token_stride,
    x_head_stride,
    tokens,
    heads,
    size,
    first,
    chunks,
    EPS: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Gradient of the heads, and this program's sum for the weight; either may be None."""
    image = (tl.program_id(0) // chunks).to(tl.int64)
    begin = (tl.program_id(0) % chunks) * TOKENS
    head = tl.arange(0, HEADS)
    place = tl.arange(0, SIZE)
    inside = place < size
    mask = (head < heads)[:, None] & inside[None, :]
    count = tl.cast(size, tl.float32)
    total = tl.zeros((HEADS, SIZE), tl.float32)
    if weight is not None:
        factor = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    for index in range(begin, tl.minimum(begin + TOKENS, tokens)):
        token = tl.cast(index, tl.int64)
        start = image * incoming_image_stride + (first + token) * incoming_token_stride
        g = tl.load(incoming + start + head[:, None] * incoming_head_stride + place[None, :], mask=mask, other=0.0)
        g = g.to(tl.float32)
        if cos is not None:
            position = (first + token) * size + place
            c = tl.load(cos + position, mask=inside, other=0.0).to(tl.float32)
            s = tl.load(sin + position, mask=inside, other=0.0).to(tl.float32)
            g = g * c[None, :] - turned(g * s[None, :], HEADS, SIZE)
        start = image * x_image_stride + token * x_token_stride
        y = tl.load(x + start + head[:, None] * x_head_stride + place[None, :], mask=mask, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(y * y, axis=1) / count + EPS)
        y = y * inverse[:, None]
        if partials is not None:
            total += g * y
        if gradient is not None:
            if weight is not None:
                g = g * factor[None, :]
            g = (g - y * (tl.sum(g * y, axis=1) / count)[:, None]) * inverse[:, None]
            start = (image * tokens + token) * heads * size
            kind = gradient.dtype.element_ty
            tl.store(gradient + start + head[:, None] * size + place[None, :], g.to(kind), mask=mask)
    if partials is not None:
        tl.store(partials + tl.program_id(0).to(tl.int64) * size + place, tl.sum(total, axis=0), mask=inside)


@functools.cache
def tile_for(heads: int, size: int, *, sums: bool = False) -> tuple[tuple[int, int], int]:
    """The tile of one token and its warps: 16 elements per thread of a large one, 32 of the largest without sums."""
    tile = triton.next_power_of_2(heads), max(2, triton.next_power_of_2(size))
    return tile, min(16 if sums else 8, max(1, tile[0] * tile[1] // 512))


def _parts(heads: Heads) -> list[tuple[Tensor, Tensor | None, int]]:
    """Each sequence, its weight and its first place in the result."""
    parts = [(channels_contiguous(heads.x), as_read(heads.weight), 0)]
    if heads.second is not None:
        parts.append((channels_contiguous(heads.second), as_read(heads.second_weight), heads.x.shape[1]))
    return parts


def _forward(*arguments: Any) -> Tensor:
    given = Heads(*arguments)
    result = _forward_fake(*given)
    cos, sin = as_read(given.cos), as_read(given.sin)
    for part, factor, first in _parts(given):
        images, tokens, heads, size = part.shape
        if part.numel() > 0:
            tile, warps = tile_for(int(heads), int(size))
            launch(
                norm_rope_forward_kernel, result, (images * tokens, 1, 1), warps,
                (part, factor, cos, sin, result), *part.stride()[:3],
                tokens, heads, size, first, result.stride(0),
                given.eps, *tile,
            )  # fmt: skip
    return result


def _forward_fake(*arguments: Any) -> Tensor:
    given = Heads(*arguments)
    images, tokens, *head = given.x.shape
    tokens += 0 if given.second is None else given.second.shape[1]
    return torch.empty((images, tokens, *head), dtype=given.x.dtype, device=given.x.device)


def _backward(
    incoming: Tensor, for_x: bool, for_weight: bool, for_second: bool, for_second_weight: bool, *arguments: Any
) -> list[Tensor]:
    given, wanted = Heads(*arguments), ((for_x, for_weight), (for_second, for_second_weight))
    results = _backward_fake(incoming, for_x, for_weight, for_second, for_second_weight, *arguments)
    left = iter(results)
    read, cos, sin = channels_contiguous(incoming), as_read(given.cos), as_read(given.sin)
    for (part, factor, first), (for_part, for_factor) in zip(_parts(given), wanted, strict=False):
        images, tokens, heads, size = part.shape
        gradient = next(left) if for_part else None
        total = next(left) if for_factor else None
        if part.numel() == 0:
            if total is not None:
                total.zero_()
            continue
        if gradient is None and total is None:
            continue
        taken = tokens_per_program(tokens)
        chunks = cdiv(tokens, taken)
        partials = None if total is None else part.new_empty((images * chunks, size), dtype=torch.float32)
        tile, warps = tile_for(int(heads), int(size), sums=total is not None)
        launch(
            norm_rope_backward_kernel, part, (images * chunks, 1, 1), warps,
            (read, part, factor, cos, sin, gradient, partials), *read.stride()[:3], *part.stride()[:3],
            tokens, heads, size, first, chunks, given.eps, taken, *tile,
        )  # fmt: skip
        if partials is not None and total is not None:
            token_sums(partials, total)
    return results


def _backward_fake(
    incoming: Tensor, for_x: bool, for_weight: bool, for_second: bool, for_second_weight: bool, *arguments: Any
) -> list[Tensor]:
    """Unwritten gradients of what is wanted."""
    given = Heads(*arguments)
    tensors = (given.x, for_x), (given.weight, for_weight), (given.second, for_second)
    wanted = [t for t, want in (*tensors, (given.second_weight, for_second_weight)) if want and t is not None]
    return [empty_like(tensor) for tensor in wanted]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _autograd_backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
    wanted = Heads(*ctx.needs_input_grad)
    flags = wanted.x, wanted.weight, wanted.second, wanted.second_weight
    gradients = iter(_rope_backward(incoming, *flags, *ctx.saved_tensors, ctx.eps))
    x, weight, second, second_weight = (next(gradients) if flag else None for flag in flags)
    return x, weight, None, None, second, second_weight, None


_rope_backward = Operator("norm_rope_backward", _backward, _backward_fake, takes=(Heads,))
_rope = Operator("norm_rope", _forward, _forward_fake, _setup_context, _autograd_backward, takes=(Heads,))


def norm_rope(heads: Heads) -> Tensor:
    """Triton version of :func:`pcpo_kernels.norm_rope`."""
    result: Tensor = _rope(*heads)
    return result
