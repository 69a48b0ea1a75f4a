"""Modulated norms and gated residuals: results and gradients against the reference, strides, sums over tokens."""

import pytest
import torch
from block_cases import LOW, check_against_plain, normal, with_gradients
from pcpo_kernels import gated_residual, gated_residual_norm, modulated_norm
from pcpo_kernels.ops.adaptive_norm import triton as triton_adaptive_norm

KINDS = ("norm", "residual", "residual-norm")


def inputs(kind, images=2, tokens=5, channels=24, dtype=torch.float32):
    """Tokens, and the modulation as one tensor: the functions take its chunks, as they come from a linear layer."""
    bulk = [normal(images, tokens, channels, seed=i) for i in range(1 if kind == "norm" else 2)]
    rows = {"norm": 2, "residual": 1, "residual-norm": 3}[kind]
    return [value.to(dtype) for value in (*bulk, normal(images, rows * channels, seed=7))]


def call(kind):
    def function(*given):
        *bulk, modulation = given
        rows = modulation.chunk(modulation.shape[1] // bulk[0].shape[2], dim=1)
        if kind == "norm":
            return (modulated_norm(*bulk, *rows),)
        if kind == "residual":
            return (gated_residual(*bulk, *rows),)
        return gated_residual_norm(*bulk, *rows)

    return function


@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_reference(device, kind, dtype) -> None:
    check_against_plain(call(kind), inputs(kind, dtype=dtype), device)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 21, 33), (2, 5, 90), (1, 2, 3072), (0, 4, 8), (2, 0, 8)])
def test_sizes(device, shape) -> None:
    check_against_plain(call("residual-norm"), inputs("residual-norm", *shape), device)


def test_mixed_dtypes(device) -> None:
    """A bf16 branch and fp32 modulation onto an fp32 residual; gradients in the dtype of each."""
    given = inputs("residual-norm")
    given[1] = given[1].to(torch.float16)
    got = check_against_plain(call("residual-norm"), given, device)
    assert [value.dtype for value in got] == [torch.float32] * 3 + [torch.float16, torch.float32]
    gate, shift, scale = normal(3, 2, 24, seed=3).to(torch.float32).unbind(0)
    separate = [*given[:2], gate, shift.to(torch.bfloat16), scale.to(torch.float16)]
    check_against_plain(gated_residual_norm, separate, device)


@pytest.mark.parametrize("kind", KINDS)
def test_unneeded_gradients_are_not_computed(device, kind, monkeypatch) -> None:
    """Frozen modulation, as under LoRA, sums nothing; the others have the same bits with and without it."""
    given = [value.to(device) for value in inputs(kind)]
    results = 2 if kind == "residual-norm" else 1
    full = with_gradients(call(kind), given)
    monkeypatch.setattr(triton_adaptive_norm, "token_sums", None)
    for wanted in ([i] for i in range(len(given) - 1)):
        got = with_gradients(call(kind), given, wanted)
        assert torch.equal(got[-1], full[results + wanted[0]])
    with pytest.raises(TypeError):
        with_gradients(call(kind), given, [len(given) - 1])
    monkeypatch.undo()
    monkeypatch.setenv("PCPO_KERNELS", "triton")
    assert torch.equal(with_gradients(call(kind), given, [len(given) - 1])[-1], full[-1])


def test_one_of_two_results(device) -> None:
    """Only the sum, or only the norm, goes into the loss."""
    given = [value.to(device) for value in inputs("residual-norm")]
    for which in (0, 1):
        got = with_gradients(lambda *v, which=which: (call("residual-norm")(*v)[which],), given)
        exact = with_gradients(
            lambda *v, which=which: (call("residual-norm")(*v)[which],), [value.double() for value in given]
        )
        for ours, truth in zip(got, exact, strict=True):
            torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)


def test_strides(device) -> None:
    """Slices of a longer sequence are read in place, others are copied; a gradient may have stride 0."""
    given = [value.to(device) for value in inputs("residual-norm")]
    expected = with_gradients(call("residual-norm"), given)
    longer = [torch.cat((torch.full_like(v, torch.nan), v), dim=1)[:, v.shape[1] :] for v in given[:2]]
    turned = [v.transpose(0, 2).contiguous().transpose(0, 2) for v in given[:2]]
    for bulk in (longer, turned):
        got = with_gradients(call("residual-norm"), [*bulk, given[2]])
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    leaves = [value.clone().requires_grad_() for value in given]
    hidden, normed = call("residual-norm")(*leaves)
    flat = torch.autograd.grad(hidden.sum() + normed.sum(), leaves)
    hidden, normed = call("residual-norm")(*leaves)
    full = torch.autograd.grad((hidden, normed), leaves, [torch.ones_like(hidden), torch.ones_like(normed)])
    assert all(torch.equal(one, other) for one, other in zip(flat, full, strict=True))


def test_same_bits_in_any_batch(device) -> None:
    """Also of the sums over tokens, which several programs share: 21 tokens are six of them."""
    given = [value.to(device) for value in inputs("residual-norm", 3, 21, 16)]
    batch = with_gradients(call("residual-norm"), given)
    for image in range(3):
        part = [value[image : image + 1] for value in given]
        leaves = [value.detach().requires_grad_() for value in part]
        results = call("residual-norm")(*leaves)
        incoming = [normal(3, 21, 16, seed=90 + i)[image : image + 1].float().to(device) for i in range(2)]
        alone = [*results, *torch.autograd.grad(results, leaves, incoming)]
        assert all(torch.equal(one[0], other[image]) for one, other in zip(alone, batch, strict=True))


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind == "residual" else kind for kind in KINDS]
)
def test_opcheck(device, kind) -> None:
    *bulk, modulation = (value.to(device).requires_grad_() for value in inputs(kind, 2, 3, 8))
    rows = iter(modulation.detach().chunk(modulation.shape[1] // 8, dim=1))
    rows = [next(rows).clone().requires_grad_() for _ in range(modulation.shape[1] // 8)]
    arguments = {
        "norm": lambda: (*bulk, None, None, *rows),
        "residual": lambda: (*bulk, *rows, None, None),
        "residual-norm": lambda: (*bulk, *rows),
    }[kind]()
    torch.library.opcheck(torch.ops.pcpo_kernels.adaptive_norm.default, (*arguments, 1e-6))


def test_compiles_in_one_graph(device, compiled) -> None:
    given, eager = [value.to(device) for value in inputs("residual-norm", 2, 3, 8)], call("residual-norm")
    for one, other in zip(with_gradients(compiled(eager), given), with_gradients(eager, given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 4608, 3072), (8, 512, 1536)])
def test_sizes_of_real_models(shape) -> None:
    for kind in KINDS:
        check_against_plain(call(kind), inputs(kind, *shape, dtype=torch.bfloat16), torch.device("cuda"))
