"""Images without a training step: held-out evaluation, and generation for the user."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pcpo_fast.distributed import gather_rows, rank, world_size
from pcpo_fast.noise_keys import Purpose, random_key
from pcpo_fast.policies import Policy, select_rows
from pcpo_fast.rollout import initial_latents, sampler_steps
from pcpo_fast.step_tables import StepTable


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
    device = policy.device
    total = len(prompts) * images_per_prompt
    per_rank = -(-total // world_size())
    # The last rank repeats the last image where the images do not divide: a gather needs equal shares.
    mine = torch.arange(rank() * per_rank, (rank() + 1) * per_rank).clamp_max(total - 1)
    conditioning = policy.encode(prompts)
    images = []
    for rows in mine.split(batch_size):
        names = [(row // images_per_prompt, row % images_per_prompt) for row in rows.tolist()]
        initial_keys, seeds = (
            torch.tensor([random_key(purpose, seed, *name) for name in names], device=device)
            for purpose in (Purpose.EVALUATION_INITIAL_NOISE, Purpose.EVALUATION_STEP_NOISE)
        )
        chosen = {key: value.to(device) for key, value in select_rows(conditioning, rows // images_per_prompt).items()}
        latents = initial_latents(policy, initial_keys)
        for _, following in sampler_steps(policy, chosen, latents, seeds, table):
            latents = following
            if advance is not None:
                advance()
        images.append(policy.decode(latents))
    return gather_rows(torch.cat(images))[:total]
