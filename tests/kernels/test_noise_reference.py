"""The noise: published Philox vectors, the normals' distribution, and independence from everything but the name."""

import math

import numpy as np
import pytest
import torch
from cases import PHILOX_VECTORS, signed
from pcpo_kernels import philox_normal
from pcpo_kernels.ops.noise.reference import normal_pairs, philox_rounds, philox_uint32
from scipy import stats


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX_VECTORS, ids=["zeros", "ones", "pi"])
def test_known_answers(counter: str, key: str, expected: str) -> None:
    low, high = words(key)
    state = [torch.tensor([word]) for word in words(counter)]
    result = philox_rounds((state[0], state[1], state[2], state[3]), torch.tensor([signed(high << 32 | low)]))
    assert [int(word) for word in result] == words(expected)


def test_block_counter_is_64_bit() -> None:
    """Counters beyond 2^32 reach the second counter word, and key words are the halves of the seed."""
    seed, counter = signed(0x299F31D0A4093822), 5 * 2**32 + 7
    got = philox_uint32(torch.tensor([seed]), torch.tensor([counter]))[0]
    state = tuple(torch.tensor([word]) for word in (7, 5, 0, 0))
    expected = philox_rounds(state, torch.tensor([seed]))  # type: ignore[arg-type]
    assert got.tolist() == [int(word) for word in expected]
    zero = philox_uint32(torch.tensor([0]), torch.tensor([0]))[0]
    assert zero.tolist() == words(PHILOX_VECTORS[0][2])


def test_element_is_a_lane_of_its_block() -> None:
    seed = torch.tensor([1234567890123])
    lanes = normal_pairs(philox_uint32(seed, torch.arange(3))).flatten()
    assert torch.equal(philox_normal(seed, torch.tensor([0]), 12)[0], lanes)


def test_box_muller_by_hand() -> None:
    block = torch.tensor([[0, 0, 0xFFFFFFFF, 0x80000000]])
    smallest = 2.0**-25
    got = normal_pairs(block)[0].double()
    radius = math.sqrt(-2 * math.log(smallest))
    assert radius < 5.9
    angle = 2 * math.pi * smallest
    assert got[0].item() == pytest.approx(radius * math.cos(angle), rel=1e-7)
    assert got[1].item() == pytest.approx(radius * math.sin(angle), rel=1e-7)
    radius = math.sqrt(-2 * math.log1p(-smallest))
    angle = 2 * math.pi * (0.5 + smallest)
    assert got[2].item() == pytest.approx(radius * math.cos(angle), rel=1e-7)
    assert got[3].item() == pytest.approx(radius * math.sin(angle), rel=1e-7)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray | np.float32) -> np.ndarray:
    """``a b + c`` with one rounding to float32: the product is exact in float64."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


@pytest.mark.parametrize("every", [61, pytest.param(1, marks=pytest.mark.slow)])
def test_the_kernels_square_root_is_correctly_rounded(every: int) -> None:
    """For every float32 (of [1, 4), the others are these times powers of 4), from any approximation within 4 ulp."""
    half = np.float32(0.5)
    for piece in np.array_split(np.arange(0, 1 << 24, every, dtype=np.int32), 1 + (1 << 5) // every):
        x = (piece + np.float32(1).view(np.int32)).view(np.float32)
        nearest = (1 / np.sqrt(x.astype(np.float64))).astype(np.float32).view(np.int32)
        for off in range(-4, 5):
            inverse = (nearest + np.int32(off)).view(np.float32)
            root, slope = x * inverse, half * inverse
            error = fused(-slope, root, half)
            root, slope = fused(root, error, root), fused(slope, error, slope)
            assert np.array_equal(fused(fused(-root, root, x), slope, root), np.sqrt(x))


def test_the_kernels_exponent_is_that_of_the_nearest_power_of_two() -> None:
    """``sqrt(2) n``'s, n = 2k + 1, for every k, as a ratio to n in [sqrt(1/2), sqrt(2)); an ulp beyond for one k."""
    n = np.arange(1, 1 << 25, 2, dtype=np.float64)
    product = (128 * n * np.float64(np.float32(1.4142135381698608))).astype(np.float32)  # exact before it is rounded
    exponent = (product.view(np.int32) >> 23) - 127 - 7
    ratio = np.ldexp(n, -exponent)
    assert (ratio >= math.sqrt(0.5)).all()
    assert (ratio < math.sqrt(2)).sum() >= ratio.size - 1
    assert ratio.max() < math.sqrt(2) * (1 + 2.0**-23)


def test_distribution() -> None:
    n = 400_000
    z = philox_normal(torch.tensor([7]), torch.tensor([0]), n)[0].double()
    assert abs(z.mean().item()) < 4 / math.sqrt(n)
    assert abs(z.var().item() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z**4).mean().item() - 3) < 4 * math.sqrt(96 / n)
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    for lag in (1, 2, 3, 4, 8):
        assert abs((z[:-lag] * z[lag:]).mean().item()) < 4 / math.sqrt(n)


def test_streams_of_different_seeds_are_uncorrelated() -> None:
    z = philox_normal(torch.arange(8), torch.zeros(8, dtype=torch.int64), 50_000).double()
    correlation = torch.corrcoef(z) - torch.eye(8, dtype=torch.float64)
    assert correlation.abs().max().item() < 5 / math.sqrt(50_000)


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 1021, 2**31 + 5, 2**36 + 3])
def test_independent_of_batch_and_split(offset: int) -> None:
    seeds = torch.tensor([3, -5, 2**61 + 1])
    whole = philox_normal(seeds, torch.full((3,), offset), 37)
    for row in range(3):
        assert torch.equal(whole[row : row + 1], philox_normal(seeds[row : row + 1], torch.tensor([offset]), 37))
    for cut in (1, 2, 17):
        head = philox_normal(seeds, torch.full((3,), offset), cut)
        tail = philox_normal(seeds, torch.full((3,), offset + cut), 37 - cut)
        assert torch.equal(whole, torch.cat((head, tail), dim=1))


def test_rows_at_different_offsets() -> None:
    seeds, offsets = torch.tensor([9, 9, 9]), torch.tensor([0, 5, 11])
    z = philox_normal(seeds, offsets, 20)
    assert torch.equal(z[0, 5:], z[1, :15])
    assert torch.equal(z[0, 11:], z[2, :9])


def test_empty_and_dtype() -> None:
    seed = torch.zeros(2, dtype=torch.int64)
    assert philox_normal(seed, seed, 0).shape == (2, 0)
    assert philox_normal(seed[:0], seed[:0], 4).shape == (0, 4)
    assert philox_normal(seed, seed, 4).dtype == torch.float32


def test_errors() -> None:
    seed = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match="int64"):
        philox_normal(seed.to(torch.int32), seed, 4)
    with pytest.raises(ValueError, match=r"must both be \[B\]"):
        philox_normal(seed, seed[:1], 4)
    with pytest.raises(ValueError, match="count"):
        philox_normal(seed, seed, -1)
    with pytest.raises(ValueError, match="meta"):
        philox_normal(seed, seed.to("meta"), 4)
