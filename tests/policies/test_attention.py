"""Attention backends: switched for a block on every family's network, and refused in one sentence."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName
from tested_families import CPU
from tiny_pipeline import PROMPTS, tiny_config
from tiny_pipelines import SD3_RUN, SD_RUN
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pcpo_fast.errors import UserError
from pcpo_fast.policies import attention
from pcpo_fast.policies.attention import (
    attention_backend,
    attention_layers,
    check_backend,
    check_names,
    choose_attention,
    set_backend,
)
from pcpo_fast.policies.attention_needs import NEEDS, lacking
from pcpo_fast.policies.families import find_family, load_policy
from pcpo_fast.policies.pipeline_policy import PipelinePolicy

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


# ------------------------------------------------------------------------------------------------ refused


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        check_backend(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_a_cpu_lacks_is_said_in_one_sentence() -> None:
    begin = "model.attention: flash cannot be used here: "
    assert refused("flash", CPU, 128, True) == begin + (
        "it needs a GPU of compute capability 8.0 or newer, and this run is on a CPU"
    )
    assert refused("flash", CPU, 512, True) == begin + "it takes heads of at most 256, and this model's have 512"
    without = "it computes no gradients, so it serves rollouts only (rollout.attention)"
    assert refused("_flash_3", CPU, 128, True).endswith(f"_flash_3 cannot be used here: {without}")
    said = refused("_flash_3", CPU, 128, False, key="rollout.attention")
    assert said == (
        "rollout.attention: _flash_3 cannot be used here: it needs a GPU of compute capability 9.0, and this run is "
        "on a CPU"
    )
    assert refused("_native_npu", CPU, 64, True).endswith("it serves Ascend NPUs, and this run is on a CPU")
    assert "unknown backend 'flash3000'; diffusers offers " in refused("flash3000", CPU, 64, True)
    check_backend("native", CPU, 64, True, torch.float32)
    check_backend("_native_math", CPU, None, False, torch.float32)


@pytest.mark.parametrize(
    ("name", "capability", "dtype", "said"),
    [
        ("flash", (7, 5), torch.bfloat16,
         "it needs a GPU of compute capability 8.0 or newer, and the T has 7.5"),
        ("_flash_3_hub", (8, 0), torch.bfloat16, "it needs a GPU of compute capability 9.0, and the T has 8.0"),
        ("_flash_3_hub", (10, 0), torch.bfloat16, "it needs a GPU of compute capability 9.0, and the T has 10.0"),
        ("flash", (9, 0), torch.float32, "it takes bfloat16 and float16, and the model is in float32"),
        ("flash", (9, 0), torch.bfloat16, None),
        ("_native_cudnn", (9, 0), torch.bfloat16, None),
        ("native", (5, 0), torch.float32, None),
    ],
)  # fmt: skip
def test_what_a_gpu_lacks(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    said: str | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T")
    assert lacking(name, torch.device("cuda", 0), 128, True, dtype) == said


@pytest.mark.parametrize(
    ("name", "package"), [("flash", "flash-attn"), ("flash_4_hub", "pip install kernels"), ("xformers", "xformers")]
)
def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    for flag in ("_CAN_USE_FLASH_ATTN", "_CAN_USE_XFORMERS_ATTN"):
        monkeypatch.setattr(attention_dispatch, flag, False)
    monkeypatch.setattr(attention_dispatch, "is_kernels_available", lambda: False)
    monkeypatch.setattr(attention, "lacking", lambda *_: None)  # as on a GPU that it serves
    said = refused(name, CPU, 128, True)
    assert said.startswith(f"model.attention: {name} cannot be used here: ") and f"`{package}" in said


def test_a_backend_that_gives_no_gradients_back_shows_in_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    true = attention.dispatch_attention_fn
    monkeypatch.setattr(attention, "dispatch_attention_fn", lambda *given, **how: true(*given, **how).detach())
    assert "it computes no gradients" in refused("native", CPU, 64, True, torch.float32)
    check_backend("native", CPU, 64, False, torch.float32)


def test_every_backend_that_is_described_is_diffusers() -> None:
    assert set(NEEDS) <= {member.value for member in AttentionBackendName}
    assert set(NEEDS) >= {"native", "flash", "_flash_3", "flash_4_hub", "xformers", "_native_cudnn"}


@pytest.mark.parametrize(
    ("family", "setting", "said"),
    [
        ("flux", "model.attention=_flash_3", "model.attention: _flash_3 cannot be used here: it computes no gradients"),
        ("flux", "rollout.attention=flash", "rollout.attention: flash cannot be used here: it needs a GPU"),
        ("flux", "rollout.attention=quick", "rollout.attention: unknown backend 'quick'"),
        ("sd3", "rollout.attention=flash", "rollout.attention: flash does not serve a SD3Transformer2DModel; allowed"),
        ("sd", "model.attention=_native_cudnn", "model.attention: _native_cudnn cannot be used here: it needs a GPU"),
    ],
)
def test_a_run_is_refused_before_its_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, family: str, setting: str, said: str
) -> None:
    monkeypatch.setattr(PipelinePolicy, "load_pipeline", lambda *_, **__: pytest.fail("it was loaded"))
    folder, run = FAMILIES[family]
    with pytest.raises(UserError) as caught:
        load_policy(tiny_config(request.getfixturevalue(folder), *run, setting), CPU)
    assert str(caught.value).startswith(said)


def test_names_are_checked_without_the_machine(pipeline_folder: Path, sd3_folder: Path) -> None:
    for setting in ("model.attention=auto", "model.attention=_flash_3", "rollout.attention=flash"):
        config = tiny_config(pipeline_folder, setting)
        check_names(config, find_family(config.model)[1])
    config = tiny_config(sd3_folder, *SD3_RUN, "model.attention=flash")
    with pytest.raises(UserError, match=r"model\.attention: flash does not serve a SD3Transformer2DModel; allowed are"):
        check_names(config, find_family(config.model)[1])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_policy_loads_where_gradients_are_off(pipeline_folder: Path, mode: Any) -> None:
    with mode():
        check_backend("native", CPU, 16, True, torch.float32)
    with torch.no_grad():
        loaded = load_policy(tiny_config(pipeline_folder, "model.attention=_native_math"), CPU)
    assert predict(loaded)[1] == 0
