"""The noise in Triton against published vectors and the reference."""

import pytest
import torch
import triton
import triton.language as tl
from cases import PHILOX_VECTORS, signed
from judging import by_reference
from pcpo_kernels import philox_normal
from pcpo_kernels.dispatch import interpreting
from pcpo_kernels.launch import Plan
from pcpo_kernels.ops.noise import triton as kernels
from pcpo_kernels.ops.noise.reference import philox_uint32
from pcpo_kernels.ops.noise.triton import philox_rounds, philox_words


@triton.jit
def words_kernel(result, seed, counter, c2, c3, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    at = tl.load(counter + index)
    if c2 is None:
        w0, w1, w2, w3 = philox_words(tl.load(seed), at)
    else:
        low, high = (at & 0xFFFFFFFF).to(tl.uint32), ((at >> 32) & 0xFFFFFFFF).to(tl.uint32)
        third, fourth = tl.load(c2 + index).to(tl.uint32), tl.load(c3 + index).to(tl.uint32)
        k0, k1 = tl.load(seed).to(tl.uint32), (tl.load(seed) >> 32).to(tl.uint32)
        w0, w1, w2, w3 = philox_rounds(low, high, third, fourth, k0, k1)
    tl.store(result + 4 * index, w0.to(tl.int64))
    tl.store(result + 4 * index + 1, w1.to(tl.int64))
    tl.store(result + 4 * index + 2, w2.to(tl.int64))
    tl.store(result + 4 * index + 3, w3.to(tl.int64))


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX_VECTORS, ids=["zeros", "ones", "pi"])
def test_published_philox_vectors(device, counter, key, expected) -> None:
    c = [int(word, 16) for word in counter.split()]
    k = [int(word, 16) for word in key.split()]

    def integers(value: int) -> torch.Tensor:
        return torch.full((2,), signed(value), device=device)

    result = torch.zeros(2, 4, dtype=torch.int64, device=device)
    words_kernel[(1,)](
        result, integers(k[1] << 32 | k[0]), integers(c[1] << 32 | c[0]), integers(c[2]), integers(c[3]), BLOCK=2
    )
    assert [[f"{word & 0xFFFFFFFF:08x}" for word in row] for row in result.tolist()] == [expected.split()] * 2


def test_integer_stream_is_the_reference_s(device) -> None:
    counters = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 12345, 7, 8])
    for seed in (0, 1, -1, 2**62 + 12345, -(2**63)):
        result = torch.zeros(8, 4, dtype=torch.int64, device=device)
        words_kernel[(1,)](result, torch.tensor([seed], device=device), counters.to(device), None, None, BLOCK=8)
        assert torch.equal(result.cpu() & 0xFFFFFFFF, philox_uint32(torch.tensor(seed), counters))


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 2**32 - 8, 2**36 + 5])
@pytest.mark.parametrize("count", [1, 5, 2049])
def test_normals(device, offset, count) -> None:
    seed, offsets = torch.tensor([0, -3, 2**62 + 1]), torch.tensor([0, 4, 1]) + offset
    got = philox_normal(seed.to(device), offsets.to(device), count)
    exact = by_reference(philox_normal, seed, offsets, count)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.cpu(), exact, rtol=0, atol=1e-6)


def test_normals_in_bulk(device, monkeypatch) -> None:
    """Half a million normals: none further than 1e-6 from the reference, none out of bounds."""
    if interpreting():  # which takes as long for a block of any size
        monkeypatch.setattr(kernels, "plan_for", lambda _: Plan(1 << 15, 1))
    seed = torch.arange(8)
    got = philox_normal(seed.to(device), torch.zeros_like(seed).to(device), 1 << 16).cpu()
    exact = by_reference(philox_normal, seed, torch.zeros_like(seed), 1 << 16)
    assert (got - exact).abs().max().item() <= 1e-6
    assert 4.5 < got.abs().max().item() < 5.9


def test_normals_do_not_depend_on_batch_or_split(device) -> None:
    seed, offset = torch.tensor([5, 6], device=device), torch.tensor([12, 13], device=device)
    whole = philox_normal(seed, offset, 3000)
    assert torch.equal(whole[1:], philox_normal(seed[1:], offset[1:], 3000))
    halves = [philox_normal(seed, offset + start, 1500) for start in (0, 1500)]
    assert torch.equal(whole, torch.cat(halves, dim=1))


@pytest.mark.parametrize("plan", [Plan(128, 3), Plan(256, 2), Plan(1024, 1)])
def test_nothing_depends_on_how_rows_are_cut(device, monkeypatch, plan) -> None:
    seed, offset = torch.tensor([5, 6], device=device), torch.tensor([0, 1000], device=device)
    expected = philox_normal(seed, offset, 1000)
    monkeypatch.setattr(kernels, "plan_for", lambda _: plan)
    assert torch.equal(philox_normal(seed, offset, 1000), expected)


def test_empty(device) -> None:
    for rows, count in ((0, 5), (3, 0)):
        key = torch.zeros(rows, dtype=torch.int64, device=device)
        assert philox_normal(key, key, count).shape == (rows, count)
