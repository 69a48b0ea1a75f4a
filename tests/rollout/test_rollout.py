"""Rollouts against a roll-out written from the published formulas, without our tables or kernels."""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pcpo_kernels import philox_normal
from tiny_pipeline import CHANNELS, PROMPTS, TOKENS, tiny_config
from torch import Tensor

from pcpo_fast.config.schema import Config
from pcpo_fast.method.noise_keys import Purpose, random_key
from pcpo_fast.method.samplers import build_transitions
from pcpo_fast.method.step_tables import StepTable
from pcpo_fast.policies import Conditioning, Policy
from pcpo_fast.policies.families import load_policy
from pcpo_fast.rollout.epoch_plan import plan_epoch
from pcpo_fast.rollout.generation import generate, path_kl
from pcpo_fast.rollout.rollout import Rollout, collect_rollout, initial_latents, sampler_steps

CPU = torch.device("cpu")
SEED = 11


@pytest.fixture(scope="module")
def policy(pipeline_folder: Path) -> Policy:
    return load_policy(tiny_config(pipeline_folder), CPU)


def config_of(folder: Path, *overrides: str) -> Config:
    return tiny_config(folder, f"seed={SEED}", *overrides)


def roll(policy: Policy, config: Config, rank: int = 0, world_size: int = 1, epoch: int = 3) -> Rollout:
    transitions = build_transitions(config.sampler, policy.schedule(config.sampler.steps))
    plan = plan_epoch(config, len(PROMPTS), [0, 1, 2], epoch, rank, world_size)

    def encode(indices: list[int]) -> Conditioning:
        return policy.encode([PROMPTS[index] for index in indices])

    return collect_rollout(policy, encode, plan, config.rollout, StepTable.of(transitions, CPU), config.seed)


# ---------------------------------------------------------------------------- an independent roll-out, one image


def noise_of(group: int, member: int, step: int, epoch: int = 3) -> Tensor:
    """The step's noise by its documented name: key (seed, epoch, group, image), elements step D to step D + D - 1."""
    key = torch.tensor([random_key(Purpose.STEP_NOISE, SEED, epoch, group, member)])
    count = TOKENS * CHANNELS
    return philox_normal(key, torch.zeros(1, dtype=torch.int64), (step + 1) * count)[:, step * count :].reshape(
        1, TOKENS, CHANNELS
    )


def start_of(group: int, member: int, epoch: int = 3) -> Tensor:
    key = torch.tensor([random_key(Purpose.INITIAL_NOISE, SEED, epoch, group, member)])
    return philox_normal(key, torch.tensor([0]), TOKENS * CHANNELS).reshape(1, TOKENS, CHANNELS)


def sde_step(x: Tensor, v: Tensor, t: float, following: float, sigma: float, z: Tensor) -> Tensor:
    """Reverse SDE of a flow with score -(x - (1 - t) x0) / t², as DanceGRPO and Flow-GRPO step it."""
    dt = t - following
    x0 = x - t * v
    score = -(x - (1 - t) * x0) / t**2
    return x - dt * v + 0.5 * sigma**2 * score * dt + sigma * math.sqrt(dt) * z


def dance(x: Tensor, v: Tensor, times: list[float], step: int, z: Tensor) -> Tensor:
    if step == len(times) - 2:
        return x - times[step] * v  # the clean prediction is what DanceGRPO decodes
    return sde_step(x, v, times[step], times[step + 1], 0.7, z)


def dance_noisy(x: Tensor, v: Tensor, times: list[float], step: int, z: Tensor) -> Tensor:
    return sde_step(x, v, times[step], times[step + 1], 0.7, z)


def flow(x: Tensor, v: Tensor, times: list[float], step: int, z: Tensor) -> Tensor:
    t = times[step]
    return sde_step(x, v, t, times[step + 1], 0.7 * math.sqrt(t / (1 - (times[1] if t == 1 else t))), z)


