"""Every preset against a float64 computation from the published formulas: sampler, advantages, window, loss, gradient.

``published_algorithms.py`` forms log-probabilities and their difference as the papers do; it uses nothing of ours.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pcpo_kernels import policy_loss, sample_step
from published_algorithms import Algorithm, Pair, algorithm, sd3_grid
from torch import Tensor

from pcpo_fast.config.dotted_keys import flattened
from pcpo_fast.config.loading import load_config
from pcpo_fast.config.presets import PRESETS
from pcpo_fast.config.schema import Config
from pcpo_fast.method.advantages import RunningAdvantages
from pcpo_fast.method.schedules import DiffusionSchedule, FlowSchedule, Schedule
from pcpo_fast.method.step_tables import EpochTables, RunTables
from pcpo_fast.method.transitions import ddim_timesteps, stable_diffusion_alphas
from pcpo_fast.prompts import Prompt
from pcpo_fast.rollout.epoch_scoring import RolloutScoring

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parents[1] / "golden"
SHAPE = (4, 6, 5)  # of one image's latents
IMAGES, GROUP = 12, 4
EPS32 = torch.finfo(torch.float32).eps
OURS = {
    "pcpo_stepwise": ("pcpo", {"credit.rule": "native", "advantage.calibrated": False}),
    "pcpo_stepwise_diffusion": ("pcpo_diffusion", {"advantage.scored_steps": 4}),
}
"""Presets with advantages of our own, the published ones that they are otherwise, and what else is not as there."""
PUBLISHED = [preset for preset in PRESETS if preset not in OURS]
EPOCHS = {"mixgrpo": (0, 60, 290), "flow_grpo_fast": (0, 1, 2)}


def config_of(preset: str, *overrides: str) -> Config:
    group = () if PRESETS[preset]["rollout"].get("images_per_prompt") == 1 else (f"rollout.images_per_prompt={GROUP}",)
    return load_config(None, [f"algorithm={preset}", *group, *overrides])


def schedule_of(config: Config) -> Schedule:
    """What Stable Diffusion 1.x and 3 say of their times."""
    if config.sampler.name == "ddim":
        return DiffusionSchedule(stable_diffusion_alphas(), ddim_timesteps(config.sampler.steps))
    return FlowSchedule(torch.tensor(sd3_grid(config.sampler.steps), dtype=torch.float64))


def tables_of(preset: str, *overrides: str) -> RunTables:
    config = config_of(preset, *overrides)
    return RunTables(config, schedule_of(config), CPU)


def per_row(column: Tensor, like: Tensor) -> Tensor:
    return column.reshape(-1, *[1] * (like.ndim - 1))


def test_every_preset_has_its_published_run() -> None:
    for preset in PUBLISHED:
        algorithm(preset)


@pytest.mark.parametrize("preset", OURS)
def test_a_preset_of_our_own_differs_in_nothing_but_its_credit(preset: str) -> None:
    published, changes = OURS[preset]
    ours, theirs = (dict(flattened(config_of(name).model_dump(mode="json"))) for name in (preset, published))
    found = {key: ours[key] for key in ours if ours[key] != theirs[key]}
    assert found == {"algorithm": preset, "advantage.steps": "gain", **changes}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_the_steps_of_a_preset_are_the_published_ones(preset: str) -> None:
    """Inside a window as published; outside, and there alone, the step without noise."""
    tables, published = tables_of(preset), algorithm(preset)
    config = tables.config
    assert (config.train.inner_epochs, config.credit.reduction, config.credit.fraction) == (1, "mean", 1.0)
    for epoch in EPOCHS.get(preset, (0,)):
        at = tables.at(epoch)
        check_trained_steps(preset, at, published, epoch)
        steps = torch.arange(len(published.sampler.std))
        x, f, z = (torch.randn(len(steps), *SHAPE) for _ in range(3))
        a, b, std = (column[steps] for column in (at.sampler.a, at.sampler.b, at.sampler.std))
        ours = sample_step(x, f, a, b, std, z).next_latents.double()
        for i in steps.tolist():
            noise = published.sampler.std[i] * z[i].double()
            expected = published.sampler.mean(x[i].double(), f[i].double(), i) + noise
            if i not in at.steps and (config.window.size or (i == len(steps) - 1 and tables_decode_clean(tables))):
                expected = published.sampler.ode(x[i].double(), f[i].double(), i)
            # DDIM's first steps divide by sqrt(alpha) = 0.07.
            assert torch.allclose(ours[i], expected, rtol=0, atol=60 * EPS32), (epoch, i)
        assert at.sampler.times.tolist() == pytest.approx(published.sampler.times, abs=EPS32)


def tables_decode_clean(tables: RunTables) -> bool:
    """DanceGRPO decodes the clean prediction of its last step; CPS's last step has no noise."""
    return tables.transitions.final_step == "clean"


