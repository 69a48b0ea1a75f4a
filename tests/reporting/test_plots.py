"""pcpo_fast.reporting.plots, series and charts: the figures show the numbers, in colours that can be told apart."""

import io
import json
import math
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from reporting_runs import credit, make_run

from pcpo_fast.config.loading import load_config
from pcpo_fast.reporting import plots, style
from pcpo_fast.reporting.charts import charts
from pcpo_fast.reporting.metrics_file import read_metrics
from pcpo_fast.reporting.series import series, skipped_updates, update_values

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return read_metrics(make_run(tmp_path_factory.mktemp("run"), epochs=20) / "metrics.jsonl")


def test_series_prefers_the_line_of_the_epoch() -> None:
    lines = [
        {"kind": "update", "epoch": 0, "a": 1.0, "b": 5.0},
        {"kind": "update", "epoch": 0, "a": 2.0},
        {"kind": "epoch", "epoch": 0, "b": 7.0},
        {"kind": "epoch", "epoch": 2, "b": math.nan},
        {"kind": "epoch", "epoch": 1, "b": 8.0},
        {"kind": "epoch", "epoch": 1, "b": 9.0},
    ]
    assert (series(lines, "a").epochs, series(lines, "a").values) == ([0], [1.5])
    assert (series(lines, "b").epochs, series(lines, "b").values) == ([0, 1], [7.0, 9.0])
    assert not series(lines, "c")
    assert update_values(lines, "a") == ([0.0, 0.5], [1.0, 2.0])


def test_skipped_updates_come_from_the_epoch_or_its_updates() -> None:
    lines: list[dict[str, Any]] = [
        {"kind": "update", "epoch": 0, "policy/skipped_updates": 1.0},
        {"kind": "update", "epoch": 0, "policy/skipped_updates": 0.0},
        {"kind": "update", "epoch": 1, "policy/skipped_updates": 1.0},
        {"kind": "epoch", "epoch": 1, "policy/skipped_updates": 2.0},
        {"kind": "epoch", "epoch": 2, "policy/skipped_updates": 0},
    ]
    assert skipped_updates(lines) == {0: 1, 1: 2}


def test_reward_figure_shows_the_numbers(records: list[dict[str, Any]]) -> None:
    figure = plots.mean_reward_figure(records)
    assert figure is not None
    (axes,) = figure.axes
    rollouts, heldout, before = axes.lines
    assert before.get_ydata() == pytest.approx([heldout.get_ydata()[0]] * 2)  # type: ignore[index]
    mean = series(records, "reward/mean")
    assert rollouts.get_ydata() == pytest.approx(mean.values)
    assert heldout.get_xdata() == pytest.approx([0, 10, 20])
    band = axes.collections[0].get_paths()[0].vertices
    assert np.max(band[:, 1]) == pytest.approx(max(mean.values) + 0.15)
    assert np.min(band[:, 1]) == pytest.approx(min(mean.values) - 0.15)


def test_clip_fraction_map_is_by_step_and_epoch(records: list[dict[str, Any]]) -> None:
    figure = plots.clip_fraction_figure(records)
    assert figure is not None
    (picture,) = figure.axes[0].images
    table = picture.get_array()
    assert table is not None and table.shape == (15, 20)
    for step, epoch in ((0, 0), (14, 3), (7, 19)):
        updates = [
            r[f"policy/clip_fraction_step_{step}"] for r in records if r["kind"] == "update" and r["epoch"] == epoch
        ]
        assert table[step, epoch] == pytest.approx(np.mean(updates))
    bars = [bar.get_width() for bar in figure.axes[1].patches]  # type: ignore[attr-defined]
    assert bars == pytest.approx(table.mean(axis=1))


def test_steps_that_are_not_trained_are_holes_in_the_map() -> None:
    lines = [{"kind": "epoch", "epoch": e, f"policy/clip_fraction_step_{2 + e}": 0.5} for e in range(2)]
    figure = plots.clip_fraction_figure(lines)
    assert figure is not None
    table = np.ma.filled(figure.axes[0].images[0].get_array(), np.nan)
    assert np.isnan(table).tolist() == [[True, True], [True, True], [False, True], [True, False]]


