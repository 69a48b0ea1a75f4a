"""Bootstrap intervals over prompts: images of one prompt are not independent, so whole prompts are resampled."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pcpo_fast.reporting.statistics import Estimate, tails

_SEED = 20_250  # the same intervals every time


def over_prompts(statistic: Callable[[NDArray[np.int64]], float], prompts: int, count: int, resamples: int) -> Estimate:
    """A statistic of all images and its 95 % interval.

    For a distance the plain percentile interval is wrong: a resampled set repeats images, so its distance is biased
    upwards by about as much as the spread. The bootstrap distribution is therefore shifted so that its mean is the
    estimate; only its width is used.

    Args:
        statistic: takes the row numbers of the images to use (with repetition).
        prompts: P; the rows of prompt p are ``p * count`` to ``p * count + count - 1``.
        count: images per prompt.
        resamples: bootstrap resamples; 0: no interval.
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
