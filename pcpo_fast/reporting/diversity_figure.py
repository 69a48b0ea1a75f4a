"""The figure of collapse: how different the images of a prompt are, and how far they have moved from the base."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pcpo_fast.reporting.plots import EPOCHS
from pcpo_fast.reporting.series import Record, series
from pcpo_fast.reporting.style import BLUE, ORANGE, epoch_axis, legend, marker, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CURVES = (
    ("heldout/diversity", "between images of a prompt (diversity)", BLUE, "-"),
    ("heldout/base_distance", "to the image before the training", ORANGE, "--"),
)


def diversity_figure(records: Sequence[Record]) -> "Figure | None":
    """Held-out diversity and distance to the base model over epochs; None where neither was measured."""
    curves = [(series(records, name), label, color, style) for name, label, color, style in _CURVES]
    curves = [curve for curve in curves if curve[0]]
    if not curves:
        return None
    figure = new_figure()
    axes = styled(figure.add_subplot(), "Distances of held-out images", EPOCHS, "RMS over pixels", with_legend=True)
    for curve, label, color, style in curves:
        axes.plot(curve.epochs, curve.values, style, color=color, marker=marker(curve.epochs), label=label)
    axes.set_ylim(bottom=0)
    epochs = [epoch for curve, *_ in curves for epoch in curve.epochs]
    epoch_axis(axes, min(epochs), max(epochs))
    legend(axes)
    return figure