def check_trained_steps(preset: str, at: EpochTables, published: Algorithm, epoch: int) -> None:
    if preset != "flow_grpo_fast":
        assert at.steps == published.steps(epoch)
        return
    first = at.steps[0]  # drawn by chance: three steps in a row, in the first half
    assert at.steps == [first, first + 1, first + 2] and set(at.steps) <= set(published.trained)


def decoded_noise(preset: str) -> bool:
    final_row = tables_of(preset).at(0).sampler.std[-1]
    return float(final_row) > 0


def test_the_final_image_is_the_published_one() -> None:
    """Flow-GRPO decodes its noisy last step and does not train it; DDPO decodes and trains it; DanceGRPO neither."""
    noisy = {preset for preset in PUBLISHED if decoded_noise(preset)}
    flow = {"flow_grpo", "pcpo_flow", "tempflow", "grpo_guard", "fair_clip"}
    assert noisy == flow | {"ddpo", "pcpo_ddpo", "dancegrpo_diffusion", "pcpo_diffusion"}
    last_trained = {
        preset for preset in PUBLISHED if tables_of(preset).at(0).steps[-1] == len(algorithm_std(preset)) - 1
    }
    assert last_trained == {"ddpo", "pcpo_ddpo"}


def algorithm_std(preset: str) -> list[float]:
    return algorithm(preset).sampler.std


# --------------------------------------------------------------------------------------------------- advantages


def trainers_advantages(config: Config) -> Any:
    """The trainer's own computation, for rewards in the order of images and the prompt of each group."""
    settings = config.advantage
    running = RunningAdvantages(settings.buffer_size, settings.min_count, settings.epsilon)

    def compute(rewards: Tensor, prompts: list[str]) -> Tensor:
        fake: Any = SimpleNamespace(
            config=config,
            running=running,
            per_group=config.rollout.images_per_prompt,
            group_prompts=[Prompt(text) for text in prompts],
            candidates=None,
        )
        rows = torch.arange(len(rewards))
        none = torch.empty(len(rows), 0, 2)
        return RolloutScoring._advantages(fake, rewards, rewards[:, None], none, config.rewards[:1], rows)[0]

    return compute


