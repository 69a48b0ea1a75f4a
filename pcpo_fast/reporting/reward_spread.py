"""The figure of what each reward has to say in the sum."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pcpo_fast.reporting.plots import EPOCHS
from pcpo_fast.reporting.series import Record, reward_names, series
from pcpo_fast.reporting.style import BLUE, GREEN, ORANGE, PURPLE, epoch_axis, legend, marker, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = (BLUE, ORANGE, GREEN, PURPLE)


def reward_spread_figure(records: Sequence[Record]) -> "Figure | None":
    """Spread of each reward within a group times its weight, over epochs; None where there is one reward."""
    curves = {name: series(records, f"reward_spread/{name}") for name in reward_names(records, "reward_spread/")}
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return None
    figure = new_figure()
    axes = styled(figure.add_subplot(), "Say of each reward in the sum", EPOCHS, "weight × spread", with_legend=True)
    for index, (name, curve) in enumerate(curves.items()):
        style = ("-", "--", ":")[index // len(_COLORS) % 3]
        color = _COLORS[index % len(_COLORS)]
        axes.plot(curve.epochs, curve.values, style, color=color, marker=marker(curve.epochs), label=name)
    axes.set_ylim(bottom=0)
    epochs = [epoch for curve in curves.values() for epoch in curve.epochs]
    epoch_axis(axes, min(epochs), max(epochs))
    legend(axes)
    return figure
