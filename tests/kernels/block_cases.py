"""Random inputs for the transformer-block ops, and what judges their results."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

LOW = (torch.float16, torch.bfloat16)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_gradients(
    function: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], wanted: list[int] | None = None
) -> list[Tensor]:
    """Results of a function, and the gradients of the wanted inputs (all by default) for fixed incoming gradients."""
    wanted = list(range(len(inputs))) if wanted is None else wanted
    leaves = [value.detach().requires_grad_(i in wanted) for i, value in enumerate(inputs)]
    results = function(*leaves)
    incoming = [normal(*r.shape, seed=90 + i).to(r.dtype).to(r.device) for i, r in enumerate(results)]
    gradients = torch.autograd.grad(results, [leaves[i] for i in wanted], incoming)
    return [*(result.detach() for result in results), *gradients]


def check_against_plain(
    function: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], device: torch.device
) -> list[Tensor]:
    """Results and gradients on ``device``: their error against the reference in float64 is at most twice that of the
    reference in the inputs' own dtypes, plus a rounding of the largest value."""
    got = with_gradients(function, [value.to(device) for value in inputs])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PCPO_KERNELS", "reference")
        plain = with_gradients(function, inputs)
        exact = with_gradients(function, [value.double() for value in inputs])
    for i, (ours, theirs, truth) in enumerate(zip(got, plain, exact, strict=True)):
        assert ours.dtype == theirs.dtype
        assert ours.shape == truth.shape
        error = (ours.double().cpu() - truth).abs()
        assert not torch.isnan(error).any(), f"result {i} has NaN"
        if error.numel() == 0:
            continue
        # The interpreter cuts bfloat16 off instead of rounding it; float32 sums differ in their order.
        epsilon = max(torch.finfo(ours.dtype).eps, 4 * torch.finfo(torch.float32).eps)
        allowed = 2 * (theirs.double() - truth).abs().max().item() + epsilon * truth.abs().max().item()
        assert error.max().item() <= allowed, f"result {i}: error {error.max().item():.3g}, allowed {allowed:.3g}"
    return got
