"""How much the images of one prompt differ: the first thing a collapsing policy loses."""

from statistics import fmean

import torch
from torch import Tensor


def pixel_diversity(images: Tensor) -> float:
    """Root mean squared pixel distance between two images of a prompt, over all pairs.

    Args:
        images: [k, 3, H, W] in 0..1, k at least 2.
    """
    _check(len(images))
    # The mean squared distance of all pairs is twice the sample variance.
    return float((2 * images.double().flatten(1).var(dim=0, unbiased=True).mean()).sqrt())


def mean_pixel_diversity(images: Tensor, per_prompt: int) -> float:
    """Mean of :func:`pixel_diversity` over prompts.

    Args:
        images: [P k, 3, H, W] in 0..1, prompt-major.
        per_prompt: k, at least 2.
    """
    return fmean(map(pixel_diversity, images.split(per_prompt)))


def feature_diversity(features: Tensor) -> float:
    """Mean cosine distance (0: same direction, 2: opposite) between two images of a prompt, over all pairs.

    Args:
        features: [k, d], k at least 2.
    """
    _check(len(features))
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    count = len(unit)
    # The sum over all ordered pairs, without each image paired with itself.
    together = unit.sum(dim=0).square().sum() - unit.square().sum()
    return float(1 - together / (count * (count - 1)))


def pairs(count: int) -> list[tuple[int, int]]:
    """All unordered pairs of ``count`` images."""
    return [(first, second) for first in range(count) for second in range(first + 1, count)]


def _check(count: int) -> None:
    if count < 2:
        raise ValueError(f"diversity needs at least two images of a prompt, got {count}")
