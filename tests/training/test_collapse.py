"""The collapse monitor: its numbers, its figure, and a run that it ends."""

import json
from pathlib import Path

import pytest
import torch
from cli_runs import call, records, write_config

import pcpo_fast.training.heldout
from pcpo_fast.config.loading import load_config
from pcpo_fast.config.schema import AdvantageConfig
from pcpo_fast.errors import UserError
from pcpo_fast.method.step_advantages import Segments, StepAdvantages
from pcpo_fast.reporting.plots import diversity_figure
from pcpo_fast.training.collapse import CollapseMonitor, PredictionMonitor, SpreadMonitor, base_distance

Capture = pytest.CaptureFixture[str]


def test_a_reward_without_spread_is_announced_once_after_some_epochs_in_a_row() -> None:
    monitor = SpreadMonitor(3)
    seen = [["a"], ["a", "b"], ["b"], ["a", "b"], ["a"], ["a"], ["a"], ["a", "b"]]
    said = [list(monitor.look(equal)) for equal in seen]
    assert [len(texts) for texts in said] == [0, 0, 0, 1, 0, 1, 0, 0]
    assert said[3][0].startswith("the reward b has given") and said[5][0].startswith("the reward a has given")


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([(0.5, 0.6), (0.6, 0.65), (0.7, 0.6)], [2]),
        ([(0.5, 0.6), (0.6, 0.65), (0.7, 0.61)], []),  # the held-out reward rises, too
        ([(0.5, 0.6), (0.4, 0.6), (0.7, 0.6)], []),  # the predictions do not rise all the time
        ([(0.5, 0.6), (0.6, 0.7), (0.7, 0.8), (0.8, 0.7), (0.9, 0.7)], [3]),  # once
        ([(None, 0.6), (None, 0.5), (None, 0.4)], []),
        ([(0.5, 0.6), (0.51, 0.6), (0.54, 0.6)], []),  # less than two standard errors of 0.021
    ],
)
def test_predictions_that_improve_alone_are_announced_once(
    pairs: list[tuple[float | None, float]], said: list[int]
) -> None:
    monitor = PredictionMonitor(StepAdvantages(AdvantageConfig(steps="gain"), 4))
    looked = [
        list(monitor.look({} if level is None else {"step_0": (level, 0.01), "step_1": (level, 0.02)}, heldout))
        for level, heldout in pairs
    ]
    assert [index for index, texts in enumerate(looked) if texts] == said


def test_predictions_of_a_window_that_moves_on_are_compared_at_the_same_steps() -> None:
    """Later steps predict better, at any time: that is no improvement."""
    monitor = PredictionMonitor(StepAdvantages(AdvantageConfig(steps="gain"), 8))
    for first in range(6):
        assert not list(monitor.look({f"step_{step}": (0.1 * step, 0.0) for step in range(first, first + 3)}, 0.5))
    for rise in (0.0, 0.01):
        assert not list(monitor.look({"step_5": (0.5 + rise, 0.0), f"step_{7 - 100 * rise}": (0.7, 0.0)}, 0.5))
    assert "risen from 0.5 to 0.52, but" in next(monitor.look({"step_5": (0.52, 0.0)}, 0.5))


def test_the_discount_of_later_gains_rises_to_1_where_predictions_improve_alone_and_goes_on_after_a_stop() -> None:
    settings = AdvantageConfig(steps="gain", calibrated=False, gain_lambda=0.25, gain_lambda_rise=0.5)
    stepwise = StepAdvantages(settings, 3)
    monitor, said, discounts = PredictionMonitor(stepwise), [], []
    for evaluation in range(9):
        saved = json.loads(json.dumps((stepwise.state_dict(), monitor.state_dict())))
        stepwise = StepAdvantages(settings, 3)
        monitor = PredictionMonitor(stepwise)
        stepwise.load_state_dict(saved[0])
        monitor.load_state_dict(saved[1])
        said += monitor.look({"step_1": (0.5 + 0.01 * evaluation, 0.001)}, 0.6)
        discounts.append(stepwise.gain_lambda)
    assert discounts == [0.25] * 2 + [0.75] * 2 + [1.0] * 5
    assert [text.rpartition("; ")[2] for text in said] == [
        "gain_lambda rises from 0.25 to 0.75",
        "gain_lambda rises from 0.75 to 1",
        "lower optimizer.lr, or stop",
    ]
    final, predicted, equal = torch.randn(6).double(), torch.randn(6, 3).double(), torch.zeros(6, dtype=torch.bool)
    credit, metrics = stepwise.compute(final, predicted, Segments.of((True,) * 3, 1), equal)
    torch.testing.assert_close(credit, final[:, None] - predicted)
    assert metrics["stepwise/gain_lambda"] == 1


