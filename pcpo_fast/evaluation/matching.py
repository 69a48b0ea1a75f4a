"""Each run's distance from the reference at equal reward: the comparison made in the paper."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

Point = tuple[float, float]
"""(reward, distance) at one scale of reward guidance."""


@dataclass(frozen=True)
class Matched:
    """Distances at one level of one reward.

    Attributes:
        reward: name of the reward.
        level: the highest reward that every run reaches.
        distance: key of the distance.
        at: each run's distance at that reward, interpolated linearly between neighbouring scales.
    """

    reward: str
    level: float
    distance: str
    at: dict[str, float]


def match(reward: str, distance: str, curves: Mapping[str, Sequence[Point]]) -> Matched | None:
    """Compare curves at the highest reward that all of them reach.

    Args:
        reward, distance: names.
        curves: each run's points in order of scale, starting with the base model if it was evaluated.

    Returns:
        None for fewer than two curves, or if one of them does not cross the level.
    """
    if len(curves) < 2:
        return None
    level = min(max(point[0] for point in points) for points in curves.values())
    found = {name: _first_at(points, level) for name, points in curves.items()}
    if any(value is None for value in found.values()):
        return None
    return Matched(reward, level, distance, {name: value for name, value in found.items() if value is not None})


def _first_at(points: Sequence[Point], level: float) -> float | None:
    """The distance at which a curve first reaches the reward ``level``; None if it starts above."""
    if points[0][0] == level:
        return points[0][1]
    if points[0][0] > level:
        return None
    for (reward, distance), (next_reward, next_distance) in pairwise(points):
        if next_reward >= level > reward:
            share = (level - reward) / (next_reward - reward)
            return distance + share * (next_distance - distance)
    return None
