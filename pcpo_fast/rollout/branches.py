"""Audit of a step by branches: the effect of its noise alone on an image.

A few images of the rollout are resampled from one of their steps on, once with fresh noise and once with its negative;
all later noise is that of the rollout, the same in both branches. Half the difference of the two final rewards is an
unbiased, low-variance estimate of the effect of the step's noise. The corresponding difference of the next scored
predictions is what a gain of the step would be; regressing the former on the latter shows how much a gain is worth.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pcpo_kernels import philox_normal
from torch import Tensor

from pcpo_fast.method.noise_keys import Purpose, random_key
from pcpo_fast.method.step_tables import StepTable
from pcpo_fast.policies import Policy
from pcpo_fast.rollout.rollout import Rollout, clean_latents, sampler_steps


@dataclass(frozen=True)
class Branches:
    """Two branches of each of m images.

    Attributes:
        step: where they diverge.
        time: of the step whose prediction is scored next, from 1 (noise) to 0 (image).
        rows: m positions in the rollout.
        images: float32 [2 m, 3, H, W], final images of the branches with the noise, then of those with its negative.
        predictions: images that the next scored step predicts, in the same layout.
    """

    step: int
    time: float
    rows: list[int]
    images: Tensor
    predictions: Tensor


def audited_step(scored: Sequence[int], trained: Sequence[int], epoch: int, seed: int) -> int | None:
    """The step of an epoch's audit, drawn from the trained steps at which a segment begins; None if there is none.

    The last segment is excluded: it is followed by the final reward itself, so its slope is 1.
    """
    steps = [step for step in scored[:-1] if step in trained]
    generator = torch.Generator().manual_seed(random_key(Purpose.AUDIT, seed, epoch))
    return steps[int(torch.randint(len(steps), (), generator=generator))] if steps else None


def audited_images(share: int, wanted: int, world_size: int) -> list[int]:
    """Positions of a rank's audited images among its ``share`` images of the epoch's first update, evenly spaced.

    They are the same images for any number of ranks that divides ``wanted``.
    """
    count = min(-(-wanted // world_size), share)
    return [position * share // count for position in range(count)]


@torch.no_grad()
def branch(
    policy: Policy,
    rollout: Rollout,
    table: StepTable,
    scored: Sequence[int],
    step: int,
    chosen: Sequence[int],
    seed: int,
    batch_size: int,
) -> Branches:
    """Sample both branches of some of this rank's images. Collective; all ranks must pass equally many.

    Args:
        policy: the policy that sampled the rollout, unchanged.
        rollout: this rank's images.
        table: the sampler that made them.
        scored: steps whose prediction is scored.
        step: one of them, but the last.
        chosen: positions of the images in the rollout.
        seed: the run's.
        batch_size: images sampled at once.
    """
    rows = torch.tensor(chosen, device=rollout.seeds.device).repeat(2)
    signs = torch.ones(len(rows), device=rows.device)
    signs[len(chosen) :] = -1
    numbers, epoch = rollout.plan.images.flatten()[list(chosen)].tolist(), rollout.plan.epoch
    keys = torch.tensor([random_key(Purpose.AUDIT_NOISE, seed, epoch, step, number) for number in numbers] * 2)
    after = next(later for later in scored if later > step)
    images, predictions = [], []
    for here, sign, key in zip(*(part.split(batch_size) for part in (rows, signs, keys.to(rows.device))), strict=True):
        latents = rollout.trajectories.latents[here, step]
        output = rollout.trajectories.outputs[here, step].float()
        noise = philox_normal(key, torch.zeros_like(key), latents[0].numel()).reshape_as(latents)
        noise = noise * (table.std[step] * sign).reshape(-1, *[1] * (latents.ndim - 1))
        x = table.a[step] * latents + table.b[step] * output + noise
        clean = x
        steps = sampler_steps(policy, rollout.conditioning_of(here), x, rollout.seeds[here], table, None, step + 1)
        for now, (output, following) in enumerate(steps, step + 1):
            if now == after:
                clean = clean_latents(x, output, table, now)
            x = following
        images.append(policy.decode(x))
        predictions.append(policy.decode(clean))
    return Branches(step, float(table.times[after]), list(chosen), torch.cat(images), torch.cat(predictions))