def test_what_steps_decided_is_a_map_and_what_predictions_say_a_mean_of_late_epochs() -> None:
    lines = [
        {"kind": "epoch", "epoch": e}
        | {f"stepwise/gain_step_{step}": 0.1 * step + 0.01 * e for step in range(3)}
        | {f"stepwise/correlation_step_{step}": 0.2 * step + 0.01 * e for step in range(3)}
        | ({"stepwise/branch_slope_step_1": 0.9} if e == 5 else {})
        for e in range(8)
    ]
    figure = plots.stepwise_figure(lines)
    assert figure is not None
    table = figure.axes[0].images[0].get_array()
    assert table is not None and float(table[2, 7]) == pytest.approx(0.27)
    correlation, branches = figure.axes[1].get_lines()
    assert correlation.get_ydata() == pytest.approx([0.2 * step + 0.065 for step in range(3)])
    assert (list(branches.get_xdata()), list(branches.get_ydata())) == ([1], [0.9])


def test_predictions_are_drawn_beside_the_images_and_the_size_of_credit_by_step() -> None:
    lines = [
        {"kind": "epoch", "epoch": e, "reward/mean": 0.5 + 0.1 * e}
        | {f"stepwise/predicted_reward_step_{step}": 0.1 * step + 0.01 * e for step in range(7)}
        | {f"stepwise/left_step_{step}": 0.5 + 0.01 * step for step in range(6)}
        for e in range(3)
    ]
    figure = plots.predictions_figure(lines)
    assert figure is not None
    left, right = figure.axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in left.get_lines()}  # type: ignore[arg-type]
    assert [name for name in drawn if str(name).startswith("step")] == ["step 0", "step 2", "step 4", "step 6"]
    assert drawn["step 6"] == pytest.approx([0.6, 0.61, 0.62]) and drawn["images"] == pytest.approx([0.5, 0.6, 0.7])
    assert list(right.get_lines()[0].get_ydata()) == pytest.approx([0.5 + 0.01 * step for step in range(6)])


def test_correlations_of_gains_are_a_map_with_holes() -> None:
    figure = plots.gain_correlation_figure([2, 5], [[1.0, None], [None, 1.0]])
    axes = figure.axes[0]
    table = axes.images[0].get_array()
    assert table is not None and np.isnan(np.ma.filled(table, np.nan)).tolist() == [[False, True], [True, False]]
    assert [axes.xaxis.get_major_formatter()(place) for place in (0, 1, 2)] == ["2", "5", ""]


def test_credit_figure_has_a_bar_for_every_credit_and_the_credit_below_its_lines() -> None:
    data = credit()
    figure = plots.credit_figure(
        data["times"], data["native"], data["proportionate"], data["zeta"], "Dance SDE", trained_steps=range(15)
    )
    axes, below = figure.axes
    heights = sorted(bar.get_height() for bar in axes.patches)  # type: ignore[attr-defined]
    assert heights == pytest.approx(sorted(data["native"] + data["proportionate"]))
    assert sum(bar.get_alpha() < 1 for bar in axes.patches) == 2  # type: ignore[operator, misc]
    legend = axes.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["native: |b| / std", "proportionate: ζ Δt, ζ = 13.343", "pale: not trained"]
    assert axes.get_title(loc="left") == "Dance SDE"
    native, proportionate = (np.asarray(line.get_data(), float) for line in below.lines)
    assert proportionate[1] == pytest.approx([data["zeta"]] * 32)
    for line, total in ((native, sum(data["native"])), (proportionate, sum(data["native"]))):
        assert -np.trapezoid(line[1], line[0]) == pytest.approx(total)


def test_a_chart_of_credit_where_every_step_is_trained_has_no_pale_bars() -> None:
    table = credit(4)
    figure = plots.credit_figure(table["times"], table["native"], table["proportionate"], table["zeta"], "all")
    assert [mark["label"][:6] for mark in shown(figure)[0]["marks"]] == ["native", "propor"]


