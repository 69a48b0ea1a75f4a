"""Several passes over a rollout: what is measured of each, and when a rollout is too old."""

from pathlib import Path
from typing import Any

import pytest
from cli_runs import call, records, write_config
from tiny_pipeline import tiny_config
from tiny_runs import Bench

from pcpo_fast.config.loading import load_config
from pcpo_fast.config.schema import Config
from pcpo_fast.config.wording import counted
from pcpo_fast.errors import UserError
from pcpo_fast.training.trainer import _by_inner_epoch

Capture = pytest.CaptureFixture[str]
PER_PASS = ("clip_fraction", "log_ratio_abs", "log_ratio_std", "taylor_error")


# ------------------------------------------------------------------------------------------------------- settings


def ages(inner: int, updates: int, limit: int) -> Config:
    settings = (f"train.inner_epochs={inner}", f"train.updates_per_epoch={updates}", f"train.max_rollout_age={limit}")
    return load_config(None, settings)


@pytest.mark.parametrize(("inner", "updates", "limit"), [(3, 4, 11), (33, 1, 32), (1, 4, 3)])
def test_a_rollout_that_would_grow_too_old_is_refused(inner: int, updates: int, limit: int) -> None:
    reason = (
        rf"train\.inner_epochs: {counted(inner, 'pass')} of {counted(updates, 'update')} would make {inner * updates} "
        r"optimizer steps on one rollout, "
        rf"more than train\.max_rollout_age allows \({limit}\)$"
    )
    with pytest.raises(UserError, match=reason):
        ages(inner, updates, limit)
    assert ages(inner, updates, inner * updates).train.max_rollout_age == inner * updates


# --------------------------------------------------------------------------------------------------------- update


def passes(pipeline: Path, *overrides: str) -> list[float]:
    """The pass of every optimizer step of an epoch."""
    bench = Bench.build(tiny_config(pipeline, "train.inner_epochs=3", *overrides), record=False)
    return [record["policy/inner_epoch"] for record in bench.run()]


@pytest.mark.usefixtures("process_group")
def test_no_further_pass_over_a_stale_rollout(pipeline_folder: Path) -> None:
    """The first pass has moved the policy: its second update is off-policy, and the mean over both above the limit."""
    assert passes(pipeline_folder) == [0, 0, 1, 1, 2, 2]
    assert passes(pipeline_folder, "train.max_log_ratio=1e6") == [0, 0, 1, 1, 2, 2]
    assert passes(pipeline_folder, "train.max_log_ratio=1e-9") == [0, 0]
    # On-policy throughout: one update per pass, whose first has the ratio 1 exactly.
    assert passes(pipeline_folder, "train.max_log_ratio=1e-9", "train.updates_per_epoch=1") == [0, 1]


@pytest.mark.usefixtures("process_group")
def test_a_limit_between_two_passes_ends_between_them(pipeline_folder: Path) -> None:
    config = tiny_config(pipeline_folder, "train.inner_epochs=3")
    free = Bench.build(config, record=False).run()
    distances = [sum(free[2 * i + j]["policy/log_ratio_abs"] for j in (0, 1)) / 2 for i in range(3)]
    assert distances[0] < distances[1], "another limit would not part the passes"
    limit = (distances[0] + distances[1]) / 2
    assert passes(pipeline_folder, f"train.max_log_ratio={limit!r}") == [0, 0, 1, 1]


# -------------------------------------------------------------------------------------------------------- metrics


def test_metrics_of_each_pass_are_means_over_its_updates() -> None:
    def record(inner: int, value: float) -> dict[str, float]:
        named = {f"policy/{name}": value * (i + 1) for i, name in enumerate(PER_PASS)}
        return named | {"policy/inner_epoch": float(inner), "policy/loss": 7.0}

    metrics = _by_inner_epoch([record(0, 1.0), record(0, 3.0), record(1, 5.0)])
    expected = {
        f"policy/{name}_inner_{inner}": value * (i + 1)
        for i, name in enumerate(PER_PASS)
        for inner, value in ((0, 2.0), (1, 5.0))
    }
    assert metrics == pytest.approx(expected)
    assert _by_inner_epoch([record(0, 1.0), record(0, 3.0)]) == {}, "one pass needs no names of its own"
    assert _by_inner_epoch([]) == {}


def epochs_of(folder: Path, pipeline: Path, capsys: Capture, **changes: Any) -> list[dict[str, Any]]:
    """Train one epoch, and return its updates with the epoch's own line at the end."""
    settings = {"train__epochs": 1, "evaluation__every": 0, "checkpoint__every": 0} | changes
    answer = call(capsys, "train", "--config", write_config(folder, pipeline, **settings))
    assert answer.code == 0, answer.err
    return [line for line in records(folder / "run") if line["kind"] != "evaluation"]


def test_an_epoch_line_says_how_far_each_pass_had_left_the_sampling_policy(
    tmp_path: Path, pipeline_folder: Path, capsys: Capture
) -> None:
    *updates, epoch = epochs_of(tmp_path, pipeline_folder, capsys, train__inner_epochs=2)
    assert [line["policy/inner_epoch"] for line in updates] == [0, 0, 1, 1]
    for name in PER_PASS:
        for inner in (0, 1):
            values = [line[f"policy/{name}"] for line in updates if line["policy/inner_epoch"] == inner]
            assert epoch[f"policy/{name}_inner_{inner}"] == pytest.approx(sum(values) / 2)
        for step in range(3):  # the last of four is not trained
            if name != "log_ratio_abs":
                values = [line[f"policy/{name}_step_{step}"] for line in updates]
                assert epoch[f"policy/{name}_step_{step}"] == pytest.approx(sum(values) / 4)
    assert epoch["policy/log_ratio_abs_inner_1"] > epoch["policy/log_ratio_abs_inner_0"] > 0
    assert "policy/inner_epoch" not in epoch and epoch["policy/stale_updates"] == 0
    assert "policy/clip_fraction_step_3" not in epoch


def test_dropped_passes_are_counted(tmp_path: Path, pipeline_folder: Path, capsys: Capture) -> None:
    settings = {"train__inner_epochs": 3, "train__max_log_ratio": 1e-9}
    *updates, epoch = epochs_of(tmp_path, pipeline_folder, capsys, **settings)
    assert len(updates) == 2 and epoch["policy/stale_updates"] == 4
    assert not any("_inner_" in name for name in epoch)
    assert "sampler/window_start" not in epoch
