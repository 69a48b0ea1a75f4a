"""RMS norm of heads and rotary embedding in one pass over queries or keys, and their gradients in another."""

# Kernels are compiled from their source; Triton's types are not Python's.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcpo_kernels.launch import on_device, register
from pcpo_kernels.sums import channels_contiguous, token_sums, tokens_per_program


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


def tile_options(heads: int, size: int) -> dict[str, Any]:
    """The tile of one token and its warps: 16 elements per thread of a large one."""
    tile = triton.next_power_of_2(heads), max(2, triton.next_power_of_2(size))
    warps = min(8, max(1, tile[0] * tile[1] // 512))
    return {"HEADS": tile[0], "SIZE": tile[1], "num_warps": warps, "enable_fp_fusion": False}


def _row(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _parts(
    x: Tensor, weight: Tensor | None, second: Tensor | None, second_weight: Tensor | None
) -> list[tuple[Tensor, Tensor | None, int]]:
    """Each sequence that has elements, its weight and its first place in the result."""
    parts = [(channels_contiguous(x), _row(weight), 0)]
    if second is not None:
        parts.append((channels_contiguous(second), _row(second_weight), x.shape[1]))
    return parts


def _forward(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    second: Tensor | None,
    second_weight: Tensor | None,
    eps: float,
) -> Tensor:
    result = _forward_fake(x, weight, cos, sin, second, second_weight, eps)
    cos, sin = _row(cos), _row(sin)
    with on_device(x):
        for part, factor, first in _parts(x, weight, second, second_weight):
            images, tokens, heads, size = part.shape
            if part.numel() > 0:
                norm_rope_forward_kernel[(images * tokens,)](
                    part,
                    factor,
                    cos,
                    sin,
                    result,
                    *part.stride()[:3],
                    tokens,
                    heads,
                    size,
                    first,
                    result.stride(0),
                    EPS=eps,
                    **tile_options(heads, size),
                )
    return result


def _forward_fake(x: Tensor, weight: Any, cos: Any, sin: Any, second: Tensor | None, *_: Any) -> Tensor:
    tokens = x.shape[1] + (0 if second is None else second.shape[1])
    return torch.empty((x.shape[0], tokens, *x.shape[2:]), dtype=x.dtype, device=x.device)


def _backward(
    incoming: Tensor,
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    second: Tensor | None,
    second_weight: Tensor | None,
    eps: float,
    for_x: bool,
    for_weight: bool,
    for_second: bool,
    for_second_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wanted = (for_x, for_weight, for_second, for_second_weight)
    results = list(_backward_fake(incoming, x, weight, cos, sin, second, second_weight, eps, *wanted))
    incoming, cos, sin = channels_contiguous(incoming), _row(cos), _row(sin)
    with on_device(x):
        for i, (part, factor, first) in enumerate(_parts(x, weight, second, second_weight)):
            images, tokens, heads, size = part.shape
            for_part, for_factor = wanted[2 * i : 2 * i + 2]
            if not (for_part or for_factor):
                continue
            if part.numel() == 0:
                if for_factor:
                    results[2 * i + 1].zero_()
                continue
            taken = tokens_per_program(tokens)
            chunks = triton.cdiv(tokens, taken)
            partials = None
            if for_factor:
                partials = torch.empty((images * chunks, size), dtype=torch.float32, device=x.device)
            norm_rope_backward_kernel[(images * chunks,)](
                incoming,
                part,
                factor,
                cos,
                sin,
                results[2 * i] if for_part else None,
                partials,
                *incoming.stride()[:3],
                *part.stride()[:3],
                tokens,
                heads,
                size,
                first,
                chunks,
                EPS=eps,
                TOKENS=taken,
                **tile_options(heads, size),
            )
            if partials is not None:
                results[2 * i + 1] = token_sums(partials, results[2 * i + 1].dtype)
    return results[0], results[1], results[2], results[3]


def _backward_fake(
    incoming: Tensor,
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    second: Tensor | None,
    second_weight: Tensor | None,
    eps: float,
    *wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def gradient(tensor: Tensor | None, want: bool) -> Tensor:
        if tensor is None or not want:
            return x.new_empty((0,))
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=x.device)

    first, factor, other, other_factor = (
        gradient(tensor, want) for tensor, want in zip((x, weight, second, second_weight), wanted, strict=True)
    )
    return first, factor, other, other_factor


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _autograd_backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
    for_x, for_weight, _, _, for_second, for_second_weight, _ = ctx.needs_input_grad
    wanted = (for_x, for_weight, for_second, for_second_weight)
    gradients = torch.ops.pcpo_kernels.norm_rope_backward(incoming, *ctx.saved_tensors, ctx.eps, *wanted)
    x, weight, second, second_weight = (
        gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)
    )
    return x, weight, None, None, second, second_weight, None


_INPUTS = "Tensor x, Tensor? weight, Tensor? cos, Tensor? sin, Tensor? second, Tensor? second_weight, float eps"
register("norm_rope", f"({_INPUTS}) -> Tensor", _forward, _forward_fake)
register(
    "norm_rope_backward",
    f"(Tensor incoming, {_INPUTS}, bool for_x, bool for_weight, bool for_second, bool for_second_weight) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
torch.library.register_autograd("pcpo_kernels::norm_rope", _autograd_backward, setup_context=_setup_context)


def norm_rope(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    second: Tensor | None,
    second_weight: Tensor | None,
    eps: float,
) -> Tensor:
    """Triton version of :func:`pcpo_kernels.norm_rope`."""
    result: Tensor = torch.ops.pcpo_kernels.norm_rope(x, weight, cos, sin, second, second_weight, eps)
    return result
