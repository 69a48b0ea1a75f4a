"""The reference path of guidance against its formula, and gradcheck."""

import pytest
import torch
from pcpo_kernels import guidance

LOW = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def on_the_reference_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PCPO_KERNELS", "reference")


@pytest.mark.parametrize("dtype", [*LOW, torch.float32, torch.float64])
def test_guidance(dtype) -> None:
    g = torch.Generator().manual_seed(1)
    reference, output = (torch.randn(5, 3, 4, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    scale = torch.tensor([0.0, 1.0, 0.4, 4.5, -0.5])
    got = guidance(reference, output, scale)
    assert got.dtype == dtype
    assert torch.equal(got[0], reference[0])
    assert torch.equal(got[1], output[1])
    exact = reference.double() + scale.double()[:, None, None] * (output.double() - reference.double())
    torch.testing.assert_close(
        got.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6 if dtype != torch.float64 else 1e-7
    )
    assert torch.equal(guidance(reference, output, 4.5)[3], got[3])
    assert guidance(reference, output, 4.5, dtype=torch.float32).dtype == torch.float32


def test_guidance_gradcheck() -> None:
    g = torch.Generator().manual_seed(2)
    pair = [torch.randn(3, 4, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    scale = torch.tensor([0.3, 4.5, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda r, f: guidance(r, f, scale), pair)


def test_errors() -> None:
    x, rows = torch.ones(3, 4), torch.ones(3)
    with pytest.raises(ValueError, match="reference must have"):
        guidance(torch.ones(3, 5), x, 1.0)
    with pytest.raises(ValueError, match="scale must hold one value per row"):
        guidance(x, x, rows[:2])
    with pytest.raises(TypeError, match="dtype must be"):
        guidance(x, x, 1.0, dtype=torch.int32)
