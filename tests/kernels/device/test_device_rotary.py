"""Norm and rotary embedding of heads: results and gradients against the reference, joined sequences, views."""

import pytest
import torch
from block_cases import LOW, check_against_plain, normal, with_gradients
from pcpo_kernels import norm_rope
from pcpo_kernels.ops.rotary import triton as triton_rotary


def tables(tokens, size, device="cpu"):
    angles = normal(tokens, size // 2, seed=8).repeat_interleave(2, dim=1)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def inputs(images=2, tokens=3, heads=3, size=8, second=2, dtype=torch.float32):
    bulk = [normal(images, count, heads, size, seed=i) for i, count in enumerate((tokens, second))]
    return [value.to(dtype) for value in (*bulk, normal(size, seed=5), normal(size, seed=6))]


def joined(rope=None):
    def function(x, second, weight, second_weight):
        cos, sin = (None, None) if rope is None else (table.to(x.device) for table in rope)
        return (norm_rope(x, weight, cos, sin, 1e-5, second=second, second_weight=second_weight),)

    return function


@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
@pytest.mark.parametrize("rope", [False, True])
def test_against_the_reference(device, dtype, rope) -> None:
    given = inputs(dtype=dtype)
    check_against_plain(joined(tables(5, 8) if rope else None), given, device)


def test_one_sequence_without_weight(device) -> None:
    rope = tables(3, 8)

    def function(x):
        return (norm_rope(x, None, *(table.to(x.device) for table in rope), 1e-5),)

    check_against_plain(function, inputs()[:1], device)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 2, 1), (2, 9, 5, 6, 4), (1, 1, 24, 128, 1), (0, 2, 2, 4, 1), (1, 3, 2, 4, 0)]
)
def test_sizes(device, shape) -> None:
    check_against_plain(joined(tables(shape[1] + shape[4], shape[3])), inputs(*shape), device)


def test_views(device) -> None:
    """Heads cut out of a fused projection are read in place; transposed ones, and gradients of any strides, too."""
    given = [value.to(device) for value in inputs()]
    rope = tables(5, 8)
    expected = with_gradients(joined(rope), given)
    fused = [torch.cat((torch.full_like(v, torch.nan), v), dim=2)[:, :, v.shape[2] :] for v in given[:2]]
    transposed = [v.transpose(1, 2).contiguous().transpose(1, 2) for v in given[:2]]
    turned = [v.transpose(0, 3).contiguous().transpose(0, 3) for v in given[:2]]
    for bulk in (fused, transposed, turned):
        got = with_gradients(joined(rope), [*bulk, *given[2:]])
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    leaves = [value.clone().requires_grad_() for value in given]
    heads_first = joined(rope)(*leaves)[0].transpose(1, 2)
    incoming = normal(2, 5, 3, 8, seed=90).float().to(device).transpose(1, 2).contiguous()
    for got, want in zip(torch.autograd.grad(heads_first, leaves, incoming), expected[1:], strict=True):
        assert torch.equal(got, want)
    torch.autograd.grad(joined(rope)(*leaves)[0].sum(), leaves)


def test_unneeded_gradients_are_not_computed(device, monkeypatch) -> None:
    given = [value.to(device) for value in inputs()]
    full = with_gradients(joined(tables(5, 8)), given)
    monkeypatch.setattr(triton_rotary, "token_sums", None)
    for wanted in ([0], [1], [0, 1]):
        got = with_gradients(joined(tables(5, 8)), given, wanted)
        assert all(torch.equal(one, full[1 + i]) for one, i in zip(got[1:], wanted, strict=True))
    with pytest.raises(TypeError):
        with_gradients(joined(tables(5, 8)), given, [2])
    monkeypatch.undo()
    monkeypatch.setenv("PCPO_KERNELS", "triton")
    for i in (2, 3):
        assert torch.equal(with_gradients(joined(tables(5, 8)), given, [i])[-1], full[1 + i])


def test_opcheck(device) -> None:
    x, second, weight, second_weight = (value.to(device).requires_grad_() for value in inputs(1, 2, 2, 4, 1))
    rope = tables(3, 4, device)
    torch.library.opcheck(torch.ops.pcpo_kernels.norm_rope.default, (x, weight, *rope, second, second_weight, 1e-6))
    torch.library.opcheck(torch.ops.pcpo_kernels.norm_rope.default, (x, None, None, None, None, None, 1e-6))


def test_compiles_in_one_graph(device, compiled) -> None:
    given, eager = [value.to(device) for value in inputs()], joined(tables(5, 8))
    for one, other in zip(with_gradients(compiled(eager), given), with_gradients(eager, given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
def test_sizes_of_real_models() -> None:
    given = inputs(2, 512, 24, 128, 4096, dtype=torch.bfloat16)
    check_against_plain(joined(tables(4608, 128)), given, torch.device("cuda"))