def cps(x: Tensor, v: Tensor, times: list[float], step: int, z: Tensor) -> Tensor:
    t, following = times[step], times[step + 1]
    std = following * math.sin(0.7 * math.pi / 2)
    image, noise = x - t * v, x + (1 - t) * v
    return (1 - following) * image + math.sqrt(following**2 - std**2) * noise + std * z


Step = Callable[[Tensor, Tensor, list[float], int, Tensor], Tensor]


def independent(
    policy: Policy, prompt: str, group: int, member: int, times: list[float], step_of: Step
) -> list[Tensor]:
    conditioning = policy.encode([prompt])
    latents = [start_of(group, member)]
    for step in range(len(times) - 1):
        with torch.no_grad():
            v = policy.predict(latents[-1], torch.tensor([times[step]]), conditioning)
        latents.append(step_of(latents[-1], v, times, step, noise_of(group, member, step)))
    return latents


@pytest.mark.parametrize(
    ("overrides", "step_of"),
    [
        (("sampler.name=dance",), dance),
        (("sampler.name=dance", "sampler.final_step=noisy"), dance_noisy),
        (("sampler.name=flow", "sampler.grid=scheduler"), flow),
        (("sampler.name=cps",), cps),
    ],
    ids=["dance", "dance-noisy", "flow", "cps"],
)
def test_a_rollout_follows_the_published_formulas(
    policy: Policy, pipeline_folder: Path, overrides: tuple[str, ...], step_of: Step
) -> None:
    config = config_of(pipeline_folder, "rollout.same_initial_noise=false", *overrides)
    rollout = roll(policy, config)
    if "sampler.grid=scheduler" in overrides:
        times = policy.schedule(4).times.tolist()
    else:
        times = [3 * u / (1 + 2 * u) for u in (1.0, 0.75, 0.5, 0.25, 0.0)]
    assert rollout.plan.images.shape == (2, 4) and rollout.trajectories.latents.shape == (8, 5, TOKENS, CHANNELS)
    for row in (0, 5, 7):
        group, member = divmod(int(rollout.plan.images.flatten()[row]), 4)
        latents = independent(policy, PROMPTS[int(rollout.plan.prompts[group])], group, member, times, step_of)
        for step, expected in enumerate(latents):
            close = torch.allclose(rollout.trajectories.latents[row, step], expected[0], atol=2e-4)
            assert close, (row, step, (rollout.trajectories.latents[row, step] - expected[0]).abs().max())
        assert torch.allclose(rollout.images[row], policy.decode(latents[-1])[0], atol=1e-4)


def test_the_clean_last_step_is_decoded_and_the_noisy_one_would_look_different(
    policy: Policy, pipeline_folder: Path
) -> None:
    """Method, section 1: decoding x' of the Dance sampler's last step leaves its noise in the image."""
    rollout = roll(policy, config_of(pipeline_folder))
    before, velocity = rollout.trajectories.latents[:, -2], rollout.trajectories.outputs[:, -1]
    last = 3 * 0.25 / (1 + 2 * 0.25)
    clean = policy.decode(before - last * velocity)
    assert torch.allclose(rollout.images, clean, atol=1e-5)
    noise = torch.randn(clean.shape[0], TOKENS, CHANNELS)
    noisy = policy.decode(sde_step(before, velocity, last, 0.0, 0.7, noise))
    assert (noisy - rollout.images).square().mean().sqrt() > 0.05


def test_outputs_are_what_the_policy_said_at_the_stored_latents(policy: Policy, pipeline_folder: Path) -> None:
    rollout = roll(policy, config_of(pipeline_folder))
    times = build_transitions(config_of(pipeline_folder).sampler).times.float()
    rows = torch.arange(8)
    conditioning = rollout.conditioning_of(rows)
    for step in range(4):
        with torch.no_grad():
            again = policy.predict(rollout.trajectories.latents[:, step], times[step].expand(8), conditioning)
        assert torch.equal(rollout.trajectories.outputs[:, step], again)
    groups = rollout.plan.images.flatten() // 4
    expected = policy.encode([PROMPTS[int(rollout.plan.prompts[group])] for group in groups])
    assert all(torch.equal(conditioning[name], expected[name]) for name in expected)


