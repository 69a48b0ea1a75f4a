"""The figures of a training run. Each function takes plain numbers and returns a matplotlib Figure; None without data.

Save a figure with `save_figure`, or put it on a page with `pcpo_fast.reporting.charts.charts`.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcpo_fast.config.wording import counted
from pcpo_fast.files.atomic import write_atomically
from pcpo_fast.reporting.metrics_file import Record
from pcpo_fast.reporting.series import Series, reward_names, series, skipped_updates, step_series, update_values
from pcpo_fast.reporting.style import (
    BASE,
    GRID,
    MISSING,
    NATIVE,
    OTHERS,
    PROPORTIONATE,
    SOFT,
    STEPWISE,
    TUNED,
    WIDTH,
    epoch_axis,
    legend,
    marker,
    new_figure,
    percent,
    point_label,
    styled,
)
from pcpo_fast.reporting.tables import fixed_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EPOCHS = "epochs trained"
_PHASES = tuple(
    (f"time/{phase}", phase, color) for phase, color in zip(("rollout", "reward", "update"), OTHERS, strict=False)
)
_ROLLOUTS, _SINGLE = OTHERS[:2]  # colours of the rollouts, and of a curve that is alone
_MOST_LEVELS = 4


def save_figure(figure: "Figure", path: Path | str, dpi: int = 160) -> None:
    """Write a figure as PNG, atomically. Raises ValueError if the file name does not end in .png."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"a figure is written as PNG, so the file name must end in .png: {path.name!r}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    write_atomically(path, buffer.getvalue())


def mean_reward_figure(records: Sequence[Record]) -> "Figure | None":
    """Mean reward of the rollouts with a band of one standard deviation, and mean reward on held-out prompts."""
    train, heldout = series(records, "reward/mean"), series(records, "heldout/reward/mean")
    if not train and not heldout:
        return None
    figure = new_figure(3.3)
    axes = styled(figure.add_subplot(), "Mean reward of an epoch", EPOCHS, "mean reward", with_legend=True)
    std = series(records, "reward/std").by_epoch()
    epochs = [epoch for epoch in train.epochs if epoch in std]
    if epochs:
        mean, label = train.by_epoch(), "± 1 std over the images of an epoch"
        low, high = ([mean[epoch] + sign * std[epoch] for epoch in epochs] for sign in (-1, 1))
        axes.fill_between(epochs, low, high, color=_ROLLOUTS, alpha=0.16, linewidth=0, label=label)
    if train:
        look: dict[str, Any] = {"color": _ROLLOUTS, "linewidth": 1.6, "marker": marker(train.epochs)}
        axes.plot(train.epochs, train.values, label="rollouts", **look)
    if heldout:
        label = "held-out prompts and seeds"
        axes.plot(heldout.epochs, heldout.values, color=TUNED, linewidth=2, marker="o", markersize=4, label=label)
        rises = len(heldout.values) > 1 and heldout.values[1] > heldout.values[0]  # away from a label below it
        for epoch, value in dict.fromkeys([heldout.points()[0], heldout.points()[-1]]):
            look = {
                "ha": "left" if epoch == heldout.epochs[0] else "right",
                "fontsize": 8.5,
                "color": TUNED,
                "fontweight": "bold",
            }
            above = 7 if epoch > heldout.epochs[0] or not rises else -14
            point_label(axes, fixed_text(value), (epoch, value), (0, above), **look)
        if heldout.epochs[0] == 0:
            axes.axhline(
                heldout.values[0], color=BASE, linewidth=1.2, linestyle="--", label="held-out, before training"
            )
    _span(axes, train, heldout)
    legend(axes)
    return figure


