"""SwiGLU in plain PyTorch, against its formula written again, and differences in float64."""

import pytest
import torch
from block_cases import LOW, normal
from pcpo_kernels import swiglu


def formula(x: torch.Tensor) -> torch.Tensor:
    size = x.shape[2] // 2
    return x[..., :size] / (1 + torch.exp(-x[..., :size])) * x[..., size:]


def test_swiglu() -> None:
    x = 3 * normal(2, 4, 6)
    torch.testing.assert_close(swiglu(x), formula(x))
    assert torch.autograd.gradcheck(swiglu, [x.requires_grad_()])


@pytest.mark.parametrize("dtype", LOW)
def test_rounded_once(dtype) -> None:
    x = (3 * normal(2, 4, 6)).to(dtype)
    got = swiglu(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), formula(x.double()), rtol=torch.finfo(dtype).eps / 1.9, atol=1e-7)


def test_errors() -> None:
    with pytest.raises(TypeError, match="x must be a tensor, got float"):
        swiglu(1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x must be \[B, S, 2C\], got shape \(2, 6\)"):
        swiglu(normal(2, 6))
    with pytest.raises(ValueError, match=r"x must be \[B, S, 2C\], got shape \(2, 6, 3\)"):
        swiglu(normal(2, 6, 3))
    with pytest.raises(TypeError, match="x must be float16"):
        swiglu(normal(2, 6, 4).long())
