"""Images without a training step: held-out evaluation, and generation for the user."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pcpo_fast.distributed import gather_rows, rank, world_size
from pcpo_fast.noise_keys import Purpose, random_key
from pcpo_fast.policies import Policy, select_rows
from pcpo_fast.rollout import StepTable, initial_latents, sample_trajectories


def generate(
    policy: Policy,
    prompts: Sequence[str],
    images_per_prompt: int,
    table: StepTable,
    seed: int,
    batch_size: int,
) -> Tensor:
    """Images of each prompt with noise that depends on (seed, prompt index, image) alone.

    Args:
        policy: what samples; all ranks must call this together, and share the work.
        prompts: P prompts.
        images_per_prompt: k images of each.
        table: the sampler.
        seed: fixes all noise.
        batch_size: images at once on each rank.

    Returns:
        float32 [P k, 3, H, W] in 0..1 on the policy's device, prompt-major, on every rank.
    """
    device = policy.device
    total = len(prompts) * images_per_prompt
    per_rank = -(-total // world_size())
    # The last rank repeats the last image where the images do not divide: a gather needs equal shares.
    mine = torch.arange(rank() * per_rank, (rank() + 1) * per_rank).clamp_max(total - 1)
    conditioning = {name: value.to(device) for name, value in policy.encode(prompts).items()}
    images = []
    for rows in mine.split(batch_size):
        names = [(int(row) // images_per_prompt, int(row) % images_per_prompt) for row in rows]
        keys = [
            torch.tensor([random_key(purpose, seed, Purpose.EVALUATION, p, k) for p, k in names], device=device)
            for purpose in (Purpose.INITIAL_NOISE, Purpose.STEP_NOISE)
        ]
        chosen = select_rows(conditioning, rows // images_per_prompt)
        final = sample_trajectories(policy, chosen, initial_latents(policy, keys[0]), keys[1], table, keep=False)
        images.append(policy.decode(final.latents[:, -1]))
    return gather_rows(torch.cat(images))[:total]
