"""docs/metrics.md names every number that a run writes."""

import re
from pathlib import Path

import pytest
from cli_runs import Run, records

pytest_plugins = ["cli_fixtures"]
TEXT = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")


def documented() -> list[str]:
    """Patterns of the names in the first column; ``…_step_<i>`` goes on from the name before it."""
    patterns: list[str] = []
    for line in TEXT.splitlines():
        before = ""
        for name in re.findall(r"`([^`]+)`", line.split(" | ")[0]) if line.startswith("| `") else ():
            whole = before + name.removeprefix("…") if name.startswith("…") else name
            before = before or whole
            pattern = re.escape(whole).replace("<name>", ".+")
            patterns.append(re.sub(r"<\w>", r"\\d+", pattern))
    return patterns


def test_the_patterns_are_read() -> None:
    patterns = documented()
    assert len(patterns) > 30
    for name in ("policy/log_ratio_std_step_12", "rollout/mismatch_output_step_0", "reward/my:thing", "optimizer/lr"):
        assert any(re.fullmatch(pattern, name) for pattern in patterns), name
    assert not any(re.fullmatch(pattern, "policy/log_ratio_std_step_x") for pattern in patterns)


@pytest.mark.parametrize("run", ["full", "lora"])
def test_every_metric_of_a_run_is_documented(run: str, request: pytest.FixtureRequest) -> None:
    made: Run = request.getfixturevalue(run)
    names = {name for line in records(made.folder) for name in line if "/" in name}
    undocumented = {name for name in names if not any(re.fullmatch(pattern, name) for pattern in documented())}
    assert undocumented == set()
    assert ("policy/kl" in names) == (run == "lora")


@pytest.mark.parametrize(
    "name",
    ["heldout/diversity", "sampler/window_start", "policy/stale_updates", "policy/inner_epoch", "memory/peak_gib"]
    + ["scoring/failed_audits"]
    + [f"stepwise/{name}_step_3" for name in ("correlation", "beta", "predicted_reward", "gain", "gain_correlation")]
    + [f"stepwise/{name}_step_3" for name in ("left", "branch_effect", "branch_slope")]
    + [f"policy/{name}_inner_1" for name in ("clip_fraction", "log_ratio_abs", "log_ratio_std", "taylor_error")],
)
def test_metrics_of_other_settings_are_documented(name: str) -> None:
    assert any(re.fullmatch(pattern, name) for pattern in documented())