def test_the_gradient_of_a_trained_step_flows_through_no_rollout(policy: Policy, pipeline_folder: Path) -> None:
    rollout = roll(policy, config_of(pipeline_folder))
    assert not rollout.trajectories.outputs.requires_grad and not rollout.images.requires_grad


# --------------------------------------------------------------------------------- reproducible in every split


def by_image(rollouts: list[Rollout], column: Callable[[Rollout], Tensor]) -> Tensor:
    numbers = torch.cat([rollout.plan.images.flatten() for rollout in rollouts])
    assert sorted(numbers.tolist()) == list(range(8))
    return torch.cat([column(rollout) for rollout in rollouts])[numbers.argsort()]


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_a_rollout_does_not_depend_on_the_batch_size(policy: Policy, pipeline_folder: Path, batch_size: int) -> None:
    whole = roll(policy, config_of(pipeline_folder))
    parts = roll(policy, config_of(pipeline_folder, f"rollout.batch_size={batch_size}"))
    assert torch.equal(whole.seeds, parts.seeds) and torch.equal(whole.plan.steps, parts.plan.steps)
    assert torch.equal(whole.trajectories.latents[:, 0], parts.trajectories.latents[:, 0])
    assert torch.allclose(whole.trajectories.latents, parts.trajectories.latents, atol=1e-4)
    assert torch.allclose(whole.images, parts.images, atol=1e-4)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_rollout_does_not_depend_on_the_ranks(policy: Policy, pipeline_folder: Path, world_size: int) -> None:
    config = config_of(pipeline_folder, "rollout.same_initial_noise=false")
    alone = [roll(policy, config)]
    shared = [roll(policy, config, rank, world_size) for rank in range(world_size)]
    for exact in (
        lambda r: r.seeds,
        lambda r: r.trajectories.latents[:, 0],
        lambda r: r.plan.steps.flatten(0, 1),
        lambda r: r.groups,
    ):
        assert torch.equal(by_image(alone, exact), by_image(shared, exact))
    for close in (lambda r: r.trajectories.latents, lambda r: r.images):
        assert torch.allclose(by_image(alone, close), by_image(shared, close), atol=1e-4)


@pytest.mark.parametrize("same", [True, False])
def test_initial_noise_within_a_group(policy: Policy, pipeline_folder: Path, same: bool) -> None:
    rollout = roll(policy, config_of(pipeline_folder, f"rollout.same_initial_noise={str(same).lower()}"))
    starts = by_image([rollout], lambda r: r.trajectories.latents[:, 0])
    distinct = {tuple(start.flatten()[:8].tolist()) for start in starts}
    assert len(distinct) == (2 if same else 8)
    assert torch.equal(starts[0], starts[1]) == same
    ends = by_image([rollout], lambda r: r.trajectories.latents[:, -1])
    assert len({tuple(end.flatten()[:8].tolist()) for end in ends}) == 8  # the steps' noise is every image's own


def test_noise_changes_with_the_epoch_and_the_seed(policy: Policy, pipeline_folder: Path) -> None:
    config = config_of(pipeline_folder)
    runs = [roll(policy, config), roll(policy, config, epoch=4), roll(policy, config_of(pipeline_folder, "seed=12"))]
    assert len({int(seed) for run in runs for seed in run.seeds}) == 24
    assert len({float(run.trajectories.latents[i, 0, 0, 0]) for run in runs for i in range(8)}) == 6


# ------------------------------------------------------------------------------------------- held-out sampling


