"""Choosing the prompts of an epoch."""

import numpy as np


def epoch_prompts(count: int, per_epoch: int, epoch: int, seed: int) -> list[int]:
    """The prompts of an epoch, as indices into a list of ``count`` prompts.

    Epochs read consecutive parts of one endless sequence: a shuffle of all prompts, then another shuffle, and so on.
    Every prompt is therefore used once before any is repeated, even if ``per_epoch`` does not divide ``count`` or is
    larger, and the prompts depend only on seed and epoch.

    Args:
        count: number of prompts to choose from, at least 1.
        per_epoch: prompts per epoch, at least 1.
        epoch: counted from 0.
        seed: not negative.

    Raises:
        ValueError: an argument is out of range.
    """
    if count < 1 or per_epoch < 1 or epoch < 0 or seed < 0:
        raise ValueError(
            "count and per_epoch must be at least 1, epoch and seed at least 0, "
            f"got count={count}, per_epoch={per_epoch}, epoch={epoch}, seed={seed}"
        )
    chosen: list[int] = []
    position = epoch * per_epoch
    while len(chosen) < per_epoch:
        shuffle, start = divmod(position + len(chosen), count)
        order = np.random.default_rng([seed, shuffle]).permutation(count)
        chosen += order[start : start + per_epoch - len(chosen)].tolist()
    return chosen


def trained_prompts(count: int, per_epoch: int, epochs: int, seed: int) -> list[int]:
    """The prompts of some epoch of a run, ascending, with the arguments of :func:`epoch_prompts`."""
    return sorted({index for epoch in range(epochs) for index in epoch_prompts(count, per_epoch, epoch, seed)})
