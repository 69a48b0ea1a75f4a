"""SwiGLU: results and gradients against the reference, odd sizes, views cut out of a wider layer."""

import pytest
import torch
from block_cases import LOW, check_against_plain, normal, with_gradients
from pcpo_kernels import swiglu


def call(x):
    return (swiglu(x),)


@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
def test_against_the_reference(device, dtype) -> None:
    check_against_plain(call, [(3 * normal(2, 3, 2 * 300)).to(dtype)], device)


@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 5, 66), (1, 1, 2 * 2500), (0, 4, 8), (2, 0, 8), (2, 3, 0)])
def test_sizes(device, shape) -> None:
    check_against_plain(call, [normal(*shape).float()], device)


def test_far_from_zero(device) -> None:
    """Neither value nor gradient overflows where the exponential does."""
    values = torch.tensor([-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4, -0.0])
    check_against_plain(call, [torch.cat((values, normal(8).float())).expand(1, 1, 16)], device)


def test_views(device) -> None:
    """Channels cut out of a wider layer, tokens out of a longer sequence, and gradients of any strides."""
    x = normal(2, 3, 16).float().to(device)
    expected = with_gradients(call, [x])
    wide = torch.cat((torch.full_like(x, torch.nan), x, torch.full_like(x, torch.nan)), dim=2)[:, :, 16:32]
    long = torch.cat((torch.full_like(x, torch.nan), x), dim=1)[:, 3:]
    turned = x.transpose(0, 2).contiguous().transpose(0, 2)
    for view in (wide, long, turned):
        got = with_gradients(call, [view])
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    leaf = x.clone().requires_grad_()
    tokens_first = swiglu(leaf).transpose(0, 1)
    incoming = normal(2, 3, 8, seed=90).float().to(device).transpose(0, 1).contiguous()
    assert torch.equal(torch.autograd.grad(tokens_first, leaf, incoming)[0], expected[1])
    torch.autograd.grad(swiglu(leaf).sum(), leaf)


def test_opcheck(device) -> None:
    import pcpo_kernels.ops.swiglu.triton  # noqa: F401

    torch.library.opcheck(torch.ops.pcpo_kernels.swiglu.default, (normal(1, 2, 8).float().to(device).requires_grad_(),))


def test_compiles_in_one_graph(device, compiled) -> None:
    x = normal(2, 3, 16).float().to(device)
    for one, other in zip(with_gradients(compiled(call), [x]), with_gradients(call, [x]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [9216, 18432])
def test_sizes_of_real_models(channels) -> None:
    check_against_plain(call, [normal(1, 1100, 2 * channels).to(torch.bfloat16)], torch.device("cuda"))
