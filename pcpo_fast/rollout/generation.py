"""Images without a training step: held-out evaluation, and generation for the user."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pcpo_fast.distributed.collectives import gather_rows, rank, world_size
from pcpo_fast.method.noise_keys import Purpose, random_key
from pcpo_fast.method.step_tables import StepTable
from pcpo_fast.policies import Conditioning, Policy, select_rows
from pcpo_fast.profiling import profiler_ranges
from pcpo_fast.rollout.rollout import initial_latents, sampler_steps


def generate(
    policy: Policy,
    prompts: Sequence[str],
    images_per_prompt: int,
    table: StepTable,
    seed: int,
    batch_size: int,
    advance: Callable[[], None] | None = None,
) -> Tensor:
    """Images of each prompt with noise that depends on (seed, prompt index, image) alone.

    Args:
        policy: what samples; all ranks must call this together, and share the work.
        prompts: P prompts.
        images_per_prompt: k images of each.
        table: the sampler.
        seed: fixes all noise.
        batch_size: images at once on each rank.
        advance: called after every denoising step of every batch, for a progress display.

    Returns:
        float32 [P k, 3, H, W] in 0..1 on the policy's device, prompt-major, on every rank.
    """
    total = len(prompts) * images_per_prompt
    per_rank = -(-total // world_size())
    # The last rank repeats the last image where the images do not divide: a gather needs equal shares.
    mine = torch.arange(rank() * per_rank, (rank() + 1) * per_rank).clamp_max(total - 1)
    conditioning = policy.encode(prompts)
    images = []
    for rows in profiler_ranges.each("batch", mine.split(batch_size)):
        names = [(row // images_per_prompt, row % images_per_prompt) for row in rows.tolist()]
        images.append(
            sample_rows(policy, select_rows(conditioning, rows // images_per_prompt), names, table, seed, advance)
        )
    return gather_rows(torch.cat(images))[:total]


def sample_rows(
    policy: Policy,
    conditioning: Conditioning,
    names: Sequence[tuple[int, int]],
    table: StepTable,
    seed: int,
    advance: Callable[[], None] | None = None,
) -> Tensor:
    """One batch of images, by this rank alone.

    Args:
        policy: what samples.
        conditioning: of every image, B rows.
        names: B pairs (prompt index, image) that name the noise.
        table: the sampler.
        seed: fixes all noise, with the names.
        advance: called after every denoising step.

    Returns:
        float32 [B, 3, H, W] in 0..1 on the policy's device.
    """
    device = policy.device
    initial_keys, seeds = (
        torch.tensor([random_key(purpose, seed, *name) for name in names], device=device)
        for purpose in (Purpose.EVALUATION_INITIAL_NOISE, Purpose.EVALUATION_STEP_NOISE)
    )
    chosen = {key: value.to(device) for key, value in conditioning.items()}
    latents = initial_latents(policy, initial_keys)
    for _, following in sampler_steps(policy, chosen, latents, seeds, table):
        latents = following
        if advance is not None:
            advance()
    with profiler_ranges.named("decode"):
        return policy.decode(latents)
