"""The update of guided models: the gradient goes through both halves of classifier-free guidance."""

import itertools
from collections.abc import Callable

import pytest
import torch
from published_loss import Published, distance
from tiny_pipeline import tiny_config
from tiny_pipelines import EMBEDDED_RUN, FLOW_RUN, SD3_RUN, SD_RUN
from tiny_runs import LORA, Bench

pytestmark = pytest.mark.usefixtures("process_group")

NATIVE = ("credit.rule=native", "credit.objective=clip")
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    # DDPO and DanceGRPO on SD1.x, PCPO on it, DDPO on a model that predicts v, and Flow-GRPO with its reference.
    "sd_native": ("sd_folder", (*SD_RUN, *NATIVE)),
    "sd_uniform": ("sd_folder", (*SD_RUN, "credit.rule=uniform", "credit.objective=hinge")),
    "sd_uniform_lora": ("sd_folder", (*SD_RUN, *LORA, "optimizer.lr=0.02", "model.gradient_checkpointing=true")),
    "sd_v_native": ("sd_v_folder", (*SD_RUN, *NATIVE)),
    "sd3_native_kl": (
        "sd3_folder",
        (*SD3_RUN, *NATIVE, *LORA, "optimizer.lr=0.02", "credit.kl_coefficient=0.04", "credit.kl=published"),
    ),
    "flux3_full": ("flux3_folder", (*SD3_RUN, *NATIVE)),
    "klein_native_lora": ("klein_folder", (*SD3_RUN, *NATIVE, *LORA, "optimizer.lr=0.02")),
    "klein_full_kl": ("klein_folder", (*SD3_RUN, *NATIVE, "credit.kl_coefficient=0.04", "credit.kl=published")),
    "flux2_dev_lora": ("flux2_dev_folder", (*EMBEDDED_RUN, *NATIVE, *LORA, "optimizer.lr=0.02")),
    "krea2_full": ("krea2_folder", (*SD3_RUN, *NATIVE)),
    "qwen_image_lora": ("qwen_image_folder", (*FLOW_RUN, *NATIVE, *LORA, "optimizer.lr=0.02")),
    "z_image_full_kl": ("z_image_folder", (*SD3_RUN, *NATIVE, "credit.kl_coefficient=0.04", "credit.kl=published")),
    "sd3_full_kl": ("sd3_folder", (*SD3_RUN, *NATIVE, "credit.kl_coefficient=0.04", "credit.kl=published")),
}


@pytest.fixture
def bench_of(request: pytest.FixtureRequest) -> Callable[..., Bench]:
    def build(name: str, *overrides: str) -> Bench:
        folder, settings = CASES[name]
        return Bench.build(tiny_config(request.getfixturevalue(folder), *settings, *overrides))

    return build


@pytest.mark.parametrize(("name", "micro_batch_size"), list(zip(CASES, itertools.cycle((4, 12)), strict=False)))
def test_an_epochs_update_is_the_published_one(
    bench_of: Callable[..., Bench], name: str, micro_batch_size: int
) -> None:
    bench = bench_of(name, f"train.micro_batch_size={micro_batch_size}")
    assert bench.rollout.trajectories.outputs.dtype == torch.float32
    records = bench.run()
    published = Published(bench)
    assert len(records) == len(bench.gradients) == 2
    for update, record in enumerate(records):
        expected, gradients = published.metrics(update, bench.weights[update], ("itself", "stored")[update])
        # The model runs in float32: its outputs carry errors of 1e-6, and the second log-ratio is their difference.
        assert distance(bench.gradients[update], gradients) < 2e-4
        for metric, value in expected.items():
            assert record[metric] == pytest.approx(value, rel=2e-3, abs=1e-6), metric
    assert records[0]["policy/log_ratio_abs"] == 0
    assert records[1]["policy/log_ratio_abs"] > 1e-4, "the first step must have changed the policy"
    assert records[1]["policy/clip_fraction"] > 0


@pytest.mark.parametrize("name", ["sd_native", "sd3_native_kl"])
def test_the_gradient_of_the_unconditional_half_counts(bench_of: Callable[..., Bench], name: str) -> None:
    """Guards the test above: a gradient that leaves it out is another one."""
    bench = bench_of(name)
    bench.run()
    for update, old in enumerate(("itself", "stored")):
        _, gradients = Published(bench, stopped=True).metrics(update, bench.weights[update], old)
        assert distance(bench.gradients[update], gradients) > 0.1


@pytest.mark.parametrize(
    ("name", "mode", "dtype"),
    [
        ("sd_uniform", "detach", "float32"),
        pytest.param("sd_native", "rollout", "bfloat16", marks=pytest.mark.slow),
        pytest.param("sd3_full_kl", "rollout", "bfloat16", marks=pytest.mark.slow),
        pytest.param("klein_full_kl", "rollout", "bfloat16", marks=pytest.mark.slow),
        pytest.param("z_image_full_kl", "rollout", "bfloat16", marks=pytest.mark.slow),
        ("flux2_dev_lora", "recompute", "float32"),
        ("flux3_full", "rollout", "float32"),
        ("krea2_full", "rollout", "bfloat16"),
        ("qwen_image_lora", "recompute", "float32"),
        ("klein_native_lora", "recompute", "float32"),
        ("sd3_native_kl", "recompute", "float32"),
    ],
)
def test_the_log_ratio_is_exactly_0_where_the_output_is_unchanged(
    bench_of: Callable[..., Bench], name: str, mode: str, dtype: str
) -> None:
    """Rollout and update run the same batches here. The halves of a bf16 model are guided in float32 in both."""
    overrides = (
        "credit.steps=[1]",
        "train.updates_per_epoch=1",
        "train.micro_batch_size=8",
        "rollout.batch_size=8",
        f"train.old_output={mode}",
        f"model.dtype={dtype}",
    )
    bench = bench_of(name, *overrides)
    assert bench.rollout.trajectories.outputs.dtype == torch.float32
    asked: list[torch.Tensor] = []
    bench.policy.module.register_forward_pre_hook(
        lambda _module, args, kwargs: asked.append(args[1] if len(args) > 1 else kwargs["timestep"]), with_kwargs=True
    )
    record = bench.run()[0]
    # bf16 has no 501: the time reaches the network before anything is rounded.
    time = float(bench.transitions.times[1])
    time = (
        1 - time
        if name.startswith("z_image")
        else time
        if name.startswith(("klein", "flux", "krea", "qwen"))
        else 1000 * time
    )
    assert asked and all(torch.allclose(one, torch.full_like(one, time), rtol=1e-6) for one in asked)
    assert record["policy/log_ratio_abs"] == 0
    assert record["rollout/mismatch_output"] == record["rollout/mismatch_log_ratio"] == 0
    assert record["policy/grad_norm"] > 0
