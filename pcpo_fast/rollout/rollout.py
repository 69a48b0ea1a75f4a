"""Rollouts: images sampled with a stochastic sampler, and the trajectories that the update needs."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from pcpo_kernels import NoiseKey, philox_normal, sample_step
from torch import Tensor

from pcpo_fast.config.schema import RolloutConfig
from pcpo_fast.method.noise_keys import Purpose, random_key
from pcpo_fast.method.step_tables import StepTable
from pcpo_fast.policies import Conditioning, Policy, select_rows
from pcpo_fast.profiling import profiler_ranges
from pcpo_fast.rollout.epoch_plan import EpochPlan


@dataclass(frozen=True)
class Trajectories:
    """Trajectories of a batch of images.

    Attributes:
        latents: float32 [B, N + 1, ...], from noise to image; the last is what was decoded.
        outputs: [B, N, ...], the model's outputs in its own dtype.
    """

    latents: Tensor
    outputs: Tensor

    @classmethod
    def of(cls, initial: Tensor, steps: Iterable[tuple[Tensor, Tensor]]) -> "Trajectories":
        """All that :func:`sampler_steps` yields from initial latents [B, ...]."""
        outputs, latents = zip(*steps, strict=True)
        return cls(torch.stack((initial, *latents), dim=1), torch.stack(outputs, dim=1))


@dataclass(frozen=True)
class Rollout:
    """A rank's images of an epoch, in the order of ``plan.images.flatten()``.

    Attributes:
        plan: which images, and their trained steps.
        conditioning: one row for each group of the epoch.
        groups: int64 [n], the group of each image.
        seeds: int64 [n], key of each image's step noise; its offset at step i is ``i * D``.
        trajectories: n rows.
        images: float32 [n, 3, H, W] in 0..1.
    """

    plan: EpochPlan
    conditioning: Conditioning
    groups: Tensor
    seeds: Tensor
    trajectories: Trajectories
    images: Tensor

    def conditioning_of(self, rows: Tensor) -> Conditioning:
        """Conditioning of some of the images, by their position."""
        return select_rows(self.conditioning, self.groups[rows])


@dataclass(frozen=True)
class PredictedImages:
    """Which steps' predicted clean images a rollout decodes, and what receives them.

    Attributes:
        steps: S steps, ascending.
        needed: bool [P, S] on the CPU, whether a group's predictions of a step are needed.
        finished: gets the position of the step among ``steps``, the positions of the images in the rollout, and the
            predictions, float32 [B, 3, H, W] in 0..1, as soon as a batch of them is decoded.
    """

    steps: tuple[int, ...]
    needed: Tensor
    finished: Callable[[int, list[int], Tensor], None]


def clean_latents(latents: Tensor, output: Tensor, table: StepTable, step: int) -> Tensor:
    """The clean latents [B, ...], float32, that a step predicts from its latents and the model's output there."""
    scale, slope = table.clean[step]
    return scale * latents + slope * output.float()


