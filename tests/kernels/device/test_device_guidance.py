"""guidance in Triton against its formula in float64."""

import pytest
import torch
from pcpo_kernels import guidance
from pcpo_kernels.launch import Plan
from pcpo_kernels.ops.guidance import triton as kernels

LOW = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
def test_guidance(device, dtype) -> None:
    g = torch.Generator().manual_seed(3)
    pair = [torch.randn(5, 7, 3, generator=g).to(dtype) for _ in range(2)]
    scale = torch.tensor([0.0, 1.0, 0.4, 4.5, -0.5])
    there = [value.to(device).requires_grad_() for value in pair]
    result = guidance(*there, scale.to(device))
    assert result.dtype == dtype
    assert torch.equal(result[0], there[0][0])
    assert torch.equal(result[1], there[1][1])
    exact = pair[0].double() + scale.double()[:, None, None] * (pair[1].double() - pair[0].double())
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(result.detach().double().cpu(), exact, rtol=2 * epsilon, atol=4 * epsilon)
    incoming = torch.randn(5, 7, 3, generator=g).to(dtype)
    gradients = torch.autograd.grad(result, there, incoming.to(device))
    weights = scale.double()[:, None, None]
    for got, weight in zip(gradients, (1 - weights, weights), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double().cpu(), weight * incoming.double(), rtol=2 * epsilon, atol=epsilon)
    wide = guidance(*there, scale.to(device), dtype=torch.float32)
    torch.testing.assert_close(wide.detach().double().cpu(), exact, rtol=3e-7, atol=1e-6)


def test_strides_and_single_gradients(device) -> None:
    r, f = (torch.randn(4, 6, 5, device=device) for _ in range(2))
    scale = torch.full((4,), 3.5, device=device)
    expected = guidance(r, f, scale)
    halves = torch.cat((r, f)).reshape(2, 4, 6, 5).transpose(0, 1)
    assert torch.equal(guidance(halves[:, 0], halves[:, 1], 3.5), expected)
    f.requires_grad_()
    (alone,) = torch.autograd.grad(guidance(r, f, scale).sum(), [f])
    torch.testing.assert_close(alone, torch.full_like(f, 3.5))
    r.requires_grad_()
    (alone,) = torch.autograd.grad(guidance(r, f.detach(), scale).sum(), [r])
    torch.testing.assert_close(alone, torch.full_like(r, -2.5))
    assert guidance(r[:0], f[:0], scale[:0]).shape == (0, 6, 5)


@pytest.mark.parametrize("plan", [Plan(128, 3), Plan(256, 2), Plan(1024, 1)])
def test_nothing_depends_on_how_rows_are_cut(device, monkeypatch, plan) -> None:
    halves = [torch.randn(2, 1000, device=device).requires_grad_() for _ in range(2)]
    expected = guidance(*halves, 2.5)
    monkeypatch.setattr(kernels, "plan_for", lambda _: plan)
    combined = guidance(*halves, 2.5)
    assert torch.equal(combined, expected)
    gradients = torch.autograd.grad(combined.sum(), halves)
    assert [gradient.unique().tolist() for gradient in gradients] == [[-1.5], [2.5]]


def test_empty(device) -> None:
    for shape in ((0, 5), (3, 0), (2, 3, 0)):
        halves = [torch.zeros(shape, device=device).requires_grad_() for _ in range(2)]
        combined = guidance(*halves, torch.full(shape[:1], 2.0, device=device))
        assert combined.shape == shape
        assert [part.shape for part in torch.autograd.grad(combined.sum(), halves)] == [shape] * 2
