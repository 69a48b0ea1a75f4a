"""The blocks' linear layers in 8 bits: numbers, what is replaced, and that it is put back."""

import pytest
import torch
from tested_families import FIXTURES, LORA, Family
from tiny_pipeline import PROMPTS
from torch import nn

from pcpo_fast.config.schema import RolloutConfig
from pcpo_fast.errors import UserError
from pcpo_fast.policies.low_precision import FP8, LowPrecisionLinear, check_fp8, low_precision, low_precision_layers

STEP = 2.0**-4
"""Relative rounding error of a number with three bits after the first."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "bias"), [((3, 5), True), ((1,), False), ((0,), True)])
def test_products_are_those_of_rounded_numbers(dtype: torch.dtype, rows: tuple[int, ...], bias: bool) -> None:
    layer = nn.Linear(48, 32, bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight *= torch.logspace(-3, 3, 32)[:, None]  # rows of very different sizes
        layer.weight[7] = 0
    inputs = torch.randn(*rows, 96, dtype=dtype)[..., ::2]
    with torch.no_grad():
        found = LowPrecisionLinear(layer)(inputs)
    assert found.dtype == dtype and found.shape == (*rows, 32)

    def rounded(values: torch.Tensor) -> torch.Tensor:
        scale = (values.float().abs().amax(dim=-1, keepdim=True) / 448).clamp(min=1e-30)
        return (values.float() / scale).to(FP8).double() * scale.double()

    layer.requires_grad_(False)
    expected = rounded(inputs) @ rounded(layer.weight).T
    # bf16 products, rounded once; another rounding for the bias.
    bound = torch.finfo(torch.bfloat16).eps * expected.abs().amax() if expected.numel() else 0.0
    if bias:
        expected = expected + layer.bias.double()
    torch.testing.assert_close(found.double(), expected, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=float(bound))
    exact = inputs.double() @ layer.weight.double().T
    if bias:
        exact = exact + layer.bias.double()
    lengths = inputs.double().norm(dim=-1, keepdim=True) * layer.weight.double().norm(dim=1)
    assert bool(((found.double() - exact).abs() <= 2.5 * STEP * lengths + float(bound)).all())


@pytest.mark.parametrize("name", ["flux", "klein", "sd3"])
def test_a_familys_blocks_change_and_are_put_back(name: str, request: pytest.FixtureRequest) -> None:
    family = Family(name, request.getfixturevalue(FIXTURES[name]))
    policy = family.policy(*LORA)
    network = policy.module
    layers = low_precision_layers(network, policy.compiled_blocks(network))
    assert layers and not any("lora_" in layer for layer in layers)
    own = {id(module) for module in network.modules()}
    latents, times = torch.randn(3, *policy.latent_shape), torch.rand(3)
    given = policy.encode(PROMPTS[:3])
    with torch.no_grad():
        exact = policy.predict(latents, times, given)
        with policy.cheaper(RolloutConfig()):
            assert sum(type(module) is LowPrecisionLinear for module in network.modules()) == len(layers)
            cheap = policy.predict(latents, times, given)
        with policy.cheaper(RolloutConfig(candidate_weights="full", candidates=48)):
            assert torch.equal(policy.predict(latents, times, given), exact)
        assert {id(module) for module in network.modules()} == own
        assert torch.equal(policy.predict(latents, times, given), exact)
    error = float((cheap - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    assert 0 < error < 0.1


def test_what_cannot_be_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = pytest.raises(UserError, match=r"rollout\.candidate_weights: Linear has no block .* set rollout")
    with refused, low_precision(nn.Linear(16, 16), []):
        pass
    odd = nn.Sequential(nn.Linear(16, 24), nn.Linear(16, 32))
    assert low_precision_layers(odd, [odd]) == ["1"]
    check_fp8(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(UserError, match=r"fp8 needs a GPU of compute capability 8\.9 .* \(A100\) has 8\.0; set"):
        check_fp8(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    check_fp8(torch.device("cuda"))
