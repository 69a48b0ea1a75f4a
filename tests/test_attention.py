"""Attention backends: switched for a block on every family's network, and refused in one sentence."""

from typing import Any

import pytest
import torch
from guided_policies import CPU
from tiny_pipeline import PROMPTS, tiny_config
from tiny_pipelines import SD3_RUN, SD_RUN
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pcpo_fast.errors import UserError
from pcpo_fast.policies.attention import attention_backend, attention_layers, choose_attention, set_backend
from pcpo_fast.policies.loading import load_policy

FAMILIES = {"flux": ("pipeline_folder", ()), "sd3": ("sd3_folder", SD3_RUN), "sd": ("sd_folder", SD_RUN)}
FUSED = "_scaled_dot_product_flash_attention_for_cpu"
LORA = ("model.finetune=lora", "model.lora.rank=2")


class Kernels(TorchDispatchMode):
    """The attention kernels that run within the block: the fused one has an operation of its own."""

    def __enter__(self) -> "Kernels":
        self.fused = 0
        return super().__enter__()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.fused += FUSED in function.name()
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module", params=FAMILIES)
def policy(request: pytest.FixtureRequest) -> Any:
    folder, run = FAMILIES[request.param]
    return load_policy(tiny_config(request.getfixturevalue(folder), *run, *LORA), CPU)


def predict(policy: Any) -> tuple[Tensor, int]:
    """An output of the network, and how often the fused kernel ran for it."""
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    conditioning = policy.encode(PROMPTS[:2])
    with torch.no_grad(), Kernels() as kernels:
        output = policy.predict(latents, torch.tensor([0.9, 0.2]), conditioning)
    return output, kernels.fused


def test_another_backend_for_a_block(policy: Any) -> None:
    layers = attention_layers(policy.network)
    processors = [layer.processor for layer in layers]
    plain, fused = predict(policy)
    assert fused == len(layers) > 0
    with attention_backend(policy.network, "_native_math"):
        changed, fused = predict(policy)
    assert fused == 0
    torch.testing.assert_close(changed, plain, rtol=1e-5, atol=1e-5)
    again, fused = predict(policy)
    assert torch.equal(again, plain) and fused == len(layers)
    assert [layer.processor for layer in layers] == processors


def test_blocks_within_a_chosen_backend(policy: Any) -> None:
    """Back to what was chosen, not to native; and native within another is native."""
    choose_attention(policy.network, "_native_math")
    try:
        assert predict(policy)[1] == 0
        with attention_backend(policy.network, "native"):
            assert predict(policy)[1] > 0
            with attention_backend(policy.network, "_native_math"):
                assert predict(policy)[1] == 0
            assert predict(policy)[1] > 0
        assert predict(policy)[1] == 0
        with attention_backend(policy.network, None):
            assert predict(policy)[1] == 0
    finally:
        set_backend(policy.network, "native")
    assert predict(policy)[1] > 0


def test_a_block_that_fails_leaves_the_model_as_it_was(policy: Any) -> None:
    with pytest.raises(RuntimeError, match="inside"), attention_backend(policy.network, "_native_math"):
        raise RuntimeError("inside")
    assert predict(policy)[1] > 0
    with pytest.raises(UserError, match="unknown backend 'quick'"), attention_backend(policy.network, "quick"):
        pass
    assert predict(policy)[1] > 0


def test_gradients_through_another_backend(policy: Any) -> None:
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    conditioning = policy.encode(PROMPTS[:2])
    trained = [parameter for parameter in policy.module.parameters() if parameter.requires_grad]
    gradients = []
    for name in ("native", "_native_math"):
        with attention_backend(policy.network, name):
            output = policy.predict(latents, torch.tensor([0.9, 0.2]), conditioning)
            gradients.append(torch.autograd.grad(output.square().sum(), trained))
    assert any(gradient.abs().max() > 0 for gradient in gradients[0])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4 * one.abs().max().item() + 1e-7)
