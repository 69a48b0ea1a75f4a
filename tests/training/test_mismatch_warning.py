"""The trainer says once when rollout and update disagree by more than a tenth of the clip range."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_pipeline import PROMPTS, tiny_config

import pcpo_fast.training.trainer
from pcpo_fast.rollout.rollout import Rollout, Trajectories, collect_rollout


@pytest.mark.parametrize(("share", "warns"), [(0.05, True), (0.0, False)])
def test_the_warning(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, warns: bool
) -> None:
    def disagreeing(*arguments: Any) -> Rollout:
        rollout = collect_rollout(*arguments)
        trajectories = Trajectories(rollout.trajectories.latents, rollout.trajectories.outputs * (1 + share))
        return replace(rollout, trajectories=trajectories)

    monkeypatch.setattr(pcpo_fast.training.trainer, "collect_rollout", disagreeing)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    shown = io.StringIO()
    config = tiny_config(
        pipeline_folder,
        f"output_dir={tmp_path / 'run'}",
        f"prompts.train={tmp_path / 'prompts.txt'}",
        "prompts.heldout=null",
    )
    pcpo_fast.training.trainer.train(config, console=Console(file=shown, width=500))
    warnings = [line for line in shown.getvalue().splitlines() if "rollout and update disagree" in line]
    assert len(warnings) == (1 if warns else 0)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    mismatches = [line["rollout/mismatch_log_ratio"] for line in lines if line["kind"] == "epoch"]
    assert len(mismatches) == 2, "every epoch measures it"
    for mismatch in mismatches:
        assert mismatch > 1e-5 if warns else mismatch < 1e-6
    if warns:
        assert "in epoch 0 rollout and update disagree" in warnings[0] and f"{mismatches[0]:.1e}" in warnings[0]
        assert "train.old_output=recompute" in warnings[0]
