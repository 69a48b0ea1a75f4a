"""Curves over epochs: trailing mean, value at an epoch, and when a target is reached."""

import bisect
from dataclasses import dataclass

from pcpo_fast.reporting.series import Series


@dataclass(frozen=True)
class Reached:
    """When a run reached a target.

    Attributes:
        epochs: epochs trained until then; where it never did, the epochs that it was watched for.
        reached: False where `epochs` is therefore only a lower bound (a censored value).
    """

    epochs: float
    reached: bool


def until(curve: Series, epochs: float) -> Series:
    """The points up to and including an epoch."""
    count = bisect.bisect_right(curve.epochs, epochs)
    return Series(curve.epochs[:count], curve.values[:count])


def trailing_mean(curve: Series, window: int) -> Series:
    """Trailing mean: at every epoch, over it and the `window` - 1 epochs before it; fewer at the start of the curve.

    It never uses later epochs.
    """
    values = []
    for i, epoch in enumerate(curve.epochs):
        first = bisect.bisect_right(curve.epochs, epoch - window)
        part = curve.values[first : i + 1]
        values.append(sum(part) / len(part))
    return Series(list(curve.epochs), values)


def last_value(curve: Series, epochs: float) -> float | None:
    """The latest value up to and including an epoch."""
    values = until(curve, epochs).values
    return values[-1] if values else None


def interpolated(curve: Series, epochs: float) -> float | None:
    """The value at an epoch by linear interpolation; None outside the curve."""
    if not curve or not curve.epochs[0] <= epochs <= curve.epochs[-1]:
        return None
    right = bisect.bisect_left(curve.epochs, epochs)
    if curve.epochs[right] == epochs:
        return curve.values[right]
    (x0, x1), (y0, y1) = curve.epochs[right - 1 : right + 1], curve.values[right - 1 : right + 1]
    return y0 + (y1 - y0) * (epochs - x0) / (x1 - x0)


def first_reached(curve: Series, target: float, horizon: float, *, between: bool) -> Reached:
    """The first time that a curve is at or above a target.

    Args:
        curve: rewards; a point at epoch e was made with weights that were trained for e epochs.
        target: the reward to reach.
        horizon: epochs that count; later points are ignored, and a run that has not reached the target by then is
            censored at them.
        between: take the crossing of the straight line between two points (evaluations far apart) instead of the later
            point.
    """
    curve = until(curve, horizon)
    for i, (epoch, value) in enumerate(zip(curve.epochs, curve.values, strict=True)):
        if value >= target:
            if not between or i == 0:
                return Reached(float(epoch), True)
            x, y = curve.epochs[i - 1], curve.values[i - 1]
            return Reached(x + (epoch - x) * (target - y) / (value - y), True)
    return Reached(float(horizon), False)