def test_distance_is_the_mean_over_images_of_the_rms_over_pixels() -> None:
    first, now = torch.rand(5, 3, 7, 6), torch.rand(5, 3, 7, 6)
    levels = [(255 * images.double()).round() / 255 for images in (first, now)]
    each = [float((one - other).square().mean().sqrt()) for one, other in zip(*levels, strict=True)]
    assert base_distance(first, now) == pytest.approx(sum(each) / 5, rel=1e-12)
    assert base_distance(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 7.0)) == 1  # values beyond 1 are white


def test_what_an_image_file_rounds_away_is_no_distance() -> None:
    images = torch.rand(3, 3, 4, 4)
    assert base_distance((images * 255).round() / 255, images) == 0


def test_the_monitor_compares_with_the_diversity_before() -> None:
    monitor = CollapseMonitor(0.5)
    monitor.look(0.2, 0, is_first=True)
    assert monitor.before == 0.2 and monitor.reason is None
    monitor.look(0.1, 4, is_first=False)
    assert monitor.reason is None
    monitor.look(float("nan"), 5, is_first=False)
    monitor.look(None, 5, is_first=False)
    assert monitor.reason is None
    monitor.look(0.099, 6, is_first=False)
    assert monitor.reason is not None
    assert "after 6 epochs" in monitor.reason and "0.099 is below 0.5 times the 0.200" in monitor.reason
    monitor.look(0.15, 8, is_first=False)
    assert monitor.reason is None


def test_without_a_share_it_never_ends_a_run() -> None:
    monitor = CollapseMonitor(None)
    monitor.look(0.2, 0, is_first=True)
    monitor.look(0.0, 1, is_first=False)
    assert monitor.reason is None


def test_both_distances_are_drawn() -> None:
    assert diversity_figure([{"kind": "evaluation", "epoch": 0, "heldout/reward/mean": 1.0}]) is None
    figure = diversity_figure(
        [
            {"kind": "evaluation", "epoch": e, "heldout/diversity": 0.3 - e / 50, "heldout/base_distance": e / 50}
            for e in (0, 5)
        ]
    )
    assert figure is not None
    drawn = [list(line.get_ydata()) for line in figure.axes[0].get_lines()]  # type: ignore[call-overload]
    assert drawn == [[0.3, pytest.approx(0.2)], [0, pytest.approx(0.1)]]


@pytest.mark.parametrize("setting", ["prompts.heldout=null", "evaluation.images_per_prompt=1", "evaluation.every=0"])
def test_it_needs_images_to_compare(setting: str) -> None:
    enough = ("evaluation.min_diversity=0.5", "evaluation.images_per_prompt=2")
    assert load_config(None, enough).evaluation.min_diversity == 0.5
    with pytest.raises(UserError, match=r"evaluation\.min_diversity: needs held-out images to compare"):
        load_config(None, (*enough, setting))


def test_a_run_that_collapses_ends_and_says_why(
    tmp_path: Path, pipeline_folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made-up diversity, and a real run around it: it ends after 2 of 5 epochs with a checkpoint and results."""
    measured = iter([0.3, 0.2, 0.1, 0.1, 0.1, 0.1])
    monkeypatch.setattr(pcpo_fast.training.heldout, "mean_pixel_diversity", lambda *_: next(measured))
    config = write_config(
        tmp_path,
        pipeline_folder,
        train__epochs=5,
        checkpoint__every=0,
        evaluation__images_per_prompt=2,
        evaluation__min_diversity=0.5,
    )
    folder = tmp_path / "run"
    answer = call(capsys, "train", "--config", config)
    assert (answer.code, answer.err) == (0, "")
    assert "stopped after 2 epochs" in answer.out and "0.100 is below 0.5 times the 0.300" in answer.out
    held = [record for record in records(folder) if record["kind"] == "evaluation"]
    assert [record["epoch"] for record in held] == [0, 1, 2]
    assert held[0]["heldout/base_distance"] == 0 < held[1]["heldout/base_distance"]
    assert json.loads((folder / "summary.json").read_text())["epochs"] == 2
    assert (folder / "checkpoints" / "epoch_000002").is_dir() and (folder / "export").is_dir()
    assert "Distances of held-out images" in (folder / "report.html").read_text()

    answer = call(capsys, "train", "--config", config)  # what it was before comes from the checkpoint
    assert answer.code == 0 and "stopped after 2 epochs" in answer.out
    assert max(record["epoch"] for record in records(folder)) == 2
    answer = call(capsys, "train", "--config", config, "evaluation.min_diversity=null", "train.epochs=3")
    assert answer.code == 0 and "stopped" not in answer.out
    assert json.loads((folder / "summary.json").read_text())["epochs"] == 3