def reward_parts_figure(records: Sequence[Record]) -> "Figure | None":
    """One small plot per named reward, rollouts and held-out; None unless there are at least two rewards."""
    names = dict.fromkeys([*reward_names(records, "reward/"), *reward_names(records, "heldout/reward/")])
    curves = {name: (series(records, f"reward/{name}"), series(records, f"heldout/reward/{name}")) for name in names}
    curves = {name: pair for name, pair in curves.items() if pair[0] or pair[1]}
    if len(curves) < 2:
        return None
    columns = min(3, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = new_figure(0.2 + 2.3 * rows)
    for i, (name, (train, heldout)) in enumerate(curves.items(), start=1):
        axes = styled(figure.add_subplot(rows, columns, i), name, EPOCHS, "mean score")
        axes.plot(train.epochs, train.values, color=_ROLLOUTS, linewidth=1.4, marker=marker(train.epochs))
        axes.plot(heldout.epochs, heldout.values, color=TUNED, linewidth=1.8, marker="o", markersize=3)
        _span(axes, train, heldout)
    return figure


def reward_spread_figure(records: Sequence[Record]) -> "Figure | None":
    """Each reward's spread within a group times its weight, over epochs; None with a single reward."""
    names = reward_names(records, "reward_spread/")
    looks = [(OTHERS[i % len(OTHERS)], ("-", "--", ":")[i // len(OTHERS) % 3]) for i in range(len(names))]
    curves = [(series(records, f"reward_spread/{name}"), name, *look) for name, look in zip(names, looks, strict=True)]
    return _lines_figure(curves, "Influence of each reward on the sum", "weight × spread")


def diversity_figure(records: Sequence[Record]) -> "Figure | None":
    """Held-out diversity and distance to the base model over epochs; None if neither was measured."""
    curves = [
        (series(records, "heldout/diversity"), "between images of the same prompt (diversity)", TUNED, "-"),
        (series(records, "heldout/base_distance"), "to the image before training", BASE, "--"),
    ]
    return _lines_figure(curves, "Distances of held-out images", "RMS over pixels")


def _lines_figure(curves: Sequence[tuple[Series, str, str, str]], title: str, y: str) -> "Figure | None":
    """Plot curves with their labels, colours and line styles on an axis that starts at 0; None if all are empty."""
    curves = [curve for curve in curves if curve[0]]
    if not curves:
        return None
    figure = new_figure()
    axes = styled(figure.add_subplot(), title, EPOCHS, y, with_legend=True)
    for curve, label, colour, line in curves:
        axes.plot(curve.epochs, curve.values, line, color=colour, marker=marker(curve.epochs), label=label)
    axes.set_ylim(bottom=0)
    _span(axes, *(curve for curve, *_ in curves))
    legend(axes)
    return figure


def clip_fraction_figure(records: Sequence[Record]) -> "Figure | None":
    """Heat map of the share of clipped images per step and epoch, next to each step's mean over epochs."""
    steps = step_series(records, "policy/clip_fraction")
    mean = series(records, "policy/clip_fraction")
    if not steps and not mean:
        return None
    if not steps:
        figure = new_figure()
        axes = styled(figure.add_subplot(), "Clip fraction", EPOCHS, "share of clipped images")
        axes.plot(mean.epochs, mean.values, color=_SINGLE, linewidth=1.6, marker=marker(mean.epochs))
        axes.set_ylim(bottom=0)
        percent(axes.yaxis)
        _span(axes, mean)
        return figure
    figure = new_figure(max(2.8, min(5.2, 1.3 + 0.16 * (max(steps) + 1))))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
    # The colour scale covers at least 5 %, so that a run with little clipping looks that way.
    bar = _step_map(figure, left, steps, "Clip fraction per step", 0.05)
    percent(bar.yaxis)

    styled(right, "Mean over epochs", "share of clipped images", "")
    means = [sum(curve.values) / len(curve.values) for curve in steps.values()]
    right.barh(list(steps), means, color=_SINGLE, height=0.72)
    right.grid(False, axis="y")
    right.grid(True, axis="x", color=GRID, linewidth=0.8)
    right.set_xlim(0, max(0.05, 1.05 * max(means)))
    percent(right.xaxis)
    right.tick_params(labelleft=False)
    return figure


def stepwise_figure(records: Sequence[Record]) -> "Figure | None":
    """Gain of each step per epoch, and how well its predictions agree with the result; None without per-step credit."""
    gains = step_series(records, "stepwise/gain")
    if not gains:
        return None
    figure = new_figure(max(2.8, min(5.2, 1.3 + 0.16 * (max(gains) + 1))))
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    _step_map(figure, left, gains, "Gain of each step", 0.1)
    styled(right, "Quality of its prediction", "step (0 = noise)", "", with_legend=True)
    for name, label, colour in (
        ("correlation", "correlation", OTHERS[0]),
        ("beta", "slope", OTHERS[1]),
        ("branch_slope", "slope from branches", OTHERS[2]),
    ):
        latest = {step: _last_quarter(curve) for step, curve in step_series(records, f"stepwise/{name}").items()}
        means = [sum(values) / len(values) for values in latest.values()]
        if means:
            right.plot(list(latest), means, color=colour, marker="o", markersize=4, linewidth=1.5, label=label)
    right.set_ylim(bottom=min(0.0, right.get_ylim()[0]))
    legend(right)
    return figure


def predictions_figure(records: Sequence[Record]) -> "Figure | None":
    """Rewards of some steps' predictions beside those of the images, and the size of each step's credit."""
    from matplotlib import colormaps

    levels = sorted(step_series(records, "stepwise/predicted_reward").items())
    if not levels:
        return None
    figure = new_figure(3.3)
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    styled(left, "Rewards of predictions", EPOCHS, "mean reward", with_legend=True)
    most = min(_MOST_LEVELS, len(levels))
    chosen = [levels[round(i * (len(levels) - 1) / max(1, most - 1))] for i in range(most)]
    for place, (step, curve) in enumerate(chosen):
        colour = colormaps["Blues"](0.4 + 0.5 * place / max(1, most - 1))
        look: dict[str, Any] = {"color": colour, "linewidth": 1.2, "marker": marker(curve.epochs)}
        left.plot(curve.epochs, curve.values, label=f"step {step}", **look)
    train, heldout = series(records, "reward/mean"), series(records, "heldout/reward/mean")
    left.plot(train.epochs, train.values, color=_ROLLOUTS, linewidth=1.6, marker=marker(train.epochs), label="images")
    left.plot(heldout.epochs, heldout.values, color=TUNED, linewidth=2, marker="o", markersize=4, label="held-out")
    _span(left, *(curve for _, curve in chosen), train, heldout)
    legend(left)

    styled(right, "Size of each step's credit", "step (0 = noise)", "of the final advantages' size", with_legend=True)
    sizes = sorted(step_series(records, "stepwise/left").items())
    means = [sum(late) / len(late) for late in (_last_quarter(curve) for _, curve in sizes)]
    right.plot([step for step, _ in sizes], means, color=_SINGLE, marker="o", markersize=4, linewidth=1.5)
    right.axhline(1, color=SOFT, linewidth=0.8)
    right.set_ylim(bottom=0)
    return figure


def _last_quarter(curve: Series) -> Sequence[float]:
    """The values of the last quarter of the epochs, since predictions and policy change during training."""
    return curve.values[-max(1, len(curve.values) // 4) :]


def gain_correlation_figure(steps: Sequence[int], correlations: Sequence[Sequence[float | None]]) -> "Figure":
    """The correlation of every two steps' gains as a map from -1 to 1; `correlations` is [S, S], None: not known."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    table = np.array(correlations, dtype=float)
    figure = new_figure(max(2.8, min(5.2, 1.3 + 0.16 * len(steps))))
    axes = figure.subplots()
    styled(axes, "Correlation of the gains of two steps", "step (0 = noise)", "step")
    palette = colormaps["RdBu"].with_extremes(bad=MISSING)
    picture = axes.imshow(table, cmap=palette, vmin=-1, vmax=1, interpolation="nearest", origin="upper")
    axes.grid(False)
    named = FuncFormatter(lambda place, _: str(steps[int(place)]) if 0 <= place < len(steps) else "")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=12, integer=True))
        axis.set_major_formatter(named)
    _color_bar(figure, picture, axes)
    return figure


def _step_map(figure: "Figure", axes: "Axes", steps: dict[int, Series], title: str, least: float) -> "Axes":
    """Draw a heat map of a metric over steps and epochs. Returns the colour bar.

    The scale ends at `least` or above, so that small values look small, and leaves out the first tenth of the epochs
    and the highest hundredth of the rest: early and rare values may be far larger, and would flatten all others.
    """
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    first = min(curve.epochs[0] for curve in steps.values())
    last = max(curve.epochs[-1] for curve in steps.values())
    rows = max(steps) + 1
    table = np.full((rows, last - first + 1), np.nan)
    for step, curve in steps.items():
        table[step, [epoch - first for epoch in curve.epochs]] = curve.values
    styled(axes, title, "epoch", "step (0 = noise)")
    palette = colormaps["cividis"].with_extremes(bad=MISSING)
    late = table[:, table.shape[1] // 10 + (table.shape[1] > 2) :]
    top = max(least, float(np.nanquantile(late, 0.99)))
    extent = (first - 0.5, last + 0.5, rows - 0.5, -0.5)
    picture = axes.imshow(
        table, cmap=palette, vmin=0, vmax=top, aspect="auto", extent=extent, interpolation="nearest", origin="upper"
    )
    axes.grid(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    return _color_bar(figure, picture, axes)


def _color_bar(figure: "Figure", picture: Any, axes: "Axes") -> "Axes":
    bar = figure.colorbar(picture, ax=axes, pad=0.015, aspect=30)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(colors=SOFT, labelsize=8, length=0)
    return bar.ax


def credit_figure(
    times: Sequence[float],
    native: Sequence[float],
    proportionate: Sequence[float],
    zeta: float,
    title: str,
    *,
    trained_steps: Sequence[int] | None = None,
    used: Sequence[float] | None = None,
    used_label: str = "used in this run",
) -> "Figure":
    """Native and proportionate credit of every step, side by side, and below per unit of time.

    `times` [N+1] run from 1 (noise) to 0 (image); `native` and `proportionate` are [N]; the proportionate credit of a
    step is `zeta` times its length in time. Steps not in `trained_steps` are pale. `used` [N], the run's own credit, is
    drawn as `used_label` if it is neither of the two. Raises ValueError if the lengths do not match.
    """
    count = len(native)
    from matplotlib.patches import Patch

    if len(times) != count + 1 or len(proportionate) != count or (used is not None and len(used) != count):
        raise ValueError(
            f"credit of {counted(count, 'step')} needs {count + 1} times and {counted(count, 'value')} in every column"
        )
    figure = new_figure(6.2, max(WIDTH, min(16.0, 0.3 * count)))
    above, below = figure.subplots(2, 1, height_ratios=(3, 2))
    steps = list(range(count))
    x = "step, and the time at which it starts (1 = noise, 0 = image)"
    axes = styled(above, title, x, "credit", with_legend=True)
    trained = set(steps if trained_steps is None else trained_steps) & set(steps)
    columns = [
        (native, "native: |b| / std", NATIVE),
        (proportionate, f"proportionate: ζ Δt, ζ = {zeta:.5g}", PROPORTIONATE),
    ]
    if used is not None and not _same(used, native, trained) and not _same(used, proportionate, trained):
        columns.append((used, used_label, STEPWISE))
    width = 0.8 / len(columns)
    for place, (values, label, colour) in enumerate(columns):
        offset = (place - (len(columns) - 1) / 2) * width
        for shown, alpha, named in ((sorted(trained), 1, label), (sorted(set(steps) - trained), 0.35, None)):
            heights = [values[step] for step in shown]
            if shown:
                places = [step + offset for step in shown]
                axes.bar(places, heights, width * 0.92, color=colour, alpha=alpha, label=named)
    axes.set_xlim(-0.7, count - 0.3)
    every = max(1, math.ceil(count / 20))
    axes.set_xticks(steps[::every], [f"{step}\n{times[step]:.2f}" for step in steps[::every]])
    pale_entry = [Patch(color=SOFT, alpha=0.35, label="pale: not trained")] if len(trained) < count else []
    legend(axes, pale_entry)

    styled(below, "Per unit of time: the area below a line is credit", "time", "credit / Δt")
    edges = [time for time in times for _ in range(2)][1:-1]
    for values, _, colour in columns:
        rates = [value / (times[step] - times[step + 1]) for step, value in enumerate(values)]
        below.plot(edges, [rate for rate in rates for _ in range(2)], color=colour, linewidth=2)
    below.set_xlim(times[0], times[-1])
    below.set_ylim(bottom=0)
    return figure


def mismatch_figure(records: Sequence[Record], clip_range: float | None = None) -> "Figure | None":
    """Difference between the update's outputs and those stored in the rollout, before the first optimizer step.

    `clip_range` adds a line at a tenth of it; a log-ratio above that line distorts clipping. A difference that is 0 in
    every epoch has no plot, and single zeros no point.
    """
    shown = [
        (name, y, Series(*map(list, zip(*points, strict=True))))
        for name, y, metric in (
            ("Outputs: relative difference", "relative difference", "rollout/mismatch_output"),
            ("Resulting log-ratio", "|log-ratio|", "rollout/mismatch_log_ratio"),
        )
        if (points := [(epoch, abs(value)) for epoch, value in series(records, metric).points() if value])
    ]
    if not shown:
        return None
    figure = new_figure(2.9)
    for place, (name, y, curve) in enumerate(shown, start=1):
        axes = styled(figure.add_subplot(1, len(shown), place), name, "epoch", y, with_legend=True)
        axes.plot(curve.epochs, curve.values, color=_SINGLE, linewidth=1.5, marker=marker(curve.values))
        axes.set_yscale("log")
        if clip_range and y == "|log-ratio|":
            axes.axhline(0.1 * clip_range, color=SOFT, linestyle="--", label="a tenth of the clip range")
            legend(axes)
        _span(axes, curve)
    return figure


def gradient_norm_figure(records: Sequence[Record]) -> "Figure | None":
    """Gradient norm before clipping for every update; skipped updates are marked."""
    positions, norms = update_values(records, "policy/grad_norm")
    if not positions:
        whole = series(records, "policy/grad_norm")
        positions, norms = [float(epoch) for epoch in whole.epochs], whole.values
    if not positions:
        return None
    figure = new_figure(2.6)
    axes = styled(figure.add_subplot(), "Gradient norm before clipping", "epoch", "L2 norm", with_legend=True)
    axes.plot(positions, norms, color=_SINGLE, linewidth=1.1, marker=marker(positions))
    if min(norms) > 0 and max(norms) / min(norms) > 30:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    skipped = skipped_updates(records)
    for number, epoch in enumerate(skipped):
        axes.axvline(epoch, color=SOFT, linewidth=1, alpha=0.8, label="updates skipped" if number == 0 else None)
    if skipped:
        legend(axes)
    epoch_axis(axes, positions[0], positions[-1])
    return figure


def time_figure(records: Sequence[Record]) -> "Figure | None":
    """Seconds per phase, stacked, and images per second, over epochs."""
    phases = [(series(records, name), label, colour) for name, label, colour in _PHASES]
    phases = [phase for phase in phases if phase[0]]
    throughput = series(records, "throughput/images_per_second")
    if not phases and not throughput:
        return None
    figure, count = new_figure(2.9), bool(phases) + bool(throughput)
    if phases:
        axes = styled(figure.add_subplot(1, count, 1), "Time per epoch", "epoch", "seconds", with_legend=True)
        epochs = sorted({epoch for curve, *_ in phases for epoch in curve.epochs})
        base = [0.0] * len(epochs)
        edges = [epoch - 0.5 for epoch in epochs] + [epochs[-1] + 0.5]
        for curve, label, colour in phases:
            values = curve.by_epoch()
            top = [low + values.get(epoch, 0.0) for low, epoch in zip(base, epochs, strict=True)]
            axes.stairs(top, edges, baseline=base, fill=True, color=colour, label=label, linewidth=0)
            base = top
        axes.set_ylim(0, 1.05 * max(base) or 1)
        epoch_axis(axes, epochs[0], epochs[-1])
        legend(axes)
    if throughput:
        axes = styled(figure.add_subplot(1, count, count), "Throughput", "epoch", "images per second", with_legend=True)
        axes.plot(throughput.epochs, throughput.values, color=_SINGLE, linewidth=1.5, marker=marker(throughput.epochs))
        axes.set_ylim(0, 1.1 * max(throughput.values) or 1)
        _span(axes, throughput)
    return figure


def _span(axes: "Axes", *curves: Series) -> None:
    epochs = [epoch for curve in curves for epoch in curve.epochs]
    if epochs:
        epoch_axis(axes, min(epochs), max(epochs))


def _same(first: Sequence[float], second: Sequence[float], steps: set[int]) -> bool:
    return all(math.isclose(first[i], second[i], rel_tol=1e-6, abs_tol=1e-12) for i in steps)
