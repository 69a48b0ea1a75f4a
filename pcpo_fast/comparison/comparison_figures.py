"""The figures of a comparison, in the style of a run's report. A colour stands for the same variant in all of them."""

from collections.abc import Callable, Mapping
from statistics import median_high
from typing import TYPE_CHECKING, Any

import numpy as np

from pcpo_fast.comparison.analysis import Comparison
from pcpo_fast.comparison.comparison_tables import epochs_text
from pcpo_fast.comparison.curves import until
from pcpo_fast.comparison.measures import (
    EPOCHS_TO_TARGET,
    SPIKE,
    clip_by_step,
    compute_spent,
    norms_after_warm_up,
    smoothed_reward,
    timed,
)
from pcpo_fast.comparison.reading import RunCurves
from pcpo_fast.config.wording import counted
from pcpo_fast.reporting.series import Series
from pcpo_fast.reporting.statistics import mean_curve
from pcpo_fast.reporting.style import (
    GRID,
    INK,
    SOFT,
    credit_color,
    distinct_looks,
    epoch_axis,
    legend,
    marker,
    new_figure,
    percent,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = Callable[[RunCurves], Series]

# How many letters fit into a row over a whole figure, and how many the mark of an entry takes.
_LETTERS, _HANDLE = 120, 7


def comparison_figures(result: Comparison) -> dict[str, "Figure"]:
    """All figures that there are numbers for, by file name without its ending."""
    makers: Mapping[str, Callable[[Comparison], Figure | None]] = {
        "reward": reward_figure,
        "compute": compute_figure,
        "epochs_to_target": target_figure,
        "clip_fraction": clip_figure,
        "gradient_norm": gradient_figure,
    }
    made = {name: maker(result) for name, maker in makers.items()}
    return {name: figure for name, figure in made.items() if figure is not None}


def reward_figure(result: Comparison) -> "Figure | None":
    """Reward over epochs: every seed thin, the mean thick, its interval as a band; training, and held-out if any."""
    reading = result.reading
    training, heldout = f"Training reward, mean over {counted(reading.smoothing, 'epoch')}", "Held-out reward"
    curves: dict[str, Curve] = {
        training: lambda run: smoothed_reward(run, reading),
        heldout: lambda run: until(run.heldout, reading.horizon),
    }
    figure = _curves_figure(result, curves, "epochs trained", "mean reward", 3.7)
    if figure is None:
        return None
    for axes in figure.axes:
        epoch_axis(axes, 0, reading.horizon)
        timed_here = axes.get_title(loc="left") == (heldout if reading.metric == "heldout" else training)
        if reading.target is not None and timed_here:
            axes.axhline(reading.target, color=SOFT, linewidth=1, linestyle=(0, (2, 2)), label="target", zorder=1)
    _legend(figure)
    return figure


def compute_figure(result: Comparison) -> "Figure | None":
    """Held-out reward over compute, as far as all runs have spent: what ``heldout_area`` is the area of."""
    reading = result.reading
    if reading.compute is None:
        return None
    grid = np.linspace(0, reading.compute, 61)

    def curve(run: RunCurves) -> Series:
        spent, held = compute_spent(run, reading.costs), until(run.heldout, run.epochs)
        if not spent or not held:
            return Series([], [])
        values = np.interp(grid, [spent[epoch] for epoch in held.epochs], held.values)
        return Series((grid / 1000).tolist(), values.tolist())

    title = "Held-out reward over compute"
    figure = _curves_figure(result, {title: curve}, "thousand forward passes of an image", "mean reward", 3.3)
    if figure is not None:
        _legend(figure)
    return figure


def _curves_figure(result: Comparison, curves: Mapping[str, Curve], x: str, y: str, height: float) -> "Figure | None":
    """A plot for each title whose curve at least one run has: the seeds, and their mean; None without any."""
    found = {
        title: [[found for run in variant.runs if (found := curve(run))] for variant in result.variants]
        for title, curve in curves.items()
    }
    found = {title: groups for title, groups in found.items() if any(groups)}
    if not found:
        return None
    figure = new_figure(height)
    for place, (title, groups) in enumerate(found.items(), start=1):
        axes = styled(figure.add_subplot(1, len(found), place), title, x, y, with_legend=True)
        for variant, group, look in zip(result.variants, groups, _looks(result), strict=True):
            if group:
                _draw(axes, group, look, variant.name)
    return figure


def _draw(axes: "Axes", curves: list[Series], look: tuple[str, str], name: str) -> None:
    colour, line = look
    if len(curves) > 1:
        for curve in curves:
            axes.plot(curve.epochs, curve.values, color=colour, linewidth=0.7, alpha=0.35, linestyle=line)
    common = sorted(set.intersection(*(set(curve.epochs) for curve in curves)))
    if not common:
        return
    mean, low, high = mean_curve([[curve.by_epoch()[epoch] for epoch in common] for curve in curves])
    if low is not None and high is not None and len(curves) > 2:
        axes.fill_between(common, low, high, color=colour, alpha=0.15, linewidth=0)
    dots = marker(common)
    axes.plot(common, mean, color=colour, linewidth=2, linestyle=line, marker=dots, markersize=3.5, label=name)


def target_figure(result: Comparison) -> "Figure | None":
    """Epochs to the target: a dot per seed (hollow where it was not reached), the mean and its interval."""
    timed_ones = zip(result.variants, _looks(result), strict=True)
    shown = [one for one in timed_ones if EPOCHS_TO_TARGET.key in one[0].means]
    if not shown:
        return None
    reading = result.reading
    figure = new_figure(1.25 + 0.5 * len(shown))
    which = "held-out" if reading.metric == "heldout" else "training"
    title = f"Epochs until the {which} reward reaches {reading.target:.4g}"
    axes = styled(figure.add_subplot(), title, "epochs trained", "")
    for row, (variant, (colour, _)) in enumerate(shown):
        times = [time for run in variant.runs if (time := timed(run, reading)) is not None]
        offsets = [0.0] if len(times) == 1 else [0.18 - 0.36 * i / (len(times) - 1) for i in range(len(times))]
        for time, offset in zip(times, offsets, strict=True):
            face = colour if time.reached else "none"
            axes.scatter(time.epochs, row + offset, s=16, facecolors=face, edgecolors=colour, alpha=0.55, linewidths=1)
        mean = variant.means[EPOCHS_TO_TARGET.key]
        if mean.low is not None and mean.high is not None and variant.reached:
            axes.plot([mean.low, mean.high], [row, row], color=colour, linewidth=2.4, solid_capstyle="butt")
        axes.plot([mean.value] * 2, [row - 0.24, row + 0.24], color=colour, linewidth=2.6)
        text = epochs_text(variant)
        axes.text(1.01, row, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8.5, color=INK)
    axes.axvline(reading.horizon, color=SOFT, linewidth=0.8, linestyle=(0, (2, 2)))
    axes.set_yticks(range(len(shown)), [variant.name for variant, _ in shown], color=INK)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.grid(True, axis="x", color=GRID, linewidth=0.8)
    epoch_axis(axes, 0, reading.horizon)
    if any(variant.reached is not None and variant.reached < len(variant.runs) for variant, _ in shown):
        axes.set_xlabel(f"epochs trained (hollow: not reached within {reading.horizon})")
    return figure


def clip_figure(result: Comparison) -> "Figure | None":
    """Clip fraction of each sampler step, mean over epochs: every seed thin, the mean thick with its interval."""
    from matplotlib.ticker import MaxNLocator

    def curve(run: RunCurves) -> Series:
        steps = clip_by_step(run, result.reading)
        return Series(list(steps), list(steps.values()))

    title = "Clip fraction per sampler step, mean over epochs"
    figure = _curves_figure(result, {title: curve}, "step (0 = noise)", "share clipped", 3.3)
    if figure is None:
        return None
    (axes,) = figure.axes
    percent(axes.yaxis)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    _legend(figure)
    return figure


def gradient_figure(result: Comparison) -> "Figure | None":
    """How gradient norms are spread: the share of updates above each multiple of their run's median, both axes log."""
    from matplotlib.ticker import FuncFormatter

    figure, top = new_figure(3.3), 0.0
    title, x = "Spread of the gradient norm over updates", "gradient norm / median of its run"
    axes = styled(figure.add_subplot(), title, x, "share of updates above", with_legend=True)
    for variant, (colour, line) in zip(result.variants, _looks(result), strict=True):
        pooled: list[float] = []
        for run in variant.runs:
            norms = norms_after_warm_up(run, result.reading)
            middle = median_high(norms) if norms else 0.0
            pooled += [norm / middle for norm in norms] if middle > 0 else []
        if pooled:
            pooled.sort()
            above = [1 - i / len(pooled) for i in range(len(pooled))]
            axes.step(pooled, above, where="pre", color=colour, linewidth=1.8, linestyle=line, label=variant.name)
            top = max(top, pooled[-1])
    if not top:
        return None
    axes.axvline(SPIKE, color=SOFT, linewidth=1, linestyle=(0, (2, 2)), label=f"spike: above {SPIKE:g}")
    axes.set_yscale("log")
    axes.set_xscale("log")
    ticks = [tick for tick in (0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5, 10, 20, 50, 100, 1000) if tick <= 1.5 * max(top, SPIKE)]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlim(right=1.15 * max(top, SPIKE))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.3g}"))
    _legend(figure)
    return figure


def _looks(result: Comparison) -> list[tuple[str, str]]:
    """Colour and line style of every variant."""
    return distinct_looks([credit_color(v.runs[0].config) if v.runs else None for v in result.variants])


def _legend(figure: "Figure") -> None:
    """A row above each of the axes where the names fit there, or else one column beside them."""
    labels = [axes.get_legend_handles_labels()[1] for axes in figure.axes]
    room = _LETTERS / len(labels)
    if all(sum(len(label) + _HANDLE for label in row) <= room for row in labels):
        for axes in figure.axes:
            legend(axes)
        return
    entries = {}
    for axes in figure.axes:
        entries.update({label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)})
    look: dict[str, Any] = {"frameon": False, "fontsize": 8.5, "labelcolor": INK, "handlelength": 1.4}
    figure.legend(list(entries.values()), list(entries), loc="outside right upper", **look)
