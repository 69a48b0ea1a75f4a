"""Presets through the real update on tiny pipelines: the gradients of an epoch against the published formulas."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from published_algorithms import Algorithm, Pair, Sampler, algorithm, cps, dance, ddim, flow
from tiny_pipeline import tiny_config
from tiny_runs import CPU, Bench
from torch import Tensor

from pcpo_fast.policies.families import load_policy

pytestmark = pytest.mark.usefixtures("process_group")

CLIP = 1e-3  # the mean runs over few elements here
WINDOW = ("sampler.steps=6", "window.size=2", "window.interval=1", "train.micro_batch_size=4")
FLOW_PRESETS = {
    "pcpo_flow": ("credit.kl_coefficient=0.04",),
    "flow_cps": (),
    "tempflow": (),
    "grpo_guard": (),
    "fair_clip": (),
    "mixgrpo": WINDOW,
    "flow_grpo_fast": (*WINDOW, "credit.steps=[0,1,2]"),
}


class InDouble:
    """The bench's policy once more, in float64, with any of its weights."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.policy = load_policy(bench.config, CPU)
        self.policy.module.double()

    def load(self, weights: dict[str, Tensor]) -> None:
        self.policy.module.load_state_dict({name: value.double() for name, value in weights.items()})

    def outputs(self, rows: Tensor, steps: Tensor) -> Tensor:
        rollout = self.bench.rollout
        latents, times = rollout.trajectories.latents[rows, steps].double(), self.bench.at.sampler.times[steps]
        conditioning = {name: value.double() for name, value in rollout.conditioning_of(rows).items()}
        return self.policy.predict(latents, times, conditioning)


def published_of(bench: Bench, name: str) -> Algorithm:
    """The published algorithm on the bench's own grid, noise and clip range."""
    times, sampler = bench.transitions.times.tolist(), bench.config.sampler
    build = {"dance": dance, "flow": flow, "cps": cps}
    table: Sampler
    if sampler.name == "ddim":
        table = ddim(sampler.steps, sampler.noise, sampler.weight)
    else:
        table = build[sampler.name](times, sampler.noise)
    trained = list(bench.tables.credit.trained_steps)
    return replace(algorithm(name), sampler=table, trained=trained, clip=bench.config.credit.clip_range)


def check_an_epoch(bench: Bench, published: Algorithm) -> None:
    """Both optimizer steps of an epoch: on-policy at first, then against what the rollout stored."""
    records, double = bench.run(), InDouble(bench)
    plan, trajectories = bench.rollout.plan, bench.rollout.trajectories
    assert len(records) == 2
    for update, record in enumerate(records):
        steps = plan.steps[update]
        rows = torch.arange(len(steps)) + update * len(steps)
        rows, steps = rows.repeat_interleave(steps.shape[1]), steps.flatten()
        assert set(steps.tolist()) <= set(bench.at.steps)
        double.load(bench.weights[0])
        with torch.no_grad():
            reference = double.outputs(rows, steps)
        double.load(bench.weights[update])
        fresh = double.outputs(rows, steps)
        old = fresh.detach() if update == 0 else trajectories.outputs[rows, steps].double()
        losses = []
        for index, (row, step) in enumerate(zip(rows.tolist(), steps.tolist(), strict=True)):
            x, following = (trajectories.latents[row, i].double() for i in (step, step + 1))
            pair = Pair(x, following, fresh[index], old[index], step, float(bench.advantages[row].float()))
            losses.append(published.pair_loss(pair, reference[index]))
        loss = torch.stack(losses).mean()
        double.policy.module.zero_grad()
        loss.backward()
        size = float(torch.stack([value.detach().abs() for value in losses]).mean())
        # The model runs in float32: the second update's log-ratios are differences of outputs with errors of 1e-6.
        assert record["policy/loss"] == pytest.approx(float(loss.detach()), rel=5e-3, abs=1e-5 * size)
        parameters = dict(double.policy.module.named_parameters())
        gap = [(value.double() - parameters[name].grad).norm() for name, value in bench.gradients[update].items()]
        expected = [parameters[name].grad.norm() for name in bench.gradients[update]]
        assert float(torch.stack(gap).norm() / torch.stack(expected).norm()) < 5e-4
    assert records[0]["policy/log_ratio_abs"] == 0 and records[1]["policy/log_ratio_abs"] > 0


@pytest.mark.parametrize("name", FLOW_PRESETS)
def test_a_flow_presets_update_is_the_published_one(pipeline_folder: Path, name: str) -> None:
    overrides = (f"algorithm={name}", f"credit.clip_range={CLIP}", *FLOW_PRESETS[name])
    bench = Bench.build(tiny_config(pipeline_folder, *overrides))
    if bench.config.window.size:
        bench.collect(1)
    check_an_epoch(bench, published_of(bench, name))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("ddpo", ()),
        pytest.param("dancegrpo_diffusion", (), marks=pytest.mark.slow),
        pytest.param("pcpo_ddpo", (), marks=pytest.mark.slow),
        ("pcpo_diffusion", ("sampler.variance=reshaped", "sampler.weight=40")),
    ],
)
def test_a_diffusion_presets_update_is_the_published_one(
    sd_folder: Path, name: str, overrides: tuple[str, ...]
) -> None:
    """With classifier-free guidance, whose two halves are both trained; 4 steps have no variance for the weight 4.5."""
    settings = ("sampler.noise=1.0", "model.cfg_scale=5", f"credit.clip_range={CLIP}", "train.micro_batch_size=4")
    bench = Bench.build(tiny_config(sd_folder, f"algorithm={name}", *settings, *overrides))
    check_an_epoch(bench, published_of(bench, name))
    assert len(bench.at.steps) == (4 if name.endswith("ddpo") else 3)