def test_credit_figure_shows_a_third_rule_only_where_it_differs() -> None:
    data = credit()
    arguments = (data["times"], data["native"], data["proportionate"], data["zeta"], "")
    same = plots.credit_figure(*arguments, trained_steps=data["trained_steps"], used=data["used"])
    other = plots.credit_figure(*arguments, trained_steps=data["trained_steps"], used=[0.9] * 16)
    assert len(other.axes[0].patches) == len(same.axes[0].patches) + 16
    with pytest.raises(ValueError, match="16 steps needs 17 times"):
        plots.credit_figure(data["times"][1:], *arguments[1:])


def test_png_of_a_figure(tmp_path: Path) -> None:
    data = credit()
    figure = plots.credit_figure(data["times"], data["native"], data["proportionate"], data["zeta"], "Dance SDE")
    plots.save_figure(figure, tmp_path / "credit.png")
    with Image.open(tmp_path / "credit.png") as image:
        assert image.width >= 1200 and len(image.convert("RGB").getcolors(1 << 24)) > 50
    with pytest.raises(ValueError, match=r"\.png"):
        plots.save_figure(figure, tmp_path / "credit.pdf")


def test_a_mismatch_of_zero_is_not_drawn() -> None:
    lines = [
        {"kind": "epoch", "epoch": e, "rollout/mismatch_output": 0.0, "rollout/mismatch_log_ratio": 1e-7 * (e % 2)}
        for e in range(4)
    ]
    figure = plots.mismatch_figure(lines, clip_range=1e-4)
    assert figure is not None
    (axes,) = figure.axes  # none for the outputs, which are equal
    assert axes.get_title(loc="left") == "Resulting log-ratio" and axes.get_yscale() == "log"
    assert (list(axes.lines[0].get_xdata()), list(axes.lines[0].get_ydata())) == ([1, 3], [1e-7, 1e-7])
    assert axes.lines[-1].get_ydata() == pytest.approx([1e-5, 1e-5])
    assert plots.mismatch_figure([line | {"rollout/mismatch_log_ratio": 0.0} for line in lines]) is None


def test_times_are_stacked(records: list[dict[str, Any]]) -> None:
    figure = plots.time_figure(records)
    assert figure is not None
    top = figure.axes[0].patches[-1].get_data()  # type: ignore[attr-defined]
    total = sum(np.array(series(records, f"time/{phase}").values) for phase in ("rollout", "reward", "update"))
    assert top.values == pytest.approx(total)


def test_several_rewards_get_a_plot_each(records: list[dict[str, Any]]) -> None:
    assert plots.reward_parts_figure(records) is None  # one reward only
    lines = [
        {
            "kind": "epoch",
            "epoch": e,
            "reward/mean": 1.0,
            "reward/hps": 0.3,
            "reward/$cost$": 2.0,
            "reward/group_std": 1.0,
        }
        for e in range(3)
    ] + [{"kind": "evaluation", "epoch": 0, "heldout/reward/mean": 1.0, "heldout/reward/clip_score": 0.2}]
    figure = plots.reward_parts_figure(lines)
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["hps", "$cost$", "clip_score"]
    figure.savefig(io.BytesIO(), format="png")  # a dollar sign is not mathematics


DRAWINGS = [
    plots.mean_reward_figure,
    plots.reward_parts_figure,
    plots.clip_fraction_figure,
    plots.mismatch_figure,
    plots.gradient_norm_figure,
    plots.time_figure,
    plots.stepwise_figure,
    plots.predictions_figure,
]


@pytest.mark.parametrize("draw", DRAWINGS)
def test_nothing_recorded_is_no_figure(draw: Any) -> None:
    assert draw([]) is None
    assert (
        draw([{"kind": "epoch", "epoch": 0, "time": 1.0, "reward/mean": math.nan, "policy/grad_norm": math.nan}])
        is None
    )


@pytest.mark.parametrize("draw", DRAWINGS)
@pytest.mark.filterwarnings("error")
def test_one_epoch_and_zeros_can_be_drawn(draw: Any, records: list[dict[str, Any]]) -> None:
    names = dict.fromkeys(name for record in records for name in record if "/" in name)
    figure = draw([{"kind": "epoch", "epoch": 0, **dict.fromkeys(names, 0.0)}])
    if figure is not None:
        figure.savefig(io.BytesIO(), format="svg")


