"""The summary of how well predictions foretell a reward."""

import json
from pathlib import Path

import step_rewards


def test_means_over_epochs_and_the_last_slope(tmp_path: Path) -> None:
    epochs = [
        {"stepwise/correlation_step_1": 0.25, "stepwise/beta_step_1": 0.1, "stepwise/gain_correlation_step_0": -0.5},
        {"stepwise/correlation_step_1": 0.75, "stepwise/beta_step_1": 0.3, "stepwise/correlation_step_0": 0.0},
    ]
    lines = [json.dumps({"kind": "epoch", "epoch": number, **metrics}) for number, metrics in enumerate(epochs)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert step_rewards.foretold(tmp_path) == {
        "correlation": {0: 0.0, 1: 0.5},
        "slope": {1: 0.3},
        "next_gain": {0: -0.5},
    }
