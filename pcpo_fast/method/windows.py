"""The steps that have noise and are trained in an epoch: all, or those in a moving window (MixGRPO).

MixGRPO (Li et al. 2025, arXiv:2507.21802) samples with noise only inside a short window of steps, which moves from the
first step towards the last. Its position is a function of the epoch, so a resumed run needs no saved state.
"""

import math

import torch

from pcpo_fast.config.schema import WindowConfig
from pcpo_fast.config.wording import counted
from pcpo_fast.errors import UserError
from pcpo_fast.method.noise_keys import Purpose, random_key


def window_steps(settings: WindowConfig, trainable: list[int], epoch: int, seed: int) -> list[int]:
    """The steps of an epoch's window, ascending.

    Args:
        settings: the configuration's ``window`` section.
        trainable: steps that may be trained, ascending; the window slides over this list.
        epoch: counted from 0.
        seed: the run's seed, for a random window.

    Returns:
        The steps in the window; all of ``trainable`` without a window.

    Raises:
        UserError: the window is longer than the list, or starts after its last position.
    """
    if settings.size == 0:
        return list(trainable)
    last = len(trainable) - settings.size
    if last < 0:
        raise UserError(
            f"window.size: {counted(settings.size, 'step')} exceed the {len(trainable)} that can be trained "
            f"({', '.join(map(str, trainable))})"
        )
    if settings.start > last:
        raise UserError(
            f"window.start: {settings.start} leaves no room for a window of {settings.size} among "
            f"{counted(len(trainable), 'step')} that can be trained; allowed: 0 to {last}"
        )
    first = _first(settings, last, epoch, seed)
    return trainable[first : first + settings.size]


def _first(settings: WindowConfig, last: int, epoch: int, seed: int) -> int:
    if settings.schedule == "fixed":
        return settings.start
    if settings.schedule == "random":
        generator = torch.Generator().manual_seed(random_key(Purpose.WINDOW, seed, epoch // settings.interval))
        return settings.start + int(torch.randint(last - settings.start + 1, (), generator=generator))
    places = range(settings.start, last + 1, settings.stride)
    lengths = [interval_at(settings, place) for place in places]
    if settings.wrap:
        epoch %= sum(lengths)
    for place, length in zip(places, lengths, strict=True):
        if epoch < length:
            return place
        epoch -= length
    return places[-1]


def interval_at(settings: WindowConfig, place: int) -> int:
    """Number of epochs that a progressive window stays at a position: at least 1, rounded up as in MixGRPO's code."""
    shorter = math.exp(-settings.decay * max(place - settings.decay_after, 0))
    return max(1, math.ceil(settings.interval * shorter))
