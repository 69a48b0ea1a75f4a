"""SwiGLU in one pass over both halves of the channels, and its gradient in another."""

# Kernels are compiled from their source; Triton's types are not Python's.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pcpo_kernels.launch import channels_contiguous, empty_like, launch, plan_for
from pcpo_kernels.operators import Operator
from pcpo_kernels.ptx import widened


@triton.jit
def place_of(tokens, channels, BLOCK: tl.constexpr):
    """Of a program: its image, its token there and among all, its channels of a half, and which of them there are."""
    row = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return (row // tokens).to(tl.int64), (row % tokens).to(tl.int64), row.to(tl.int64), channel, channel < channels


@triton.jit(do_not_specialize=["tokens"])
def swiglu_forward_kernel(
    x,
    result,
    x_image_stride,
    x_token_stride,
    tokens,
    channels,
    BLOCK: tl.constexpr,
):
    """``silu(a) b`` of a block of one token's channels, whose halves a and b follow each other in ``x``."""
    image, token, row, channel, mask = place_of(tokens, channels, BLOCK)
    x += image * x_image_stride + token * x_token_stride
    a = widened(tl.load(x + channel, mask=mask, other=0.0))
    b = widened(tl.load(x + channels + channel, mask=mask, other=0.0))
    value = a * tl.sigmoid(a) * b
    tl.store(result + row * channels + channel, value.to(result.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def swiglu_backward_kernel(
    incoming,
    x,
    gradient,
    incoming_image_stride,
    incoming_token_stride,
    x_image_stride,
    x_token_stride,
    tokens,
    channels,
    BLOCK: tl.constexpr,
):
    """The gradient of both halves."""
    image, token, row, channel, mask = place_of(tokens, channels, BLOCK)
    incoming += image * incoming_image_stride + token * incoming_token_stride
    x += image * x_image_stride + token * x_token_stride
    gradient += row * channels * 2
    g = widened(tl.load(incoming + channel, mask=mask, other=0.0))
    a = widened(tl.load(x + channel, mask=mask, other=0.0))
    b = widened(tl.load(x + channels + channel, mask=mask, other=0.0))
    s = tl.sigmoid(a)
    kind = gradient.dtype.element_ty
    tl.store(gradient + channel, (g * b * s * (1.0 + a * (1.0 - s))).to(kind), mask=mask)
    tl.store(gradient + channels + channel, (g * a * s).to(kind), mask=mask)


def _forward(x: Tensor) -> Tensor:
    result = _forward_fake(x)
    if result.numel() > 0:
        images, tokens, channels = result.shape
        plan, read = plan_for(int(channels)), channels_contiguous(x)
        launch(
            swiglu_forward_kernel, x, (images * tokens, plan.chunks(channels), 1), plan.warps,
            (read, result), *read.stride()[:2], tokens, channels, plan.BLOCK,
        )  # fmt: skip
    return result


def _forward_fake(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:2], x.shape[2] // 2))


def _backward(incoming: Tensor, x: Tensor) -> Tensor:
    gradient = _backward_fake(incoming, x)
    if gradient.numel() > 0:
        images, tokens, channels = incoming.shape
        plan, given, read = plan_for(int(channels)), channels_contiguous(incoming), channels_contiguous(x)
        launch(
            swiglu_backward_kernel, x, (images * tokens, plan.chunks(channels), 1), plan.warps,
            (given, read, gradient), *given.stride()[:2], *read.stride()[:2], tokens, channels, plan.BLOCK,
        )  # fmt: skip
    return gradient


def _backward_fake(incoming: Tensor, x: Tensor) -> Tensor:
    return empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd_backward(ctx: Any, incoming: Tensor) -> Tensor:
    gradient: Tensor = _swiglu_backward(incoming, *ctx.saved_tensors)
    return gradient


_swiglu_backward = Operator("swiglu_backward", _backward, _backward_fake)
_swiglu = Operator("swiglu", _forward, _forward_fake, _setup_context, _autograd_backward)


def swiglu(x: Tensor) -> Tensor:
    """Triton version of :func:`pcpo_kernels.swiglu`."""
    result: Tensor = _swiglu(x)
    return result
