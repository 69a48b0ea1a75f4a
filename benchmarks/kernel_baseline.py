"""The loss, the sampler step and guidance as the public trainers compute them: eager PyTorch, op by op.

The trainers recompute the step's mean from the model output, take the log-density of the stored x' under it, subtract
the stored old log-density and exponentiate. ``tests/kernels/test_baseline.py`` holds these functions to the reference
path, so that the benchmark cannot drift from what it compares with.
"""

import math

import torch
from torch import Tensor


def transition_mean(
    output: Tensor, latents: Tensor, time: Tensor, following: Tensor, noise: float
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a Dance SDE step from its times [B], by the score of the predicted clean image."""
    shape = (-1, *[1] * (latents.dim() - 1))
    t, t_next = time.reshape(shape), following.reshape(shape)
    latents = latents.float()
    output = output.float()
    step = t - t_next
    clean = latents - t * output
    drift = latents - step * output
    score = -(latents - (1 - t) * clean) / t**2
    mean = drift + 0.5 * noise**2 * score * step
    std = noise * torch.sqrt(step)
    return mean, std


def log_density(following: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density of x' per row, mean over the elements."""
    density = -((following.detach().float() - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return density.mean(dim=tuple(range(1, density.dim())))


def policy_loss(
    output: Tensor,
    latents: Tensor,
    next_latents: Tensor,
    old_log_density: Tensor,
    time: Tensor,
    following: Tensor,
    noise: float,
    advantage: Tensor,
    clip_range: float,
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate loss and log-ratio [B], from a difference of log-densities."""
    mean, std = transition_mean(output, latents, time, following, noise)
    log_ratio = log_density(next_latents, mean, std) - old_log_density
    ratio = torch.exp(log_ratio)
    advantage = torch.clamp(advantage, -5, 5)
    unclipped = -advantage * ratio
    clipped = -advantage * torch.clamp(ratio, 1.0 - clip_range, 1.0 + clip_range)
    return torch.mean(torch.maximum(unclipped, clipped)), log_ratio


def sample_step(
    latents: Tensor, output: Tensor, time: Tensor, following: Tensor, noise: float
) -> tuple[Tensor, Tensor]:
    """x' and its log-density, with PyTorch's own generator."""
    mean, std = transition_mean(output, latents, time, following, noise)
    next_latents = mean + torch.randn_like(mean) * std
    return next_latents, log_density(next_latents, mean, std)


def guidance(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance in the outputs' own dtype."""
    return unconditional + scale * (conditional - unconditional)
