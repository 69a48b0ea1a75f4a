"""What report and held-out metrics say of several rewards, and of rewards that failed."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reporting_runs import make_run
from torch import Tensor

import pcpo_fast.training.heldout
from pcpo_fast.config.schema import EvaluationConfig, RewardConfig, ScoringConfig
from pcpo_fast.prompts import Prompt
from pcpo_fast.reporting.plots import reward_spread_figure
from pcpo_fast.reporting.report import write_report
from pcpo_fast.rewards import RewardSet
from pcpo_fast.training.heldout import HeldOut


def test_the_say_of_each_reward_is_drawn() -> None:
    assert reward_spread_figure([{"kind": "epoch", "epoch": 0, "reward/a": 1.0}]) is None
    records = [
        {"kind": "epoch", "epoch": e, **{f"reward_spread/{name}": float(n + e) for n, name in enumerate("abcdef")}}
        for e in range(3)
    ]
    figure = reward_spread_figure(records)
    assert figure is not None
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].get_lines()}  # type: ignore[call-overload]
    assert lines == {name: [n, n + 1, n + 2] for n, name in enumerate("abcdef")}
    styles = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].get_lines()}
    assert len(styles) == 6


def test_the_report_counts_groups_that_were_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", epochs=3)
    assert "left out because a reward failed" not in write_report(folder).read_text(encoding="utf-8")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        if line["kind"] == "epoch":
            line |= {"scoring/dropped_groups": 2.0, "reward_spread/a": 1.0, "reward_spread/b": 0.5}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    page = write_report(folder).read_text(encoding="utf-8")
    assert "Groups left out because a reward failed: 6." in page
    assert "Influence of each reward on the sum, over epochs" in page


def half_nan(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return torch.where(images[:, 0, 0, 0] > 0.5, torch.nan, images[:, 0, 0, 0])


@pytest.mark.parametrize("spoilt", [False, True])
def test_heldout_means_are_those_of_the_images_with_a_score(
    spoilt: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ScoringConfig(on_failure="drop_group")  # type: ignore[call-arg]
    rewards = RewardSet([RewardConfig(name=f"{__name__}:half_nan", weight=2.0)], settings)
    images = torch.rand(4, 3, 8, 8)
    images[:, 0, 0, 0] = torch.tensor([0.1, 0.9 if spoilt else 0.4, 0.3, 0.2])
    monkeypatch.setattr(pcpo_fast.training.heldout, "generate", lambda *_: images)
    policy: Any = SimpleNamespace()
    prompts = [Prompt(f"p{n}", {}) for n in range(4)]
    evaluation = HeldOut(policy, prompts, rewards, policy, EvaluationConfig(), tmp_path)  # type: ignore[call-arg]
    metrics, _ = evaluation.evaluate()
    kept = images[:, 0, 0, 0][images[:, 0, 0, 0] < 0.5].double()
    assert metrics["heldout/reward/mean"] == pytest.approx(2 * float(kept.mean()), rel=1e-6)
    assert metrics[f"heldout/reward/{__name__}:half_nan"] == pytest.approx(float(kept.mean()), rel=1e-6)
    assert metrics.get("heldout/failed_images") == (1.0 if spoilt else None)
