"""MixGRPO's preset with per-step credit from end to end on the tiny pipeline: the window moves, what earlier epochs
say of the steps is kept, and a resumed run goes on with both.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from cli_runs import call, records, write_config
from PIL import Image
from safetensors.torch import load_file

from pcpo_fast.reporting import live_report

Capture = pytest.CaptureFixture[str]
SETTINGS: dict[str, Any] = {
    "algorithm": "mixgrpo",
    "sampler__steps": 6,
    "window__size": 2,
    "window__interval": 1,
    "train__micro_batch_size": 4,
    "evaluation__every": 0,
    "advantage__steps": "gain",
    "advantage__gain_lambda": 0.5,
    "advantage__audit_every": 1,
    "rollout__candidates": 6,
    "model__attention": "auto",
    "model__compile": "auto",
}


def test_a_windowed_run_resumed_in_the_middle_equals_the_straight_one(
    tmp_path: Path, pipeline_folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {}
    shown: list[Path] = []  # every epoch of the straight run has its live report; the other has it turned off
    monkeypatch.setattr(live_report, "LEAST_SECONDS", 0)
    monkeypatch.setattr(live_report, "SHARE", 1e9)
    monkeypatch.setattr(live_report, "write_report", lambda folder, **_: shown.append(folder))
    for name, stops in (("straight", (3,)), ("resumed", (1, 3))):
        folder = tmp_path / name
        folder.mkdir()
        for epochs in stops:
            settings = SETTINGS | {"logging__live_report": name == "straight"}
            config = write_config(folder, pipeline_folder, train__epochs=epochs, **settings)
            answer = call(capsys, "train", "--config", config)
            assert answer.code == 0, answer.err
        assert ("Resuming after epoch 1" in answer.out) == (name == "resumed")
        runs[name] = folder / "run"
    assert shown == [runs["straight"]] * 3
    straight, resumed = (
        {
            (line["kind"], line["epoch"], line.get("update")): line
            for line in records(run)
            if line["kind"] != "evaluation"
        }
        for run in runs.values()
    )
    assert straight.keys() == resumed.keys()
    for key, line in straight.items():
        for metric, value in line.items():
            if metric != "kind" and not metric.startswith(("time", "throughput")):
                assert resumed[key][metric] == pytest.approx(value, rel=1e-6, abs=1e-12), (key, metric)
    files = [next((run / "export" / "transformer").glob("*.safetensors")) for run in runs.values()]
    weights, others = (load_file(file) for file in files)
    for name, value in weights.items():
        assert value.allclose(others[name], rtol=0, atol=1e-7), name

    gains, same = (json.loads((run / "gains.json").read_text()) for run in runs.values())
    assert gains["steps"] == [0, 1, 2, 3] and gains["correlations"][0][3] is None  # no window had both
    for row, other in zip(gains["correlations"], same["correlations"], strict=True):
        assert [value is None for value in row] == [value is None for value in other]
        assert [value or 0 for value in row] == pytest.approx([value or 0 for value in other], abs=1e-3)
    assert "Correlation of the gains of two steps" in (runs["straight"] / "report.html").read_text()

    strips = runs["straight"] / "images" / "predictions_0002.png"
    with Image.open(strips) as sheet:  # four images, the window's two predictions of each, then itself
        assert sheet.height > sheet.width > 0

    for epoch in range(3):
        line = straight["epoch", epoch, None]
        assert line["sampler/window_start"] == epoch
        trained = {int(name.rpartition("_")[2]) for name in line if name.startswith("policy/clip_fraction_step_")}
        assert trained == {epoch, epoch + 1}
        assert {f"stepwise/gain_step_{step}" for step in trained} <= line.keys()
        assert f"stepwise/branch_slope_step_{epoch}" in line
