"""The update against a float64 computation written from the published formulas, and the choice of old output."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from published_loss import Published, distance
from tiny_pipeline import tiny_config
from tiny_runs import LORA, Bench

from pcpo_fast.rollout.rollout import Trajectories

pytestmark = pytest.mark.usefixtures("process_group")

MASK = ("credit.objective=divergence_mask",)
PUBLISHED = {
    "pcpo": ("algorithm=pcpo",),
    "dancegrpo": ("algorithm=dancegrpo",),
    "flow_grpo": ("algorithm=flow_grpo",),
    "flow_grpo_lora": ("algorithm=flow_grpo", *LORA, "optimizer.lr=0.02"),
    "pcpo_lora": ("algorithm=pcpo", *LORA, "model.gradient_checkpointing=true", "optimizer.lr=0.02"),
    "flow_dppo": ("algorithm=flow_grpo", *MASK, "credit.divergence_threshold=1e-4"),
    "masked_pcpo": ("algorithm=pcpo", *MASK, "credit.divergence_threshold=2.7e-4"),
    "pcpo_exact_kl": ("algorithm=pcpo", "credit.kl_coefficient=0.1", "credit.fraction=0.67"),
}


@pytest.mark.parametrize(("name", "micro_batch_size"), list(zip(PUBLISHED, itertools.cycle((12, 4)), strict=False)))
def test_an_epochs_update_is_the_published_one(pipeline_folder: Path, name: str, micro_batch_size: int) -> None:
    if name == "pcpo_exact_kl":  # two of three steps: 8 pairs
        micro_batch_size = {12: 8, 4: 2}[micro_batch_size]
    bench = Bench.build(tiny_config(pipeline_folder, *PUBLISHED[name], f"train.micro_batch_size={micro_batch_size}"))
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


def test_every_zero_stage_accumulates_the_same_gradients(pipeline_folder: Path, tmp_path: Path) -> None:
    gradients = []
    for stage in (1, 2):
        file = tmp_path / f"zero{stage}.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        bench = Bench.build(tiny_config(pipeline_folder, *PUBLISHED["flow_grpo_lora"], f"deepspeed={file}"))
        assert bench.engine.zero_stage == stage
        bench.run()
        gradients.append(bench.gradients)
    for update in (0, 1):
        expected = {name: value.double() for name, value in gradients[0][update].items()}
        assert distance(gradients[1][update], expected) < 1e-5


# --------------------------------------------------------------------------------------------- which old output


def first_updates(bench: Bench) -> Iterator[dict[str, float]]:
    return bench.update().run()


@pytest.mark.parametrize("finetune", [(), LORA], ids=["full", "lora"])
@pytest.mark.parametrize("mode", ["detach", "rollout", "recompute"])
def test_the_log_ratio_is_exactly_0_where_the_output_is_unchanged(
    pipeline_folder: Path, mode: str, finetune: tuple[str, ...]
) -> None:
    """Rollout and update run the same batches here: all images in one, a single step trained."""
    overrides = (
        "credit.steps=[1]",
        "train.updates_per_epoch=1",
        "train.micro_batch_size=8",
        "rollout.batch_size=8",
        f"train.old_output={mode}",
    )
    record = Bench.build(tiny_config(pipeline_folder, *overrides, *finetune)).run()[0]
    assert record["policy/log_ratio_abs"] == 0
    assert record["rollout/mismatch_output"] == record["rollout/mismatch_log_ratio"] == 0
    assert record["policy/grad_norm"] > 0


@pytest.mark.parametrize(
    ("mode", "rollout_batch", "micro_batch"),
    [
        ("detach", 7, 15),
        ("rollout", 96, 5),
        ("recompute", 7, 15),
        pytest.param("rollout", 1, 75, marks=pytest.mark.slow),
        pytest.param("recompute", 96, 5, marks=pytest.mark.slow),
    ],
)
def test_the_log_ratio_before_the_first_step_is_below_1e_6_for_any_batch_shapes(
    pipeline_folder: Path, mode: str, rollout_batch: int, micro_batch: int
) -> None:
    overrides = (
        "rollout.prompts_per_epoch=2",
        "rollout.images_per_prompt=25",
        f"rollout.batch_size={rollout_batch}",
        f"train.micro_batch_size={micro_batch}",
        f"train.old_output={mode}",
    )
    record = next(first_updates(Bench.build(tiny_config(pipeline_folder, *overrides))))
    assert record["policy/log_ratio_abs"] < 1e-6
    assert record["rollout/mismatch_log_ratio"] < 1e-6 and record["rollout/mismatch_output"] < 1e-5
    if mode != "rollout":
        assert record["policy/log_ratio_abs"] == 0


def perturb(bench: Bench, share: float) -> None:
    """Make the stored outputs differ from the policy's by a share of each row's norm, in a random direction."""
    trajectories = bench.rollout.trajectories
    f = trajectories.outputs
    direction = torch.randn(f.shape, generator=torch.Generator().manual_seed(5))
    scale = share * f.flatten(2).norm(dim=2) / direction.flatten(2).norm(dim=2)
    stored = f + scale[..., None, None] * direction
    bench.rollout = replace(bench.rollout, trajectories=Trajectories(trajectories.latents, stored))


@pytest.mark.parametrize("mode", ["detach", "rollout", "recompute"])
def test_the_mismatch_of_rollout_and_update_is_measured(pipeline_folder: Path, mode: str) -> None:
    bench = Bench.build(tiny_config(pipeline_folder, f"train.old_output={mode}"))
    exact = bench.rollout.trajectories.outputs.double()
    perturb(bench, 0.01)
    records = bench.run()
    # By hand, in float64: delta = f - stored, z the step's own noise, credit columns of the proportionate rule.
    rollout, times, noise = bench.rollout, bench.transitions.times, 0.7
    deltas = times[:-1] - times[1:]
    a = 1 - deltas * noise**2 / (2 * times[:-1])
    b = -deltas * (1 + (1 - times[:-1]) * noise**2 / (2 * times[:-1]))
    std = noise * deltas.sqrt()
    weight = (b.abs() / std).sum() / deltas.sum() * deltas
    ratios: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for row in range(4):  # the images of the first update
        for step in range(3):
            x, following = (rollout.trajectories.latents[row, i].double() for i in (step, step + 1))
            z = (following - a[step] * x - b[step] * exact[row, step]) / std[step]  # what the sampler drew
            delta = exact[row, step] - rollout.trajectories.outputs[row, step].double()
            ratios[step].append(
                float(-weight[step] * (delta * z).mean() - 0.5 * weight[step] ** 2 * (delta * delta).mean())
            )
    first, second = records
    assert first["rollout/mismatch_output"] == pytest.approx(0.01, rel=1e-3)
    for step, values in ratios.items():
        mean = sum(map(abs, values)) / 4
        assert first[f"rollout/mismatch_log_ratio_step_{step}"] == pytest.approx(mean, rel=1e-2)
        assert first[f"rollout/mismatch_output_step_{step}"] == pytest.approx(0.01, rel=1e-3)
    everything = [abs(value) for values in ratios.values() for value in values]
    assert first["rollout/mismatch_log_ratio"] == pytest.approx(sum(everything) / 12, rel=1e-2)
    assert not any(metric.startswith("rollout/") for metric in second)
    if mode == "rollout":
        assert first["policy/log_ratio_abs"] == pytest.approx(first["rollout/mismatch_log_ratio"], rel=1e-5)
    else:
        assert first["policy/log_ratio_abs"] == 0


def test_later_updates_compare_with_the_stored_or_the_recomputed_output(pipeline_folder: Path) -> None:
    """Were the stored outputs wrong, the later log-ratios of detach and rollout show it, those of recompute do not."""
    ratios = {}
    for mode in ("detach", "rollout", "recompute"):
        bench = Bench.build(tiny_config(pipeline_folder, f"train.old_output={mode}", "optimizer.lr=1e-12"))
        perturb(bench, 0.2)
        ratios[mode] = bench.run()[1]["policy/log_ratio_abs"]
    assert ratios["detach"] == pytest.approx(ratios["rollout"], rel=1e-3)
    assert ratios["detach"] > 1e-3
    assert ratios["recompute"] < 1e-6


@pytest.mark.parametrize(("mode", "old"), [("detach", ("itself", "stored")), ("recompute", ("itself", "start"))])
def test_the_noise_is_recovered_for_another_old_output(pipeline_folder: Path, mode: str, old: tuple[str, str]) -> None:
    """The update's forward differs from the rollout's, as another kernel's would, but by far more."""
    bench = Bench.build(tiny_config(pipeline_folder, f"train.old_output={mode}"))
    with torch.no_grad():
        for p in bench.policy.module.parameters():
            p.mul_(1.05)
    records = bench.run()
    assert records[0]["rollout/mismatch_output"] > 0.01
    published = Published(bench)
    for update, record in enumerate(records):
        expected, gradients = published.metrics(update, bench.weights[update], old[update])
        assert distance(bench.gradients[update], gradients) < 5e-4
        assert record["policy/log_ratio_abs"] == pytest.approx(expected["policy/log_ratio_abs"], rel=2e-3, abs=1e-6)


