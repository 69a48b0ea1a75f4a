"""sample_step, guidance and the noise in Triton against the reference, torch.distributions and published vectors."""

import pytest
import torch
import triton
import triton.language as tl
from cases import make_case
from pcpo_kernels import NoiseKey, guidance, philox_normal, sample_step
from pcpo_kernels.dispatch import interpreting
from pcpo_kernels.launch import Plan
from pcpo_kernels.ops.guidance import triton as triton_guidance
from pcpo_kernels.ops.noise import triton as triton_random
from pcpo_kernels.ops.noise.triton import philox_words
from pcpo_kernels.ops.sample_step import triton as triton_step
from torch.distributions import Normal

LOW = [torch.float16, torch.bfloat16]


def reference(function, *arguments, **keywords):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PCPO_KERNELS", "reference")
        return function(*arguments, **keywords)


@triton.jit
def words_kernel(result, seed, counter, c2, c3, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    at = tl.load(counter + index)
    if c2 is None:
        w0, w1, w2, w3 = philox_words(tl.load(seed), at)
    else:
        low, high = (at & 0xFFFFFFFF).to(tl.uint32), ((at >> 32) & 0xFFFFFFFF).to(tl.uint32)
        third, fourth = tl.load(c2 + index).to(tl.uint32), tl.load(c3 + index).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(tl.load(seed), low, high, third, fourth, 10)
    tl.store(result + 4 * index, w0.to(tl.int64))
    tl.store(result + 4 * index + 1, w1.to(tl.int64))
    tl.store(result + 4 * index + 2, w2.to(tl.int64))
    tl.store(result + 4 * index + 3, w3.to(tl.int64))


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN, ids=["zeros", "ones", "pi"])
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
    from pcpo_kernels.ops.noise.reference import philox_uint32

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
    exact = reference(philox_normal, seed, offsets, count)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.cpu(), exact, rtol=0, atol=1e-6)


def test_normals_in_bulk(device, monkeypatch) -> None:
    """Half a million normals: none further than 1e-6 from the reference, none out of bounds."""
    if interpreting():  # which takes as long for a block of any size
        monkeypatch.setattr(triton_random, "plan_for", lambda _: Plan(1 << 15, 1))
    seed = torch.arange(8)
    got = philox_normal(seed.to(device), torch.zeros_like(seed).to(device), 1 << 16).cpu()
    exact = reference(philox_normal, seed, torch.zeros_like(seed), 1 << 16)
    assert (got - exact).abs().max().item() <= 1e-6
    assert 4.5 < got.abs().max().item() < 5.9


def test_normals_do_not_depend_on_batch_or_split(device) -> None:
    seed, offset = torch.tensor([5, 6], device=device), torch.tensor([12, 13], device=device)
    whole = philox_normal(seed, offset, 3000)
    assert torch.equal(whole[1:], philox_normal(seed[1:], offset[1:], 3000))
    halves = [philox_normal(seed, offset + start, 1500) for start in (0, 1500)]
    assert torch.equal(whole, torch.cat(halves, dim=1))


