"""Which checkpoints stay: the newest, and those with the highest held-out reward."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class RetainedCheckpoint(NamedTuple):
    """A complete checkpoint.

    Attributes:
        path: its folder.
        reward: mean held-out reward of its weights, None where it was not measured.
    """

    path: Path
    reward: float | None


def obsolete(oldest_first: Sequence[RetainedCheckpoint], keep: int, keep_best: int) -> list[Path]:
    """What may go: all but the newest ``keep`` and, of all, the ``keep_best`` with the highest reward.

    Of equal rewards the newer checkpoint counts as better.
    """
    stay = {kept.path for kept in oldest_first[-keep:]}
    measured = [(kept.reward, number) for number, kept in enumerate(oldest_first) if kept.reward is not None]
    best = sorted(measured, reverse=True)[:keep_best]
    stay |= {oldest_first[number].path for _, number in best}
    return [kept.path for kept in oldest_first if kept.path not in stay]
