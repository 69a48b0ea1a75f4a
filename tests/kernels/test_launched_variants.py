"""What an update hands to the policy loss, and a rollout to its ops, is among the variants compiled ahead of time.

The updates run on the CPU; every call is recorded with the dtype of each of its tensors, which with the missing ones
decides what a GPU would compile.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pcpo_kernels import Endpoints, NoiseKey
from pcpo_kernels.dispatch import triton_installed
from torch import Tensor

if not triton_installed():
    pytest.skip("triton is not installed", allow_module_level=True)

from pcpo_kernels.variant import SIZES, all_variants
from tiny_pipeline import tiny_config
from tiny_pipelines import SD3_RUN, SD_RUN
from tiny_runs import Bench

from pcpo_fast.policies import base
from pcpo_fast.rollout import rollout
from pcpo_fast.training import update

pytestmark = pytest.mark.usefixtures("process_group")

KL = ("credit.kl_coefficient=0.04",)
KINDS = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16", torch.int64: "i64"}
RUNS: dict[str, tuple[str, tuple[str, ...], set[str]]] = {
    "flux": ("pipeline_folder", (), {"fp32-detached", "fp32-key"}),
    "flux_bf16_kl": (
        "pipeline_folder",
        ("model.dtype=bfloat16", "train.old_output=recompute", *KL),
        {"bf16-endpoints-kl", "bf16-key"},
    ),
    "flow_grpo": ("pipeline_folder", ("algorithm=flow_grpo",), {"fp32-detached-kl", "fp32-key-kl", "fp32-key"}),
    "sd": ("sd_folder", SD_RUN, {"fp32-detached-cfg", "fp32-key-cfg"}),
    "sd_bf16": (
        "sd_folder",
        (*SD_RUN, "model.dtype=bfloat16", "credit.objective=clip"),
        {"bf16-detached-cfg", "bf16-key-cfg"},
    ),
    "sd3_bf16_kl": (
        "sd3_folder",
        (*SD3_RUN, "model.dtype=bfloat16", "credit.reduction=sum", *KL),
        {"bf16-detached-kl-cfg", "bf16-key-kl-cfg", "bf16-key-cfg"},
    ),
    "sd3_kl_recomputed": (
        "sd3_folder",
        (*SD3_RUN, "train.old_output=recompute", *KL),
        {"fp32-endpoints-kl-cfg", "fp32-key-cfg"},
    ),
}


def kinds(**tensors: Tensor | None) -> dict[str, str]:
    """Triton's names of dtypes, of the tensors that are there."""
    return {name: KINDS[tensor.dtype] for name, tensor in tensors.items() if tensor is not None}


def loss_pointers(output: Tensor, old: Tensor | None, noise: Any, *columns: Tensor, **named: Any) -> dict[str, str]:
    """The pointers of the forward kernel for a call of policy_loss."""
    row_names = ("linear", "quadratic", "scale", "advantage")
    given = kinds(output=output, old_output=old, **dict(zip(row_names, columns, strict=True)))
    given |= kinds(**{name: named[name] for name in ("reference", "kl", "unconditional", "guidance_scale")})
    given |= kinds(divergence=columns[1] if named["divergence"] is None else named["divergence"])
    if isinstance(noise, Endpoints):
        x, following, a, b, std = noise
        return given | kinds(noise=x, next_latents=following, a=a, b=b, std=std)
    assert isinstance(noise, NoiseKey)
    return given | kinds(seed=noise.seed, offset=noise.offset)


def step_pointers(latents: Tensor, output: Tensor, a: Tensor, b: Tensor, std: Tensor, noise: Any) -> dict[str, str]:
    given = kinds(latents=latents, output=output, a=a, b=b, std=std)
    return given if noise is None else given | kinds(seed=noise.seed, offset=noise.offset)


def compiled_pointers(kernel: str, given: dict[str, str]) -> set[str]:
    """Names of the full-size variants of a kernel with exactly the given inputs."""
    outputs = {"scratch", "counters", "loss", "clipped_out", "statistics", "next_latents", "log_prob", "partial_sums"}
    if kernel == "policy_loss_forward":
        outputs -= {"next_latents"}
    if kernel == "guidance_forward":
        outputs = set()
    return {
        variant.name
        for variant in all_variants()
        if variant.kernel == kernel
        and "row" not in variant.name
        and {
            name: kind.removeprefix("*")
            for name, kind in variant.signature.items()
            if kind.startswith("*") and name not in outputs
        }
        == given
    }


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "sd3_bf16_kl" else n for n in RUNS])
def test_every_call_of_an_epoch_is_compiled_ahead_of_time(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: dict[str, set[str]] = {"policy_loss_forward": set(), "sample_step": set(), "guidance_forward": set()}

    def recorded(function: Callable[..., Any], kernel: str, pointers: Callable[..., dict[str, str]]) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            given = pointers(*arguments, **named)
            found = compiled_pointers(kernel, given)
            assert len(found) == 1, f"{kernel} is launched with {given}, which is not compiled ahead of time"
            launched[kernel] |= found
            return function(*arguments, **named)

        return call

    def guidance_pointers(reference: Tensor, output: Tensor, _: float, *, dtype: torch.dtype) -> dict[str, str]:
        return kinds(reference=reference, output=output, scale=torch.ones(1)) | {"result": KINDS[dtype]}

    monkeypatch.setattr(update, "policy_loss", recorded(update.policy_loss, "policy_loss_forward", loss_pointers))
    monkeypatch.setattr(rollout, "sample_step", recorded(rollout.sample_step, "sample_step", step_pointers))
    monkeypatch.setattr(base, "guidance", recorded(base.guidance, "guidance_forward", guidance_pointers))
    folder, settings, expected = RUNS[name]
    Bench.build(tiny_config(request.getfixturevalue(folder), *settings), record=False).run()
    assert launched["policy_loss_forward"] == expected
    output = "fp32" if "cfg" in min(expected) else min(expected)[:4]
    assert launched["sample_step"] <= {f"{output}-key", f"{output}-none"}
    assert bool(launched["guidance_forward"]) == ("cfg" in min(expected))


def test_every_forward_has_its_backward() -> None:
    """The pointers that both take have the same dtypes, and each half's gradient is in the half's dtype."""
    variants = {(variant.kernel, variant.name): variant for variant in all_variants()}
    for (kernel, name), forward in variants.items():
        if kernel != "policy_loss_forward":
            continue
        backward = variants["policy_loss_backward", name]
        shared = set(forward.signature) & set(backward.signature) - {"statistics"}
        assert {n: forward.signature[n] for n in shared} == {n: backward.signature[n] for n in shared}
        assert backward.signature["gradient"] == backward.signature["output"]
        assert backward.signature["unconditional_gradient"] == backward.signature["unconditional"]
        assert backward.stored_bytes == backward.constants["BLOCK"] * SIZES[name[:4]] * (2 if "cfg" in name else 1)
