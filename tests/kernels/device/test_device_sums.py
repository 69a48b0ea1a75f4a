"""Sums within a program: several in one reduction, and of products by fused multiply-adds."""

import pytest
import torch
import triton
import triton.language as tl
from pcpo_kernels import sums
from pcpo_kernels.dispatch import interpreting
from pcpo_kernels.sums import add_products, sums_of_three, sums_of_two


@triton.jit
def sums_kernel(result, x, LANES: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    a, b, c = tl.load(x + index), tl.load(x + BLOCK + index), tl.load(x + 2 * BLOCK + index)
    two = sums_of_two(a, b)
    three = sums_of_three(a, b, c)
    products = add_products(tl.zeros((BLOCK // LANES,), tl.float32), a, b, LANES)
    pair = add_products(tl.zeros((2,), tl.float32), a, b, LANES)
    for i in tl.static_range(2):
        tl.store(result + i, two[i])
    for i in tl.static_range(3):
        tl.store(result + 2 + i, three[i])
    tl.store(result + 5 + tl.arange(0, 2), pair)
    tl.store(result + 7 + tl.arange(0, BLOCK // LANES), products)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("lanes", [1, 4, 8])
def test_sums(device, monkeypatch, lanes, together) -> None:
    """In whole numbers, exact in any order; the interpreter takes the compiled kernels' one reduction as well."""
    if interpreting():
        monkeypatch.setattr(sums, "COMPILED", tl.constexpr(together))
    x = torch.randint(-9, 10, (3, 16), dtype=torch.float32)
    result = torch.empty(7 + 16 // lanes, device=device)
    sums_kernel[(1,)](result, x.to(device), lanes, 16)
    products = (x[0] * x[1]).reshape(-1, lanes).sum(1)
    pair = products.reshape(-1, 2).sum(0)
    assert result.tolist() == [*x[:2].sum(1).tolist(), *x.sum(1).tolist(), *pair.tolist(), *products.tolist()]
