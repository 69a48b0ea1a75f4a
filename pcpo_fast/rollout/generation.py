"""Sampling without training: held-out evaluation, and generation for the user."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pcpo_fast.config.schema import SamplerConfig
from pcpo_fast.distributed.collectives import gather_rows, rank, world_size
from pcpo_fast.method.noise_keys import Purpose, random_key
from pcpo_fast.method.samplers import build_transitions, deterministic_transitions
from pcpo_fast.method.step_tables import StepTable
from pcpo_fast.policies import Conditioning, Policy, select_rows
from pcpo_fast.profiling import profiler_ranges
from pcpo_fast.prompts import Prompt
from pcpo_fast.rollout.rollout import initial_latents, sampler_steps


@dataclass(frozen=True)
class ImageRequest:
    """Images to sample, with any model.

    Attributes:
        prompts: the P prompts.
        count: images per prompt.
        seed: fixes all noise.
        stochastic: sample with the rollout's noise; otherwise without noise.
        batch_size: images per batch on each rank.
    """

    prompts: Sequence[Prompt]
    count: int
    seed: int
    stochastic: bool
    batch_size: int

    @property
    def repeated(self) -> list[Prompt]:
        """The prompt of every image, prompt-major."""
        return [prompt for prompt in self.prompts for _ in range(self.count)]

    @property
    def captions(self) -> list[str]:
        """The text of the prompt of every image."""
        return [prompt.text for prompt in self.repeated]

    def table(self, sampler: SamplerConfig, policy: Policy) -> StepTable:
        """The sampler's steps on the policy's time grid."""
        build = build_transitions if self.stochastic else deterministic_transitions
        return StepTable.of(build(sampler, policy.schedule(sampler.steps)), policy.device)


def generate(
    policy: Policy,
    prompts: Sequence[str],
    images_per_prompt: int,
    table: StepTable,
    seed: int,
    batch_size: int,
    advance: Callable[[], None] | None = None,
) -> Tensor:
    """Sample images of each prompt, with noise that depends only on (seed, prompt index, image). Collective.

    Args:
        policy: samples the images; the ranks share the work.
        prompts: P prompts.
        images_per_prompt: k images of each.
        table: the sampler.
        seed: fixes all noise.
        batch_size: images at once on each rank.
        advance: called after every denoising step of every batch, for a progress display.

    Returns:
        float32 [P k, 3, H, W] in 0..1 on the policy's device, prompt-major, on every rank.
    """
    images = [
        sample_rows(policy, conditioning, names, table, seed, advance)
        for conditioning, names in _batches(policy, prompts, images_per_prompt, batch_size)
    ]
    return gather_rows(torch.cat(images))[: len(prompts) * images_per_prompt]


@torch.no_grad()
def path_kl(
    policy: Policy, prompts: Sequence[str], images_per_prompt: int, table: StepTable, seed: int, batch_size: int
) -> float:
    """KL divergence of the policy's trajectories from the reference's, in nats per image.

    Both have the same noise level at every step, so by the chain rule the KL is the mean, over the policy's own
    trajectories, of ``sum_i ||b_i (f_i - f_ref,i)||^2 / (2 std_i^2)`` over the steps with noise. The only error is
    that of sampling. It is an upper bound of the KL between the distributions of the images.

    Args:
        policy: one that has a reference (:meth:`Policy.as_reference`); all ranks must call this together.
        table: a sampler with noise.
        prompts, images_per_prompt, seed, batch_size: as for :func:`generate`.
    """
    parts = []
    for conditioning, names in _batches(policy, prompts, images_per_prompt, batch_size):
        given, x, seeds = _start(policy, conditioning, names, seed)
        nats = torch.zeros(len(names), dtype=torch.float64, device=policy.device)
        for step, (output, following) in enumerate(sampler_steps(policy, given, x, seeds, table)):
            if table.noisy[step]:
                with policy.as_reference():
                    reference = policy.predict(x, table.times[step].expand(len(names)), given)
                shift = table.b[step] / table.std[step] * (output.float() - reference.float())
                nats += shift.flatten(1).double().square().sum(dim=1) / 2
            x = following
        parts.append(nats)
    return float(gather_rows(torch.cat(parts))[: len(prompts) * images_per_prompt].mean())


def _batches(
    policy: Policy, prompts: Sequence[str], images_per_prompt: int, batch_size: int
) -> Iterator[tuple[Conditioning, list[tuple[int, int]]]]:
    """This rank's images in batches: conditioning, and the names (prompt index, image) of their noise."""
    total = len(prompts) * images_per_prompt
    per_rank = -(-total // world_size())
    # The last rank repeats the last image if the images do not divide evenly: a gather needs equal shares.
    mine = torch.arange(rank() * per_rank, (rank() + 1) * per_rank).clamp_max(total - 1)
    conditioning = policy.encode(prompts)
    for rows in profiler_ranges.each("batch", mine.split(batch_size)):
        names = [(row // images_per_prompt, row % images_per_prompt) for row in rows.tolist()]
        yield select_rows(conditioning, rows // images_per_prompt), names


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
    chosen, latents, seeds = _start(policy, conditioning, names, seed)
    for _, following in sampler_steps(policy, chosen, latents, seeds, table):
        latents = following
        if advance is not None:
            advance()
    with profiler_ranges.named("decode"):
        return policy.decode(latents)


def _start(
    policy: Policy, conditioning: Conditioning, names: Sequence[tuple[int, int]], seed: int
) -> tuple[Conditioning, Tensor, Tensor]:
    """Conditioning on the device, initial latents, and keys of the step noise."""
    device = policy.device
    initial_keys, seeds = (
        torch.tensor([random_key(purpose, seed, *name) for name in names], device=device)
        for purpose in (Purpose.EVALUATION_INITIAL_NOISE, Purpose.EVALUATION_STEP_NOISE)
    )
    chosen = {key: value.to(device) for key, value in conditioning.items()}
    return chosen, initial_latents(policy, initial_keys), seeds
