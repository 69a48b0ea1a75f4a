"""Bootstrap intervals over prompts: the images of one prompt are alike, so prompts are what is resampled."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pcpo_fast.reporting.statistics import Estimate, tails

_SEED = 20_250  # the same intervals every time


def over_prompts(statistic: Callable[[NDArray[np.int64]], float], prompts: int, count: int, resamples: int) -> Estimate:
    """A statistic of all images and its 95 % interval.

    For a distance the plain percentile interval is wrong: a resampled set repeats images, so its distance is larger
    than that of the set itself by a bias of the same size as the spread. The bootstrap distribution is therefore moved
    so that its mean is the estimate; its width is what is used of it.

    Args:
        statistic: takes the rows of the images that count (with repetition).
        prompts: P; the rows of prompt p are ``p * count`` to ``p * count + count - 1``.
        count: images of a prompt.
        resamples: 0: no interval.
    """
    value = float(statistic(np.arange(prompts * count)))
    if resamples < 1 or prompts < 2:
        return Estimate(value, None, None, prompts)
    generator = np.random.default_rng(_SEED)
    drawn = generator.integers(prompts, size=(resamples, prompts))
    rows = (drawn[:, :, None] * count + np.arange(count)).reshape(resamples, -1)
    found = np.array([statistic(chosen) for chosen in rows])
    low, high = np.quantile(found - found.mean(), tails(prompts))
    return Estimate(value, float(value + low), float(value + high), prompts)
