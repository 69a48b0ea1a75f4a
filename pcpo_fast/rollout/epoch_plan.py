"""Assigns an epoch's images to optimizer steps and ranks: the same for the same seed, for any number of ranks.

Images are assigned first to optimizer steps and then to ranks, so that an optimizer step sees the same images on any
number of GPUs, and every rank trains exactly the images that it sampled.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pcpo_fast.config.sampler_registry import SAMPLERS
from pcpo_fast.config.schema import AUTO, Config
from pcpo_fast.config.wording import counted
from pcpo_fast.errors import UserError
from pcpo_fast.method.noise_keys import Purpose, random_key
from pcpo_fast.method.step_tables import RunTables
from pcpo_fast.prompts import epoch_prompts

MOST_NAMED = 1024
"""The error for a micro-batch size that does not divide lists valid sizes up to this one."""


@dataclass(frozen=True)
class EpochPlan:
    """One rank's share of an epoch. All tensors are int64 on the CPU.

    Attributes:
        epoch: which epoch.
        prompts: [P], index into the prompt list of each group of the epoch, the same on every rank.
        images: [updates, n], this rank's images of each optimizer step, numbered ``group * images_per_prompt + image``.
        steps: [updates, n, k], the trained steps of each image, ascending.
    """

    epoch: int
    prompts: Tensor
    images: Tensor
    steps: Tensor


def plan_epoch(
    config: Config, prompt_count: int, trainable_steps: list[int], epoch: int, rank: int, world_size: int
) -> EpochPlan:
    """Draw an epoch's prompts, assign its images to updates and ranks, and choose each image's trained steps.

    Args:
        config: a configuration that :func:`pairs_per_update` accepts for ``world_size``.
        prompt_count: prompts to choose from.
        trainable_steps: steps that may be trained.
        epoch: counted from 0.
        rank, world_size: whose share.
    """
    prompts = torch.tensor(
        epoch_prompts(prompt_count, config.rollout.prompts_per_epoch, epoch, config.seed), dtype=torch.int64
    )
    generator = torch.Generator().manual_seed(random_key(Purpose.EPOCH_PLAN, config.seed, epoch))
    dealt = torch.randperm(config.images_per_epoch, generator=generator)
    images = dealt.reshape(config.train.updates_per_epoch, world_size, -1)[:, rank]
    steps = chosen_steps(config, trainable_steps, epoch, images.flatten())
    return EpochPlan(epoch, prompts, images, steps.reshape(*images.shape, -1))


def chosen_steps(config: Config, trainable_steps: list[int], epoch: int, images: Tensor) -> Tensor:
    """The trained steps of each image of an epoch, int64 [n, k], ascending.

    Args:
        config, trainable_steps, epoch: as for :func:`plan_epoch`.
        images: int64 [n], image numbers, of any rank.
    """
    generator = torch.Generator()
    count = steps_per_image(config, len(trainable_steps))
    choices = torch.tensor(sorted(trainable_steps))
    chosen = []
    for image in images.tolist():
        generator.manual_seed(random_key(Purpose.TRAINED_STEPS, config.seed, epoch, image))
        chosen.append(choices[torch.randperm(len(choices), generator=generator)[:count].sort().values])
    return torch.stack(chosen)


def steps_per_image(config: Config, trainable: int) -> int:
    """Number of trained steps of each image: the fraction of the trainable ones, rounded down, at least one."""
    # The small term makes 0.6 * 15 round to 9, not 8, in floating point.
    return max(1, int(config.credit.fraction * trainable + 1e-9))


def pairs_per_update(config: Config, trainable: int, world_size: int) -> int:
    """(Image, step) pairs that each rank trains in an update.

    Raises:
        UserError: the images of an update cannot be divided over the ranks, or the pairs into micro-batches of a given
            size.
    """
    per_update = config.images_per_epoch // config.train.updates_per_epoch
    if per_update % world_size:
        raise UserError(
            f"train.updates_per_epoch: an update has {counted(per_update, 'image')} "
            f"({counted(config.rollout.prompts_per_epoch, 'prompt')} x "
            f"{counted(config.rollout.images_per_prompt, 'image')} / "
            f"{counted(config.train.updates_per_epoch, 'update')}), which cannot be divided equally over "
            f"{counted(world_size, 'rank')}"
        )
    pairs = per_update // world_size * steps_per_image(config, trainable)
    size = config.train.micro_batch_size
    if size != AUTO and pairs % size:
        allowed = [str(size) for size in range(1, min(pairs, MOST_NAMED) + 1) if pairs % size == 0]
        more = ", ..." if pairs > MOST_NAMED else ""
        raise UserError(
            f"train.micro_batch_size: {size} does not divide the {pairs} (image, step) pairs that each rank trains in "
            f"an update; allowed: {AUTO}, {', '.join(allowed)}{more}"
        )
    return pairs


def accumulation_steps(config: Config, trainable: int, world_size: int) -> int:
    """Micro-batches per optimizer step on each rank, of a run whose sizes are resolved.

    Raises:
        UserError: as :func:`pairs_per_update`.
    """
    return pairs_per_update(config, trainable, world_size) // config.train.pairs_at_once


def check_sizes(config: Config, world_size: int) -> int | None:
    """:func:`pairs_per_update` before anything is loaded; None where only the model knows which steps are trained.

    Raises:
        UserError: as :func:`pairs_per_update`, or sampler, credit or window cannot be.
    """
    if config.sampler.grid != "shifted" or SAMPLERS[config.sampler.name].kind != "flow":
        return None
    return pairs_per_update(config, RunTables(config, None, torch.device("cpu")).trained_count, world_size)
