"""The style of all figures: one colour per meaning, safe for the colour-blind; thin axes, a light grid; no pyplot."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pcpo_fast.config.sampler_registry import SAMPLERS

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from pcpo_fast.config.schema import Config

# Okabe and Ito's palette, "Color Universal Design" (2008), slightly darkened for legibility on white. A colour stands
# for the same thing in every figure, page and document.
PROPORTIONATE = "#0072b2"  # blue
NATIVE = "#d55e00"  # orange
STEPWISE = "#009e73"  # green
TUNED = "#aa4a8a"  # purple: the policy on held-out prompts, and images of a tuned model
BASE = "#7d8491"  # grey: the model before training
OTHERS = ("#a87900", "#3f4b8c", "#7a5230", "#20242c")  # whatever a single figure tells apart

INK = "#20242c"
SOFT = "#606773"
GRID = "#e3e6eb"
PAPER = "#ffffff"
MISSING = "#eceef2"

# Each colour's counterpart on a dark page; charts follow the reader's light or dark setting.
DARK = {
    PROPORTIONATE: "#58b1ee",
    NATIVE: "#f0904e",
    STEPWISE: "#3cc9a0",
    TUNED: "#dd8fc4",
    BASE: "#9aa3b2",
    **dict(zip(OTHERS, ("#e0b84a", "#a3b0f2", "#cf9f77", "#e6e9ef"), strict=True)),
    SOFT: "#9aa3b2",
    GRID: "#2c323d",
    PAPER: "#181b21",
    MISSING: "#242932",
}

WIDTH = 10.2  # inches; the width of the report
HEIGHT = 3.0


def credit_color(config: "Config | None") -> str | None:
    """The colour of a run's credit; None if it has none."""
    if config is None:
        return None
    if config.advantage.steps != "final":
        return STEPWISE
    if config.credit.rule == "uniform" and SAMPLERS[config.sampler.name].kind == "diffusion":
        return PROPORTIONATE  # there steps cover equal times
    return {"native": NATIVE, "proportionate": PROPORTIONATE}.get(config.credit.rule)


def distinct_looks(meant: Sequence[str | None]) -> list[tuple[str, str]]:
    """A colour and a line style for each of several curves, no two alike.

    A curve gets the colour that it is `meant` to have, unless an earlier one has it; then it gets the next of `OTHERS`.
    """
    others = itertools.cycle((color, line) for line in ("-", "--", ":", "-.") for color in OTHERS)
    looks: list[tuple[str, str]] = []
    for color in meant:
        looks.append(next(others) if color is None or (color, "-") in looks else (color, "-"))
    return looks


def css_color(color: str) -> str:
    """A colour as a page should write it: the variable of a colour of this module, of which the page has two values."""
    return f"var({_variable(color)})" if color in DARK else color


def color_variables(dark: bool) -> str:
    """CSS declarations of all colours, for a light or a dark page."""
    return " ".join(f"{_variable(light)}: {deep if dark else light};" for light, deep in DARK.items())


def _variable(color: str) -> str:
    return f"--plot-{color.lstrip('#')}"


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
