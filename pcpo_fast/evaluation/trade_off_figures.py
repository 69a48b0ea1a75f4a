"""Figures of an evaluation: every number with its interval, and reward against distance."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pcpo_fast.evaluation.candidates import Candidate
from pcpo_fast.evaluation.matching import Point
from pcpo_fast.evaluation.metrics import MetricColumn
from pcpo_fast.evaluation.result import Evaluation, RewardColumn
from pcpo_fast.reporting.statistics import Estimate
from pcpo_fast.reporting.style import (
    BASE,
    GRID,
    TUNED,
    credit_color,
    distinct_looks,
    legend,
    new_figure,
    point_label,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = ("o", "s", "^", "D", "v")


def curves(candidates: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    """Candidates by family in order of scale; a run's curve starts at the base model if that was evaluated."""
    base = [one for one in candidates if one.kind == "base"]
    found: dict[str, list[Candidate]] = {}
    for one in candidates:
        if one.kind != "base":
            found.setdefault(one.family, []).append(one)
    for family, members in found.items():
        ordered = sorted(members, key=lambda one: one.scale)
        runs = all(one.kind == "run" for one in members)
        found[family] = [*base[:1], *ordered] if runs and min(one.scale for one in members) > 0 else ordered
    return found


def points(members: Sequence[Candidate], reward: RewardColumn, column: MetricColumn) -> list[Point]:
    """(reward, distance) of each candidate."""
    return [(reward.estimate(one.name).value, column.estimates[one.name].value) for one in members]


def _colours(result: Evaluation) -> dict[str, str]:
    """A colour for each family of candidates: that of its credit, or of a tuned model if it is the only one."""
    families = curves(result.candidates)
    meant = [TUNED if len(families) == 1 else credit_color(members[-1].config) for members in families.values()]
    looks = dict(zip(families, distinct_looks(meant), strict=True))
    return {one.family: BASE if one.kind == "base" else looks[one.family][0] for one in result.candidates}


def overview_figure(result: Evaluation) -> "Figure | None":
    """A panel for each reward and metric: the value of every candidate, and its 95 % interval; None without any."""
    panels = [(column.heading, {name: column.estimate(name) for name in result.names}) for column in result.rewards]
    panels += [(column.heading, column.estimates) for column in result.columns]
    if not panels:
        return None
    colours, figure = _colours(result), new_figure(1.4 + 0.32 * len(result.names), 3.4 * len(panels))
    for place, (title, estimates) in enumerate(panels, start=1):
        axes = styled(figure.add_subplot(1, len(panels), place), title, "mean [95 % interval]", "")
        for row, one in enumerate(result.candidates):
            estimate, colour = estimates[one.name], colours[one.family]
            if estimate.low is not None and estimate.high is not None:
                axes.hlines(row, estimate.low, estimate.high, color=colour, linewidth=1.6)
            axes.scatter([estimate.value], [row], s=28, color=colour)
        axes.set_yticks(range(len(result.names)), result.names)
        axes.set_ylim(len(result.names) - 0.5, -0.5)
        axes.grid(False, axis="y")
        axes.grid(True, axis="x", color=GRID, linewidth=0.8)
    return figure


def trade_off_figure(result: Evaluation) -> "Figure | None":
    """Reward over distance, one panel per pair of a reward and a distance; None without either."""
    distances = [column for column in result.columns if column.kind == "distance"]
    if not distances or not result.rewards:
        return None
    rows, columns = len(result.rewards), len(distances)
    figure = new_figure(0.3 + 3.6 * rows, 5.6 * columns if columns > 1 else 7.4)
    for row, reward in enumerate(result.rewards):
        for place, column in enumerate(distances):
            axes = styled(
                figure.add_subplot(rows, columns, row * columns + place + 1),
                f"{reward.name} against {column.label}",
                f"{column.label} to {result.reference} (lower is closer)",
                reward.name,
                with_legend=True,
            )
            axes.grid(True, axis="x", alpha=0.5)
            _panel(axes, result, reward, column)
            legend(axes)
    return figure


def _panel(axes: "Axes", result: Evaluation, reward: RewardColumn, column: MetricColumn) -> None:
    base = next((one for one in result.candidates if one.kind == "base"), None)
    if base is not None:
        _dot(axes, reward.estimate(base.name), column.estimates[base.name], BASE, "*", base.name)
    colours = _colours(result)
    for number, (family, members) in enumerate(curves(result.candidates).items()):
        colour, marker = colours[family], _MARKERS[number % len(_MARKERS)]
        if len(members) > 1:
            ys, xs = zip(*points(members, reward, column), strict=True)
            axes.plot(xs, ys, color=colour, linewidth=1.2, alpha=0.6)
        own = [one for one in members if one is not base]
        for index, one in enumerate(own):
            x = column.estimates[one.name]
            y = reward.estimate(one.name)
            _dot(axes, y, x, colour, marker, family if index == 0 else None)
            if len(own) > 1:
                point_label(axes, f"{one.scale:g}", (x.value, y.value), (6, -10))


def _dot(axes: "Axes", y: Estimate, x: Estimate, colour: str, marker: str, label: str | None) -> None:
    if y.low is not None and y.high is not None:
        axes.vlines(x.value, y.low, y.high, color=colour, linewidth=1, alpha=0.7)
    if x.low is not None and x.high is not None:
        axes.hlines(y.value, x.low, x.high, color=colour, linewidth=1, alpha=0.7)
    size = 10 if marker == "*" else 6
    axes.plot([x.value], [y.value], color=colour, marker=marker, markersize=size, linestyle="", label=label)