def test_axes_are_labelled(records: list[dict[str, Any]]) -> None:
    stepwise = {"stepwise/gain_step_0": 0.5, "stepwise/correlation_step_0": 0.1, "stepwise/predicted_reward_step_0": 1}
    for draw in DRAWINGS:
        figure = draw([*records, {"kind": "epoch", "epoch": 20, **stepwise}])
        for axes in figure.axes if figure is not None else []:
            colorbar = hasattr(axes, "_colorbar")
            assert colorbar or axes.get_xlabel(), draw.__name__


def shown(figure: Any) -> list[dict[str, Any]]:
    """What a page shows of a figure: its panels, and what is drawn in each."""
    return [json.loads(data) for data in re.findall(r'application/json">(.*?)</script>', str(charts(figure, "d")))]


def test_a_chart_has_the_numbers_of_its_figure(records: list[dict[str, Any]]) -> None:
    clip = plots.clip_fraction_figure(records)
    assert clip is not None
    left, right = shown(clip)
    (heat,), (bars,) = left["marks"], right["marks"]
    table = clip.axes[0].images[0].get_array()
    assert table is not None and np.array(heat["rows"]) == pytest.approx(table)
    assert (heat["x"], heat["y"], heat["percent"]) == ([-0.5, 19.5], [-0.5, 14.5], True)
    assert left["y"]["range"] == [14.5, -0.5]  # step 0 on top
    assert bars["at"] == list(range(15)) and bars["shown"] == pytest.approx(table.mean(axis=1))
    (panel,) = shown(plots.mean_reward_figure(records))
    kinds = [mark["kind"] for mark in panel["marks"]]
    assert kinds == ["area", "line", "line", "span", "text", "text"]
    assert panel["marks"][1]["y"] == series(records, "reward/mean").values
    assert [mark["text"] for mark in panel["marks"][-2:]] == ["0.625", "0.790"]
    times = shown(plots.time_figure(records))[0]["marks"]
    assert [mark["label"] for mark in times] == ["rollout", "reward", "update"]
    assert times[2]["shown"] == pytest.approx(series(records, "time/update").values)  # not the height of the stack


def test_a_chart_makes_no_ticks_of_matplotlib_s() -> None:
    """They take more time than all else of a figure. The grid is known without them."""
    figure = style.new_figure()
    axes = style.styled(figure.add_subplot(), "", "", "")
    axes.plot([0, 9], [0, 9])
    (panel,) = shown(figure)
    assert (panel["x"]["grid"], panel["y"]["grid"]) == (False, True)
    assert max(len(axes.xaxis.majorTicks), len(axes.yaxis.majorTicks)) == 1


def test_a_chart_names_what_matplotlib_names() -> None:
    table = [[1.0, None], [None, 1.0]]
    (panel,) = shown(plots.gain_correlation_figure([2, 5], table))
    assert panel["x"]["ticks"] == {"0": "2", "1": "5"}
    assert panel["marks"][0]["rows"] == table and panel["marks"][0]["limits"] == [-1, 1]


def test_a_chart_of_something_unknown_is_an_error_and_text_is_escaped() -> None:
    figure = style.new_figure()
    axes = style.styled(figure.add_subplot(), "<b>", "</script>", "y")
    axes.plot([0, 1], [0, 1], color=style.NATIVE, label="<i>")
    page = str(charts(figure, '"<u>"'))
    assert "&lt;b&gt;" in page and "&lt;i&gt;" in page and "&lt;u&gt;" in page and page.count("</script>") == 1
    assert f"--color: {style.css_color(style.NATIVE)}" in page and shown(figure)[0]["x"]["label"] == "</script>"
    axes.pie([1, 2])
    with pytest.raises(TypeError, match="Wedge"):
        charts(figure, "")