@pytest.mark.parametrize("noise", ["tensor", "key"])
@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sample_step(device, noise, dtype, reduction) -> None:
    case = make_case(4, (41, 7)).cast(torch.float32).cast(dtype, "output")
    x, _, a, b, std = case.ends
    given = case.to(device).z if noise == "tensor" else case.to(device).key
    arguments = [value.to(device) for value in (x, case.output, a, b, std)]
    step = sample_step(*arguments, given, reduction=reduction)
    a, b, std = (value.double()[:, None, None] for value in (a, b, std))
    mean = a * x.double() + b * case.output.double()
    following = mean + std * case.z.double()
    log_prob = Normal(mean, std).log_prob(following).flatten(1)
    log_prob = log_prob.mean(1) if reduction == "mean" else log_prob.sum(1)
    assert step.next_latents.dtype == torch.float32
    torch.testing.assert_close(step.next_latents.double().cpu(), following, rtol=4e-7, atol=1e-6)
    torch.testing.assert_close(
        step.log_prob.double().cpu(), log_prob, rtol=2e-6, atol=1e-6 if reduction == "mean" else 1e-4
    )
    low = sample_step(
        *(v.to(device) for v in (x.to(dtype), case.output, case.ends.a, case.ends.b, case.ends.std, case.z))
    )
    assert low.next_latents.dtype == dtype
    torch.testing.assert_close(
        low.next_latents.double().cpu(), following, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize(("rows", "elements"), [(1, 1), (3, 2050), (1, 300_000), (9, 3)])
def test_sample_step_sizes(device, rows, elements) -> None:
    case = make_case(rows, (elements,)).cast(torch.float32)
    x, _, a, b, std = case.ends
    arguments = [x, case.output, a, b, std]
    # Where in the noise a piece begins shows after two pieces; the sum of 147 does not ask where its noise comes from.
    for noise in (case.z,) if elements == 300_000 else (case.z, case.key):
        there = noise.to(device) if isinstance(noise, torch.Tensor) else NoiseKey(*(p.to(device) for p in noise))
        got = sample_step(*(v.to(device) for v in arguments), there)
        exact = reference(sample_step, *(v.double() for v in arguments), noise)
        torch.testing.assert_close(got.next_latents.double().cpu(), exact.next_latents, rtol=4e-7, atol=1e-6)
        torch.testing.assert_close(got.log_prob.double().cpu(), exact.log_prob, rtol=2e-6, atol=1e-6)


def test_one_step_for_all_rows_and_slices_of_trajectories(device) -> None:
    """Columns expanded from one step, latents sliced out of a trajectory: as the rollout hands them over."""
    case = make_case(3, (30,)).cast(torch.float32).to(device)
    x, f = case.ends.latents, case.output
    column = torch.tensor([0.9, -0.1, 0.2], device=device)
    expanded = [value.expand(3) for value in column]
    full = [value.expand(3).contiguous() for value in column]
    wide = torch.full((3, 2, 30), torch.nan, device=device)
    wide[:, 1] = x
    got = sample_step(wide[:, 1], f, *expanded, case.key)
    expected = sample_step(x, f, *full, case.key)
    assert torch.equal(got.next_latents, expected.next_latents)
    assert torch.equal(got.log_prob, expected.log_prob)


def test_step_without_noise_or_density(device) -> None:
    case = make_case(3, (30,)).cast(torch.float32).to(device)
    x, _, a, b, std = case.ends
    step = sample_step(x, case.output, a, b, std, None)
    torch.testing.assert_close(step.next_latents, a[:, None] * x + b[:, None] * case.output, rtol=3e-7, atol=1e-6)
    assert step.log_prob.tolist() == [0.0] * 3
    std = torch.tensor([0.1, 0.0, 0.2], device=device)
    step = sample_step(x, case.output, a, b, std, case.key)
    assert step.log_prob[1].item() == 0.0
    assert step.log_prob[0].item() != 0.0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empty_batches_and_rows(device, reduction) -> None:
    for rows, shape in ((0, (5,)), (3, (0,)), (2, (3, 0))):
        case = make_case(rows, shape).cast(torch.float32).to(device)
        x, _, a, b, std = case.ends
        for noise in (case.z, case.key, None):
            step = sample_step(x, case.output, a, b, std, noise, reduction=reduction)
            exact = reference(sample_step, x, case.output, a, b, std, noise, reduction=reduction)
            assert step.next_latents.shape == (rows, *shape)
            torch.testing.assert_close(step.log_prob, exact.log_prob)
        halves = [case.output.clone().requires_grad_(), case.z.clone().requires_grad_()]
        combined = guidance(*halves, torch.full((rows,), 2.0, device=device))
        assert combined.shape == (rows, *shape)
        assert [part.shape for part in torch.autograd.grad(combined.sum(), halves)] == [(rows, *shape)] * 2
        assert philox_normal(*case.key, x[0].numel() if rows else 5).shape == (rows, x[0].numel() if rows else 5)


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


def test_guidance_strides_and_single_gradients(device) -> None:
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


def test_nothing_depends_on_how_rows_are_cut(device, monkeypatch) -> None:
    case = make_case(2, (1000,)).cast(torch.float32).to(device)
    x, _, a, b, std = case.ends
    noise = philox_normal(*case.key, 1000)
    step = sample_step(x, case.output, a, b, std, case.key)
    combined = guidance(x, case.output, 2.5)
    for plan in (Plan(128, 3), Plan(256, 2), Plan(1024, 1)):
        for module in (triton_random, triton_step, triton_guidance):
            monkeypatch.setattr(module, "plan_for", lambda _, plan=plan: plan)
        assert torch.equal(philox_normal(*case.key, 1000), noise)
        again = sample_step(x, case.output, a, b, std, case.key)
        assert torch.equal(again.next_latents, step.next_latents)
        torch.testing.assert_close(again.log_prob, step.log_prob, rtol=1e-6, atol=1e-6)
        assert torch.equal(guidance(x, case.output, 2.5), combined)
        halves = [x.clone().requires_grad_(), case.output.clone().requires_grad_()]
        gradients = torch.autograd.grad(guidance(*halves, 2.5).sum(), halves)
        assert [gradient.unique().tolist() for gradient in gradients] == [[-1.5], [2.5]]
