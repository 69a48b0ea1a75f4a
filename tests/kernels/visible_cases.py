"""Calls of every op with visible kernels, for tests of what torch.compile makes of them."""

from collections.abc import Callable

import torch
from pcpo_kernels import (
    NoiseKey,
    gated_residual_norm,
    guidance,
    modulated_norm,
    norm_rope,
    philox_normal,
    policy_loss,
    sample_step,
    swiglu,
)


def low(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(torch.bfloat16)


def loss(output, unconditional, reference, rows, key):
    return policy_loss(
        output, reference, NoiseKey(*key), *rows[:4], clip_range=1e-4, objective="clip",
        reference=reference, kl=rows[4], unconditional=unconditional, guidance_scale=rows[5],
    ).loss  # fmt: skip


def step(f, x, rows, key):
    return sample_step(x, guidance(x, f, rows[0]), *rows[:3], NoiseKey(*key)).next_latents + philox_normal(*key, 40)


def norms(x, branch, modulation):
    gate, shift, scale = modulation.chunk(3, 1)
    hidden, normed = gated_residual_norm(modulated_norm(x, shift, scale), branch, gate, shift, scale)
    return hidden + normed


def heads(x, weight, second, table):
    return norm_rope(x, weight, table, table, second=second, second_weight=weight)


def cases(rows: int = 3) -> dict[str, tuple[Callable, list, int]]:
    """A function, its arguments, and how many of the first want a gradient."""
    key = torch.arange(rows), torch.arange(rows) * 40
    columns = [torch.rand(rows) for _ in range(6)]
    return {
        "loss": (loss, [low(rows, 40), low(rows, 40), torch.randn(rows, 40), columns, key], 2),
        "step": (step, [low(rows, 40), torch.randn(rows, 40), columns, key], 0),
        "norms": (norms, [low(rows, 5, 32), low(rows, 5, 32), low(rows, 96)], 3),
        "swiglu": (swiglu, [low(rows, 5, 32)], 1),
        "heads": (heads, [low(rows, 3, 2, 8), low(8), low(rows, 2, 2, 8), torch.randn(5, 8)], 3),
    }


def run(function, given, wanted) -> None:
    leaves = [value.requires_grad_() if place < wanted else value for place, value in enumerate(given)]
    result = function(*leaves)
    if wanted:
        torch.autograd.grad(result, leaves[:wanted], torch.ones_like(result))
