"""Norm and rotation of heads in plain PyTorch, against complex numbers and differences in float64."""

import pytest
import torch
from block_cases import normal
from pcpo_kernels import norm_rope
from torch.nn import functional


def test_norm_rope() -> None:
    """Against complex numbers: a pair is one, and its rotation a product with e^(i angle)."""
    x, second = normal(2, 3, 2, 6), normal(2, 1, 2, 6, seed=1)
    weight, second_weight = normal(2, 6, seed=2).unbind(0)
    angles = normal(4, 3, seed=3)
    table = angles.repeat_interleave(2, dim=1)
    got = norm_rope(x, weight, table.cos(), table.sin(), 1e-3, second=second, second_weight=second_weight)
    whole = [functional.rms_norm(part, (6,), factor, 1e-3) for part, factor in ((x, weight), (second, second_weight))]
    numbers = torch.view_as_complex(torch.cat(whole, dim=1).unflatten(-1, (3, 2)).contiguous())
    expected = torch.view_as_real(numbers * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)
    torch.testing.assert_close(got, expected)
    assert torch.equal(norm_rope(x, None, None, None, 1e-3), functional.rms_norm(x, (6,), None, 1e-3))


def test_gradcheck() -> None:
    inputs = [normal(1, 2, 2, 4), normal(4, seed=1), normal(1, 1, 2, 4, seed=2), normal(4, seed=3)]
    cos, sin = normal(2, 3, 4, seed=4).unbind(0)
    assert torch.autograd.gradcheck(
        lambda x, w, y, v: norm_rope(x, w, cos, sin, second=y, second_weight=v), [v.requires_grad_() for v in inputs]
    )


def test_errors() -> None:
    x, weight, table = normal(2, 3, 2, 4), normal(4), normal(3, 4)
    bad: list[tuple[type[Exception], str, tuple, dict]] = [
        (ValueError, r"heads must be \[B, S, H, D\], got shape \(4,\)", (weight, None, None, None), {}),
        (ValueError, "size of a head must be even", (x[..., :3], None, None, None), {}),
        (ValueError, r"weight must have shape \(4,\), got \(3,\)", (x, weight[:3], None, None), {}),
        (ValueError, "cos and sin go together", (x, weight, table, None), {}),
        (ValueError, r"cos must have shape \(4, 4\), got \(3, 4\)", (x, weight, table, table), {"second": x[:, :1]}),
        (ValueError, r"second must be \[2, S2, 2, 4\]", (x, weight, None, None), {"second": x[:1]}),
        (ValueError, "second_weight belongs to", (x, weight, None, None), {"second_weight": weight}),
        (TypeError, "second must have the dtype of x", (x, weight, None, None), {"second": x.float()}),
        (TypeError, "x must be a tensor, got int", (3, weight, None, None), {}),
        (ValueError, "at most 16384 elements", (x.expand(2, 3, 2, 4).repeat(1, 1, 2, 4096), None, None, None), {}),
    ]
    for kind, message, positional, named in bad:
        with pytest.raises(kind, match=message):
            norm_rope(*positional, **named)
