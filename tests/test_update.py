"""The update against a float64 computation written from the published formulas, and the choice of old output."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_pipeline import tiny_config
from tiny_runs import CPU, LORA, Bench
from torch import Tensor

from pcpo_fast.policies.loading import load_policy
from pcpo_fast.rollout import Trajectories

pytestmark = pytest.mark.usefixtures("process_group")

PUBLISHED = {
    "pcpo": ("algorithm=pcpo",),
    "dancegrpo": ("algorithm=dancegrpo",),
    "flow_grpo": ("algorithm=flow_grpo",),
    "flow_grpo_lora": ("algorithm=flow_grpo", *LORA, "optimizer.lr=0.02"),
    "pcpo_lora": ("algorithm=pcpo", *LORA, "model.gradient_checkpointing=true", "optimizer.lr=0.02"),
    "pcpo_exact_kl": ("algorithm=pcpo", "credit.kl_coefficient=0.1", "credit.fraction=0.67"),
}


class Published:
    """Loss of an optimiser step in float64, pair by pair, with autograd; nothing of ours but the model's forward."""

    def __init__(self, bench: Bench) -> None:
        self.bench, config = bench, bench.config
        self.policy = load_policy(config, CPU)
        self.policy.module.double()
        self.times = bench.transitions.times.tolist()
        self.steps = config.sampler.steps
        self.noise, self.beta = config.sampler.noise, config.credit.kl_coefficient

    def load(self, weights: dict[str, Tensor]) -> None:
        self.policy.module.load_state_dict({name: value.double() for name, value in weights.items()})

    def outputs(self, pairs: list[tuple[int, int]]) -> Tensor:
        rows, steps = (torch.tensor(column) for column in zip(*pairs, strict=True))
        latents = self.bench.rollout.trajectories.latents[rows, steps].double()
        times = torch.tensor(self.times)[steps]
        return self.policy.predict(latents, times, self.bench.rollout.conditioning_of(rows))

    def sigma(self, step: int) -> float:
        if self.bench.config.sampler.name == "dance":
            return self.noise
        t = self.times[step]
        return self.noise * math.sqrt(t / (1 - (self.times[1] if t == 1 else t)))

    def mean(self, x: Tensor, f: Tensor, step: int) -> Tensor:
        t, dt, sigma = self.times[step], self.times[step] - self.times[step + 1], self.sigma(step)
        score = -(x - (1 - t) * (x - t * f)) / t**2
        return x - dt * f + 0.5 * sigma**2 * score * dt

    def credit(self, step: int) -> tuple[float, float]:
        """Signed native credit of a step, and the standard deviation of its noise."""
        t, dt, sigma = self.times[step], self.times[step] - self.times[step + 1], self.sigma(step)
        return -(dt + dt * (1 - t) * sigma**2 / (2 * t)) / (sigma * math.sqrt(dt)), sigma * math.sqrt(dt)

    def log_ratio(self, f: Tensor, old: Tensor, x: Tensor, following: Tensor, step: int) -> Tensor:
        native, std = self.credit(step)
        if self.bench.config.algorithm != "pcpo":  # the difference of two log-densities, mean over elements
            new_p, old_p = (-((following - self.mean(x, g, step)) ** 2).mean() / (2 * std**2) for g in (f, old))
            return new_p - old_p
        zeta = sum(abs(self.credit(i)[0]) for i in range(self.steps)) / (self.times[0] - self.times[-1])
        weight = zeta * (self.times[step] - self.times[step + 1])
        z = (following - self.mean(x, old, step)) / std
        return math.copysign(weight, native) * ((f - old) * z).mean() - 0.5 * weight**2 * ((f - old) ** 2).mean()

    def row(self, ratio: Tensor, advantage: float) -> Tensor:
        xi = self.bench.config.credit.clip_range
        if self.bench.config.algorithm == "pcpo":
            return torch.clamp(xi * abs(advantage) - advantage * ratio, min=0)
        rho = ratio.exp()
        return torch.maximum(-advantage * rho, -advantage * rho.clamp(1 - xi, 1 + xi))

    def divergence(self, gap: Tensor, step: int) -> Tensor:
        dt = self.times[step] - self.times[step + 1]
        published = dt if self.bench.config.credit.kl == "published" else 1.0
        return published * self.credit(step)[0] ** 2 / 2 * (gap**2).mean()

    def metrics(
        self, update: int, weights: dict[str, Tensor], old_of: str
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Metrics and gradients of one optimiser step; ``old_of``: "itself", "stored", or the policy at the "start"."""
        plan, trajectories = self.bench.rollout.plan, self.bench.rollout.trajectories
        per_update = plan.images.shape[1]
        pairs = [
            (update * per_update + image, int(step))
            for image in range(per_update)
            for step in plan.steps[update, image]
        ]
        reference = self._reference(pairs)
        self.load(self.bench.weights[0])
        with torch.no_grad():
            start = self.outputs(pairs)
        self.load(weights)
        fresh = self.outputs(pairs)
        losses, ratios, kls, clipped = [], [], [], []
        for index, (row, step) in enumerate(pairs):
            x, following = (trajectories.latents[row, i].double() for i in (step, step + 1))
            f = fresh[index]
            olds = {"itself": f.detach(), "stored": trajectories.outputs[row, step].double(), "start": start[index]}
            old = olds[old_of]
            ratio = self.log_ratio(f, old, x, following, step)
            advantage = float(self.bench.advantages[row].float())
            kl = self.divergence(f - reference[index], step) if self.beta else torch.zeros(())
            losses.append(self.row(ratio, advantage) + self.beta * kl)
            ratios.append(ratio.detach())
            kls.append(kl.detach())
            change = ratio if self.bench.config.algorithm == "pcpo" else ratio.exp() - 1
            clipped.append(float(advantage * change > self.bench.config.credit.clip_range * abs(advantage)))
        loss = torch.stack(losses).mean()
        self.policy.module.zero_grad()
        loss.backward()
        values = torch.stack(ratios)
        taylor = torch.where(values == 0, 0.0, (values - torch.expm1(values)).abs() / torch.expm1(values).abs())
        metrics = {
            "policy/loss": float(loss.detach()),
            "policy/log_ratio_abs": float(values.abs().mean()),
            "policy/clip_fraction": sum(clipped) / len(clipped),
            "policy/taylor_error": float(taylor.nan_to_num(0.0).mean()),
        }
        if self.beta:
            metrics["policy/kl"] = float(torch.stack(kls).mean())
        gradients = {name: p.grad for name, p in self.policy.module.named_parameters() if p.grad is not None}
        metrics["policy/grad_norm"] = float(torch.stack([g.norm() for g in gradients.values()]).norm())
        return metrics, gradients

    def _reference(self, pairs: list[tuple[int, int]]) -> Tensor:
        """The frozen start: the weights before the first step, adapters at zero."""
        start = self.bench.weights[0]
        self.load({name: torch.zeros_like(value) if "lora_B" in name else value for name, value in start.items()})
        with torch.no_grad():
            return self.outputs(pairs)


def distance(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert ours.keys() == expected.keys()
    gap = torch.stack([(ours[name].double() - value).norm() for name, value in expected.items()]).norm()
    return float(gap / torch.stack([value.norm() for value in expected.values()]).norm())


@pytest.mark.parametrize("micro_batch_size", [12, 4])
@pytest.mark.parametrize("name", PUBLISHED)
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


@pytest.mark.parametrize(("rollout_batch", "micro_batch"), [(96, 5), (7, 15), (1, 75)])
@pytest.mark.parametrize("mode", ["detach", "rollout", "recompute"])
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
