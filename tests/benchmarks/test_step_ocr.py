"""benchmarks/step_ocr.py: what OCR of predictions foretells."""

import json
from pathlib import Path

import numpy as np
import pytest
import step_ocr
import torch

from pcpo_fast.rewards.ocr_accuracy import OcrAccuracy


def test_measures_are_those_of_differences_within_groups_in_the_images_standard_deviations() -> None:
    rewards = torch.rand(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    rewards[-1, 2] = 0.5  # a group without spread says nothing
    rewards[0] = 0.0  # predictions that are all alike, too
    found = step_ocr.measures(rewards)
    centred = (rewards - rewards.mean(2, keepdim=True))[:, :2]
    rows = (centred / centred[-1].std(1, keepdim=True)).flatten(1).numpy()
    assert found["correlation"][0] is None and found["slope"][0] is None
    for step in (1, 2):
        assert found["correlation"][step] == pytest.approx(np.corrcoef(rows[step], rows[-1])[0, 1])
        assert found["slope"][step] == pytest.approx(np.polyfit(rows[step], rows[-1], 1)[0])
    gains = np.diff(rows, axis=0)
    assert found["next_gain"] == pytest.approx([np.corrcoef(gains[step], gains[step + 1])[0, 1] for step in (0, 1)])
    assert found["mean"] == pytest.approx(rewards[:-1].mean((1, 2)).tolist())


def test_numbers_and_figure_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        step_ocr, "OcrAccuracy", lambda: OcrAccuracy(lambda pixels: "ACEF"[: int(pixels.sum() % 4) + 1])
    )
    numbers, picture = tmp_path / "ocr.json", tmp_path / "ocr.png"
    assert step_ocr.main(["--json", str(numbers), "--plot", str(picture), "--updates", "1", "--groups", "4"]) == 0
    found = json.loads(numbers.read_text())
    assert [len(found[name]) for name in ("correlation", "slope", "next_gain", "mean")] == [16, 16, 15, 16]
    assert picture.read_bytes().startswith(b"\x89PNG")