def test_the_first_epochs_do_not_flatten_a_map() -> None:
    lines = [
        {"kind": "epoch", "epoch": e, f"stepwise/gain_step_{step}": 9.0 if e < 2 else 0.3 + 0.01 * e}
        for e in range(20)
        for step in range(3)
    ]
    merged = [{k: v for line in lines if line["epoch"] == e for k, v in line.items()} for e in range(20)]
    figure = plots.stepwise_figure(merged)
    assert figure is not None and figure.axes[0].images[0].get_clim() == pytest.approx((0, 0.49))


def test_a_curve_has_the_colour_of_its_meaning() -> None:
    def colour(*settings: str) -> str | None:
        return style.credit_color(load_config(ROOT / "configs" / "tiny_flux.yaml", list(settings)))

    assert colour() == style.PROPORTIONATE and colour("credit.rule=uniform") is None
    assert colour("credit.rule=native") == style.NATIVE
    ddim = load_config(ROOT / "configs" / "tiny_sd.yaml", ["credit.rule=uniform"])
    assert style.credit_color(ddim) == style.PROPORTIONATE
    assert colour("advantage.steps=gain") == style.STEPWISE
    looks = style.distinct_looks([style.NATIVE, None, style.NATIVE, *[None] * 6])
    assert looks[:3] == [(style.NATIVE, "-"), (style.OTHERS[0], "-"), (style.OTHERS[1], "-")]
    assert len(set(looks)) == 9


def luminance(colour: str) -> float:
    """WCAG 2 relative luminance."""
    linear = [((v + 0.055) / 1.055) ** 2.4 if v > 0.04045 else v / 12.92 for v in rgb(colour)]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))


def rgb(colour: str) -> list[float]:
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]


RULES = (style.NATIVE, style.PROPORTIONATE, style.STEPWISE)
SERIES = (*RULES, style.TUNED)


@pytest.mark.parametrize("dark", [False, True])
def test_colours_stand_out_from_the_paper(dark: bool) -> None:
    def shown(colour: str) -> str:
        return style.DARK[colour] if dark else colour

    def contrast(colour: str) -> float:
        low, high = sorted((luminance(shown(colour)), luminance(shown(style.PAPER))))
        return (high + 0.05) / (low + 0.05)

    assert all(
        contrast(colour) >= 3 for colour in (*SERIES, style.BASE, *style.OTHERS)
    )  # WCAG 1.4.11, graphical objects
    assert contrast(style.INK) >= 7 and contrast(style.SOFT) >= 4.5


# Machado, Oliveira, Fernandes 2009, severity 1.0, on linear RGB
PROTANOPIA = np.array(
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
)
DEUTERANOPIA = np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
)


@pytest.mark.parametrize("vision", [np.eye(3), PROTANOPIA, DEUTERANOPIA])
@pytest.mark.parametrize("dark", [False, True])
def test_colours_can_be_told_apart_by_the_colour_blind(vision: np.ndarray, dark: bool) -> None:
    def lab(colour: str) -> np.ndarray:
        linear = np.array([((v + 0.055) / 1.055) ** 2.4 if v > 0.04045 else v / 12.92 for v in rgb(colour)])
        seen = np.clip(vision @ linear, 0, 1)
        xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen
        f = np.cbrt(xyz / (0.9505, 1.0, 1.089))
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    shown = {colour: style.DARK[colour] if dark else colour for colour in SERIES}
    pairs = {pair: float(np.linalg.norm(lab(shown[pair[0]]) - lab(shown[pair[1]]))) for pair in combinations(SERIES, 2)}
    assert min(pairs[pair] for pair in combinations(RULES, 2)) > 20  # those that share a plot
    assert min(pairs.values()) > 10


def test_what_need_not_be_loaded_is_not() -> None:
    """Importing the package is quick, and drawing touches no global state of matplotlib."""
    code = (
        "import sys, pcpo_fast.reporting as r\n"
        "heavy = {'matplotlib', 'wandb', 'tensorboard', 'deepspeed', 'diffusers', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "from pcpo_fast.reporting import plots\n"
        "assert plots.mean_reward_figure([{'kind': 'epoch', 'epoch': 0, 'reward/mean': 1.0}]) is not None\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
