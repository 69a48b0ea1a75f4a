"""Which steps have noise and are trained in an epoch: all of them, or those of a window that moves (MixGRPO).

MixGRPO (Li et al. 2025, arXiv:2507.21802) samples with noise inside a short window of steps only, and without noise
outside; the window moves from the first step towards the last. Its place is a function of the epoch, so a resumed run
needs to remember nothing.
"""

import math

import torch

from pcpo_fast.config.schema import WindowConfig
from pcpo_fast.errors import UserError
from pcpo_fast.method.noise_keys import Purpose, random_key


def window_steps(settings: WindowConfig, trainable: list[int], epoch: int, seed: int) -> list[int]:
    """The steps of an epoch's window, ascending.

    Args:
        settings: the configuration's ``window`` section.
        trainable: steps that may be trained, ascending; the window slides over this list. All of them without a window.
        epoch: counted from 0.
        seed: the run's, for a window that is drawn.

    Raises:
        UserError: the window is longer than the list, or starts behind its last place.
    """
    if settings.size == 0:
        return list(trainable)
    last = len(trainable) - settings.size
    if last < 0:
        raise UserError(
            f"window.size: {settings.size} steps exceed the {len(trainable)} that can be trained "
            f"({', '.join(map(str, trainable))})"
        )
    if settings.start > last:
        raise UserError(
            f"window.start: {settings.start} leaves no room for a window of {settings.size} among the {len(trainable)} "
            f"steps that can be trained; allowed: 0 to {last}"
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
    lengths = [_interval(settings, place) for place in places]
    if settings.wrap:
        epoch %= sum(lengths)
    for place, length in zip(places, lengths, strict=True):
        if epoch < length:
            return place
        epoch -= length
    return places[-1]


def _interval(settings: WindowConfig, place: int) -> int:
    """Epochs that a progressive window stays at a place: at least one, rounded up as in MixGRPO's code."""
    shorter = math.exp(-settings.decay * max(place - settings.decay_after, 0))
    return max(1, math.ceil(settings.interval * shorter))