def test_generate_depends_on_seed_prompt_and_image_alone(policy: Policy, pipeline_folder: Path) -> None:
    table = StepTable.of(build_transitions(config_of(pipeline_folder).sampler), CPU)
    images = generate(policy, PROMPTS[:3], 2, table, SEED, 64)
    assert images.shape == (6, 3, 16, 24)
    assert torch.allclose(generate(policy, PROMPTS[:3], 2, table, SEED, 1), images, atol=1e-4)
    assert torch.allclose(generate(policy, PROMPTS[:2], 2, table, SEED, 4), images[:4], atol=1e-4)
    assert not torch.allclose(generate(policy, PROMPTS[:3], 2, table, SEED + 1, 64), images, atol=1e-2)
    assert not torch.allclose(images[0], images[1], atol=1e-2)


def test_the_kl_of_trajectories_is_the_sum_of_the_steps(
    policy: Policy, pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Image by image, with the divergence of two normal distributions as PyTorch has it; the last step has no noise."""
    table = StepTable.of(build_transitions(config_of(pipeline_folder).sampler), CPU)
    assert table.noisy == (True, True, True, False)
    reference = copy.deepcopy(policy.module)
    monkeypatch.setattr(policy, "reference_module", reference)
    assert path_kl(policy, PROMPTS[:3], 2, table, SEED, 4) == 0
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.01)
    expected = []
    for prompt, image in itertools.product(range(3), range(2)):
        given = policy.encode([PROMPTS[prompt]])
        keys = [
            torch.tensor([random_key(purpose, SEED, prompt, image)])
            for purpose in (Purpose.EVALUATION_INITIAL_NOISE, Purpose.EVALUATION_STEP_NOISE)
        ]
        x, total = initial_latents(policy, keys[0]), 0.0
        for step, (output, following) in enumerate(sampler_steps(policy, given, x, keys[1], table)):
            if step < 3:
                with torch.no_grad(), policy.running(reference):
                    other = policy.predict(x, table.times[step : step + 1], given)
                a, b, std = (column[step].double() for column in (table.a, table.b, table.std))
                one, two = (torch.distributions.Normal(a * x.double() + b * f.double(), std) for f in (output, other))
                total += float(torch.distributions.kl_divergence(one, two).sum())
            x = following
        expected.append(total)
    assert min(expected) > 1e-3
    for batch_size in (1, 4):
        found = path_kl(policy, PROMPTS[:3], 2, table, SEED, batch_size)
        assert found == pytest.approx(sum(expected) / 6, rel=1e-4)


def test_evaluation_never_meets_the_noise_of_training(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same seed in both: a key holds its purpose, and evaluation has purposes of its own."""
    keys: dict[str, set[int]] = {"evaluation": set(), "training": set()}

    def recording(name: str) -> Any:
        return lambda *parts: keys[name].add(random_key(*parts)) or random_key(*parts)

    monkeypatch.setattr("pcpo_fast.rollout.generation.random_key", recording("evaluation"))
    monkeypatch.setattr("pcpo_fast.rollout.rollout.random_key", recording("training"))
    config = config_of(Path("unused"), "rollout.same_initial_noise=false")
    for epoch in range(12):
        roll_keys_only(policy, config, epoch)
    table = StepTable.of(build_transitions(config.sampler), CPU)
    generate(policy, PROMPTS, 4, replace(table, noisy=table.noisy[:1]), SEED, 64)
    assert len(keys["evaluation"]) == 32 and len(keys["training"]) == 12 * 16
    assert not keys["evaluation"] & keys["training"]


def roll_keys_only(policy: Policy, config: Config, epoch: int) -> None:
    """A rollout of a single step: its keys are those of a whole one."""
    transitions = build_transitions(config.sampler)
    table = StepTable.of(transitions, CPU)
    plan = plan_epoch(config, len(PROMPTS), [0, 1, 2], epoch, 0, 1)
    short = replace(table, noisy=table.noisy[:1])
    collect_rollout(policy, lambda rows: policy.encode([PROMPTS[i] for i in rows]), plan, config.rollout, short, SEED)