def test_a_detached_step_has_the_gradient_of_the_rollouts(pipeline_folder: Path) -> None:
    gradients = []
    for mode in ("detach", "rollout", "recompute"):
        bench = Bench.build(tiny_config(pipeline_folder, f"train.old_output={mode}"))
        bench.run()
        gradients.append({name: value.double() for name, value in bench.gradients[0].items()})
    assert distance(gradients[0], gradients[1]) < 1e-4 and distance(gradients[2], gradients[1]) < 1e-4


def test_inner_epochs_pass_over_the_same_rollout_again(pipeline_folder: Path) -> None:
    bench = Bench.build(tiny_config(pipeline_folder, "train.inner_epochs=2"))
    records = bench.run()
    assert len(records) == 4 and bench.engine.updates == 4
    published = Published(bench)
    for index, old in enumerate(("itself", "stored", "stored", "stored")):
        expected, gradients = published.metrics(index % 2, bench.weights[index], old)
        assert distance(bench.gradients[index], gradients) < 5e-4
        assert records[index]["policy/loss"] == pytest.approx(expected["policy/loss"], rel=5e-3)
    assert [("rollout/mismatch_output" in record) for record in records] == [True, False, False, False]


def test_an_image_without_advantage_teaches_nothing(pipeline_folder: Path) -> None:
    bench = Bench.build(tiny_config(pipeline_folder))
    bench.advantages = torch.zeros_like(bench.advantages)
    record = bench.run()[0]
    assert record["policy/grad_norm"] == 0 and record["policy/loss"] == 0
    assert all(not value.any() for value in bench.gradients[0].values())


def test_the_sum_over_elements_is_the_mean_times_their_number(pipeline_folder: Path) -> None:
    norms = [
        Bench.build(tiny_config(pipeline_folder, f"credit.reduction={reduction}")).run()[0]["policy/grad_norm"]
        for reduction in ("mean", "sum")
    ]
    assert norms[1] / norms[0] == pytest.approx(24 * 16, rel=1e-4)