@pytest.mark.parametrize("preset", PUBLISHED)
def test_the_advantages_of_a_preset_are_the_published_ones(preset: str) -> None:
    config = config_of(preset)
    ours, published = trainers_advantages(config), algorithm(preset).advantages()
    group = config.rollout.images_per_prompt
    for _ in range(7):  # epochs: a buffer of 16 is not full before the sixth
        names = [str(n) for n in np.random.randint(0, 4, IMAGES)] if group == 1 else ["a", "b", "c"]
        rewards = torch.randn(IMAGES, dtype=torch.float64) ** 3
        expected = published(rewards.numpy().copy(), [name for name in names for _ in range(group)])
        assert torch.allclose(ours(rewards, names), torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------ loss and gradient


def random_pairs(at: EpochTables, published: Algorithm, clip: float) -> tuple[dict[str, Tensor], Tensor, list[Pair]]:
    """Every trained step of some images: float32 inputs of ours, and the same numbers for the published loss.

    The changes of the output are such that log-ratios lie within and outside the clip range.
    """
    steps = torch.tensor(at.steps).repeat(IMAGES)
    advantages = torch.randn(IMAGES).repeat_interleave(len(at.steps))
    x, old, z, direction, drift = (torch.randn(len(steps), *SHAPE) for _ in range(5))
    reach = clip * 10 ** (1.4 * torch.rand(len(steps)) - 0.7) * x[0].numel() ** 0.5
    size = reach / at.credit.linear[steps].abs()
    # A step whose noise is tiny would need changes whose square makes any ratio 0.
    size = torch.minimum(size, (20 * clip / at.credit.quadratic[steps]).sqrt())
    output = old + per_row(size, x) * direction
    reference = old + 0.05 * drift
    pairs = []
    for row, step in enumerate(steps.tolist()):
        x64, old64 = x[row].double(), old[row].double()
        following = published.sampler.mean(x64, old64, step) + published.sampler.std[step] * z[row].double()
        new = output[row].double().requires_grad_()
        pairs.append(Pair(x64, following, new, old64, step, float(advantages[row])))
    inputs = {"output": output, "old": old, "noise": z, "reference": reference, "advantage": advantages}
    return inputs, steps, pairs


@pytest.mark.parametrize("clip", ["published", "wide"])
@pytest.mark.parametrize("preset", PUBLISHED)
def test_loss_and_gradient_of_a_training_step_are_the_published_ones(preset: str, clip: str) -> None:
    published = algorithm(preset)
    if clip == "wide":  # the quadratic term is of the linear one's size, the ratio far from 1
        published = Algorithm(**(vars(published) | {"clip": 0.03}))
    tables = tables_of(preset, *(() if clip == "published" else ("credit.clip_range=0.03",)))
    settings = tables.config.credit
    at = tables.at(EPOCHS.get(preset, (0,))[-1])
    inputs, steps, pairs = random_pairs(at, published, published.clip)

    output = inputs["output"].clone().requires_grad_()
    has_kl = settings.kl_coefficient > 0
    result = policy_loss(
        output,
        inputs["old"],
        inputs["noise"],
        at.credit.linear[steps],
        at.credit.quadratic[steps],
        at.credit.scale[steps],
        inputs["advantage"],
        clip_range=settings.clip_range,
        objective=settings.objective,
        reduction=settings.reduction,
        reference=inputs["reference"] if has_kl else None,
        kl=at.credit.kl[steps] if has_kl else None,
    )
    result.loss.backward()

    losses = [published.pair_loss(pair, inputs["reference"][row].double()) for row, pair in enumerate(pairs)]
    loss = torch.stack(losses).mean()
    gradient = torch.stack(torch.autograd.grad(loss, [pair.output for pair in pairs]))
    assert output.grad is not None
    assert 0 < float(result.clipped.float().mean()) < 1, "both sides of the clip range must be met"
    size = torch.stack([value.detach().abs() for value in losses]).mean()
    assert float(result.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-5, abs=10 * EPS32 * float(size))
    for step in at.steps:  # each step by itself: a wrong credit must not hide behind a large one
        rows = steps == step
        error = (output.grad[rows].double() - gradient[rows]).norm()
        assert error <= 1e-5 * gradient[rows].norm(), step
    assert bool(gradient.flatten(1).any(dim=1).any()) and (gradient[result.clipped] == 0).all() == (not has_kl)


def test_tempflows_weight_is_its_codes_constant() -> None:
    """Its code multiplies the loss of Stable Diffusion 3.5 by 2.25 std."""
    tables = tables_of("tempflow")
    std = torch.tensor(algorithm_std("tempflow"), dtype=torch.float64)
    assert torch.allclose(tables.credit.scale[:9], 2.25 * std[:9], rtol=2e-3)


# -------------------------------------------------------------------------------- numbers of public implementations


@pytest.mark.parametrize(
    ("preset", "name", "outputs", "overrides"),
    [
        ("dancegrpo", "dance", ("v", "vnew"), ()),
        ("flow_grpo", "flowgrpo", ("v", "vnew"), ()),
        ("ddpo", "ddim", ("eps", "epsnew"), ("sampler.steps=10",)),
    ],
)
def test_public_log_ratios_through_a_presets_tables(
    preset: str, name: str, outputs: tuple[str, str], overrides: tuple[str, ...]
) -> None:
    """Steps of DanceGRPO's, Flow-GRPO's and DDPO's own code, recorded with both of their log-probabilities."""
    with np.load(GOLDEN / "steps.npz") as arrays:
        golden = {key: torch.from_numpy(arrays[key]) for key in arrays if key.startswith(name)}
    config = config_of(preset, *overrides)
    schedule = schedule_of(config)
    if name == "flowgrpo":
        schedule = FlowSchedule(golden["flowgrpo_sigmas"].double())
    at = RunTables(config, schedule, CPU).at(0)
    x, following, logp = (golden[f"{name}_{part}"] for part in ("x", "next", "logp"))
    old, new = (golden[f"{name}_{part}"] for part in outputs)
    for i in at.steps:
        rows = torch.full((x.shape[1],), i)
        a, b, std = (column[rows] for column in (at.sampler.a, at.sampler.b, at.sampler.std))
        noise = (following[i] - per_row(a, x[i]) * x[i] - per_row(b, x[i]) * old[i]) / per_row(std, x[i])
        columns = (at.credit.linear[rows], at.credit.quadratic[rows], at.credit.scale[rows], torch.ones(len(rows)))
        ours = policy_loss(new[i], old[i], noise, *columns, clip_range=1e-4, objective="clip").log_ratio
        # Theirs is the difference of two rounded numbers of size 1 to 4.
        assert torch.allclose(ours, logp[i, 1] - logp[i, 0], rtol=0, atol=40 * EPS32), i
