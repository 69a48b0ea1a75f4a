"""The common style of all figures: a colour-blind safe palette, thin axes, a light grid; no pyplot."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's palette, "Color Universal Design" (2008), slightly darkened for legibility on white.
BLUE = "#0072b2"
ORANGE = "#d55e00"
GREEN = "#009e73"
PURPLE = "#aa4a8a"
INK = "#20242c"
SOFT = "#606773"
GRID = "#e3e6eb"
PAPER = "#ffffff"
MISSING = "#eceef2"

# Each colour's counterpart on a dark page; figures in the report follow the reader's light or dark setting.
DARK = {
    BLUE: "#58b1ee",
    ORANGE: "#f0904e",
    GREEN: "#3cc9a0",
    PURPLE: "#dd8fc4",
    INK: "#e6e9ef",
    SOFT: "#9aa3b2",
    GRID: "#2c323d",
    PAPER: "#181b21",
    MISSING: "#242932",
}

WIDTH = 10.2  # inches; the width of the report
HEIGHT = 3.0


def new_figure(height: float = HEIGHT, width: float = WIDTH) -> "Figure":
    """An empty figure, size in inches, without pyplot (no global state, safe in threads and servers)."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)


def styled(axes: "Axes", title: str, x: str, y: str, *, with_legend: bool = False) -> "Axes":
    """Set title (left), labels, grid and colours of axes; `with_legend` leaves room for `legend`."""
    axes.set_facecolor(PAPER)
    # Titles may be names from a user's config, in which a dollar sign does not start mathematics.
    pad = 26 if with_legend else 10
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=pad, parse_math=False)
    axes.set_xlabel(x, fontsize=9, color=SOFT)
    axes.set_ylabel(y, fontsize=9, color=SOFT)
    axes.tick_params(which="both", colors=SOFT, labelsize=8.5, length=0)
    axes.grid(True, axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)
    axes.spines["bottom"].set_linewidth(0.8)
    return axes


def epoch_axis(axes: "Axes", first: float, last: float) -> None:
    """Set up an x axis with integer epochs and narrow margins."""
    from matplotlib.ticker import MaxNLocator

    room = max(0.5, 0.02 * (last - first))
    axes.set_xlim(first - room, last + room)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))


def point_label(axes: "Axes", text: str, point: tuple[float, float], offset: tuple[float, float], **look: Any) -> None:
    """Write a small label next to a data point; `offset` in points, `look` are arguments of ``Axes.annotate``."""
    arguments: dict[str, Any] = {"fontsize": 8, "color": SOFT} | look
    axes.annotate(text, point, xytext=offset, textcoords="offset points", **arguments)


def percent(axis: "Axis") -> None:
    """Format the shares on an axis as percentages."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0))


def legend(axes: "Axes", extra: "Sequence[Artist]" = ()) -> None:
    """Add a one-row legend between title and axes, where it covers no data; `extra` entries come last."""
    entries = [*axes.get_legend_handles_labels()[0], *extra]
    if not entries:
        return
    axes.legend(
        handles=entries,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=len(entries),
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        borderaxespad=0.1,
        borderpad=0.2,
        handlelength=1.4,
        columnspacing=1.6,
    )


def marker(points: Sequence[float], always: bool = False) -> str:
    """The marker style: dots for at most 12 points, otherwise none unless ``always``."""
    return "o" if always or len(points) <= 12 else ""
