"""The figure of rewards over the reward guidance scale."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pcpo_fast.config.wording import counted
from pcpo_fast.reporting.style import BASE, TUNED, legend, new_figure, point_label, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ScalePoint(NamedTuple):
    """Scores at one scale.

    Attributes:
        scale: reward guidance scale.
        mean: mean over the images.
        low, high: interval of the mean; None for a single image.
        std: standard deviation over the images; None for a single image.
    """

    scale: float
    mean: float
    low: float | None
    high: float | None
    std: float | None


def scale_figure(rewards: Mapping[str, Sequence[ScalePoint]], images: int) -> "Figure":
    """One plot per reward: mean, its interval as bars, and the standard deviation over images as a band.

    Args:
        rewards: the points of each reward, in any order.
        images: number of images of each mean, for the legend.

    Raises:
        ValueError: there are no rewards or no points.
    """
    if not rewards or not all(rewards.values()):
        raise ValueError("there is nothing to plot")
    figure = new_figure(0.3 + 3.2 * len(rewards), 6.2)
    for place, (name, unsorted) in enumerate(rewards.items(), start=1):
        points = sorted(unsorted)
        axes = styled(
            figure.add_subplot(len(rewards), 1, place), name, "reward guidance scale λ", "score", with_legend=True
        )
        scales, means = [point.scale for point in points], [point.mean for point in points]
        for scale in (0.0, 1.0):
            if scales[0] <= scale <= scales[-1]:
                axes.axvline(scale, color=TUNED if scale else BASE, linewidth=0.9, linestyle=(0, (2, 3)), zorder=0.5)
                point_label(axes, "tuned" if scale else "base", (scale, 0), (4, 4), xycoords=("data", "axes fraction"))
        spread = [point for point in points if point.std is not None]
        if spread:
            axes.fill_between(
                [point.scale for point in spread],
                [point.mean - (point.std or 0.0) for point in spread],
                [point.mean + (point.std or 0.0) for point in spread],
                color=TUNED,
                alpha=0.14,
                linewidth=0,
                label="± 1 std over images",
            )
        label = f"mean of {counted(images, 'image')}"
        axes.plot(scales, means, color=TUNED, linewidth=1.6, marker="o", markersize=4, label=label)
        bars = [(p.scale, p.low, p.high) for p in points if p.low is not None and p.high is not None]
        if bars:
            axes.vlines(*zip(*bars, strict=True), color=TUNED, linewidth=1.6, label="95 % interval of the mean")
        legend(axes)
    return figure
