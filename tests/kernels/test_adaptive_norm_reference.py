"""Modulated norms and gated residuals in plain PyTorch, against formulas written again and differences in float64."""

import pytest
import torch
from block_cases import LOW, normal
from pcpo_kernels import gated_residual, gated_residual_norm, modulated_norm


def rows(images: int = 2, channels: int = 6, count: int = 3) -> list[torch.Tensor]:
    return list(normal(count, images, channels, seed=5).unbind(0))


def test_modulated_norm() -> None:
    x, (shift, scale, _) = normal(2, 4, 6), rows()
    got = modulated_norm(x, shift, scale, 1e-3)
    for image in range(2):
        for token in range(4):
            row = x[image, token]
            plain = (row - row.mean()) / (row.var(unbiased=False) + 1e-3).sqrt()
            torch.testing.assert_close(got[image, token], plain * (1 + scale[image]) + shift[image])


def test_gated_residual_and_norm() -> None:
    x, branch, (gate, shift, scale) = normal(2, 4, 6), normal(2, 4, 6, seed=1), rows()
    hidden, normed = gated_residual_norm(x, branch, gate, shift, scale)
    torch.testing.assert_close(hidden, x + gate[:, None] * branch)
    assert torch.equal(gated_residual(x, branch, gate), hidden)
    assert torch.equal(modulated_norm(hidden, shift, scale), normed)


def test_gradcheck() -> None:
    inputs = [value.requires_grad_() for value in (normal(2, 3, 4), normal(2, 3, 4, seed=1), *rows(channels=4))]
    assert torch.autograd.gradcheck(gated_residual_norm, inputs)


@pytest.mark.parametrize("dtype", LOW)
def test_rounded_once(dtype) -> None:
    """The sum is correctly rounded, and the norm is that of the rounded sum."""
    x, branch = (normal(2, 4, 6, seed=i).to(dtype) for i in range(2))
    gate, shift, scale = (row.to(dtype) for row in rows())
    hidden, normed = gated_residual_norm(x, branch, gate, shift, scale)
    assert hidden.dtype == normed.dtype == dtype
    assert torch.equal(hidden, (x.float() + gate.float()[:, None] * branch.float()).to(dtype))
    exact = modulated_norm(hidden.double(), shift.double(), scale.double())
    torch.testing.assert_close(normed.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_errors() -> None:
    x, (gate, shift, scale) = normal(2, 4, 6), rows()
    with pytest.raises(ValueError, match=r"the tokens must be \[B, S, C\], got shape \(2, 6\)"):
        modulated_norm(gate, shift, scale)
    with pytest.raises(ValueError, match=r"scale must hold a row of channels per image, \(2, 6\), got \(2, 1, 6\)"):
        modulated_norm(x, shift, scale[:, None])
    with pytest.raises(TypeError, match="gate must be a tensor, got float"):
        gated_residual(x, x, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="branch must have the output's shape"):
        gated_residual(x, x[:, :2], gate)
    with pytest.raises(TypeError, match="x must be float16"):
        modulated_norm(x.long(), shift, scale)
    with pytest.raises(ValueError, match="shift is on meta"):
        modulated_norm(x, shift.to("meta"), scale)
    with pytest.raises(ValueError, match="1 to 8192 channels, got 0"):
        modulated_norm(x[..., :0], shift[:, :0], scale[:, :0])