def noise_keys(
    settings: RolloutConfig, seed: int, epoch: int, groups: Tensor, members: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Keys of the initial latents and of the step noise of an epoch's images, int64 [n] each.

    Args:
        settings: the configuration's section ``rollout``.
        seed: the run's seed.
        epoch: counted from 0.
        groups, members: int64 [n], which image of which group.
        device: of the result.
    """
    names = list(zip(groups.tolist(), members.tolist(), strict=True))
    starts = [(group, 0 if settings.same_initial_noise else member) for group, member in names]
    initial, steps = (
        torch.tensor([random_key(purpose, seed, epoch, *pair) for pair in pairs], device=device)
        for purpose, pairs in ((Purpose.INITIAL_NOISE, starts), (Purpose.STEP_NOISE, names))
    )
    return initial, steps


def initial_latents(policy: Policy, keys: Tensor) -> Tensor:
    """Standard normal latents [B, *latent_shape], float32, one int64 key per image."""
    count = torch.Size(policy.latent_shape).numel()
    noise = philox_normal(keys, torch.zeros_like(keys), count)
    return noise.reshape(-1, *policy.latent_shape)


@torch.no_grad()
def sampler_steps(
    policy: Policy,
    conditioning: Conditioning,
    initial: Tensor,
    seeds: Tensor,
    table: StepTable,
    alike: tuple[Tensor, Tensor] | None = None,
    first_step: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run the sampler from given initial latents; yields each step's model output and the latents after it.

    Args:
        policy: predicts; evaluated without gradients.
        conditioning: B rows.
        initial: float32 [B, ...].
        seeds: int64 [B], keys of the step noise.
        table: the sampler.
        alike: from :func:`first_rows`, for rows with equal initial latents and conditioning: they are predicted only
            once, up to the first step with noise. None: every row is predicted.
        first_step: first step to take; ``initial`` are the latents before it.
    """
    x = initial
    count = x[0].numel()
    for step, noisy in enumerate(table.noisy[first_step:], first_step):
        time, a, b, std = (column[step].expand(x.shape[0]) for column in (table.times, table.a, table.b, table.std))
        with profiler_ranges.named("sampler step"):
            if alike is None:
                output = policy.predict(x, time, conditioning)
            else:
                first, copies = alike
                output = policy.predict(x[first], time[first], select_rows(conditioning, first))[copies]
            if noisy:
                alike = None  # from here on the rows differ
            noise = NoiseKey(seeds, torch.full_like(seeds, step * count)) if noisy else None
            x = sample_step(x, output, a, b, std, noise).next_latents
        yield output, x


def first_rows(labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Index of each distinct label's first occurrence, and for every row the position of its label among these.

    Args:
        labels: int64 [B] on the CPU, so that counting distinct ones needs no GPU synchronization.
        device: of the result.
    """
    values, copies = labels.unique(return_inverse=True)
    first = torch.full_like(values, len(labels)).scatter_reduce(0, copies, torch.arange(len(labels)), "amin")
    return first.to(device), copies.to(device)


def collect_rollout(
    policy: Policy,
    encode: Callable[[list[int]], Conditioning],
    plan: EpochPlan,
    settings: RolloutConfig,
    table: StepTable,
    seed: int,
    finished: Callable[[list[int], Tensor], None] | None = None,
    predicted: PredictedImages | None = None,
    chosen: Tensor | None = None,
) -> Rollout:
    """Sample this rank's images of an epoch.

    Args:
        policy: the current policy.
        encode: conditioning of prompts, by their index in the prompt list.
        plan: which images.
        settings: the configuration's ``rollout`` section.
        table: the sampler.
        seed: the run's seed; with epoch, group and image it fixes every noise.
        finished: gets the position and the images of each batch as soon as they are decoded.
        predicted: the predictions to decode; None for none.
        chosen: int64 [P, images_per_prompt], the candidates that a group's images are; None without candidates.
    """
    device, size = policy.device, settings.images_at_once
    numbers = plan.images.flatten()
    groups, members = numbers // settings.images_per_prompt, numbers % settings.images_per_prompt
    named = members if chosen is None else chosen[groups, members]
    initial_keys, seeds = noise_keys(settings, seed, plan.epoch, groups, named, device)
    conditioning = {name: value.to(device) for name, value in encode(plan.prompts.tolist()).items()}
    # Copy everything to the device before the first batch: a later copy would wait for queued work.
    sharing = [first_rows(part, device) if settings.share_first_steps else None for part in groups.split(size)]
    wanted = [] if predicted is None else [_wanted(predicted.needed[part], device) for part in groups.split(size)]
    groups = groups.to(device)
    parts, images = [], []
    for number, alike in enumerate(profiler_ranges.each("batch", sharing)):
        rows = slice(number * size, (number + 1) * size)
        initial = initial_latents(policy, initial_keys[rows])
        given = select_rows(conditioning, groups[rows])
        part = Trajectories.of(initial, sampler_steps(policy, given, initial, seeds[rows], table, alike))
        parts.append(part)
        with profiler_ranges.named("decode"):
            images.append(policy.decode(part.latents[:, -1]))
        if finished is not None:
            finished(list(range(*rows.indices(len(numbers)))), images[-1])
        if predicted is not None:
            for position, (places, index) in enumerate(wanted[number]):
                step = predicted.steps[position]
                if places:
                    latents, outputs = part.latents[:, step], part.outputs[:, step]
                    if index is not None:
                        latents, outputs = latents[index], outputs[index]
                    with profiler_ranges.named("decode"):
                        clean = policy.decode(clean_latents(latents, outputs, table, step))
                    predicted.finished(position, [number * size + row for row in places], clean)
    trajectories = Trajectories(torch.cat([p.latents for p in parts]), torch.cat([p.outputs for p in parts]))
    return Rollout(plan, conditioning, groups, seeds, trajectories, torch.cat(images))


def _wanted(needed: Tensor, device: torch.device) -> list[tuple[list[int], Tensor | None]]:
    """For each column of bool [B, S] the indices of its true rows, on the host and, unless all are, on the device."""
    found = [column.nonzero().flatten() for column in needed.T]
    return [(rows.tolist(), None if len(rows) == len(needed) else rows.to(device)) for rows in found]
