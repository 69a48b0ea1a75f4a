"""``train`` from the beginning to the end of a run: what it records, and where."""

import json
import math
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import (
    Run,
    call,
    records,
    write_config,
)
from PIL import Image
from safetensors.torch import save_file
from tiny_pipeline import PROMPTS

from pcpo_fast.config.loading import load_config

pytest_plugins = ["cli_fixtures"]
Capture = pytest.CaptureFixture[str]


# train: what a finished run holds


def test_run_directory_is_complete(full: Run) -> None:
    for name in ("config.yaml", "metrics.jsonl", "credit.json", "report.html", "summary.json", "images/captions.json"):
        assert (full.folder / name).is_file(), name
    for name in ("epoch_0000", "epoch_0001", "epoch_0002", "before_after"):
        with Image.open(full.folder / "images" / f"{name}.png") as image:
            image.verify()
    assert (full.folder / "export" / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
    names = [path.name for path in sorted((full.folder / "checkpoints").iterdir())]
    assert names == ["epoch_000001", "epoch_000002", "latest"]
    assert list(full.folder.glob("tensorboard/**/events.out.tfevents.*"))
    assert json.loads((full.folder / "images" / "captions.json").read_text()) == list(PROMPTS[2:])
    assert load_config(full.folder / "config.yaml") == load_config(full.config)
    assert "<html" in (full.folder / "report.html").read_text(encoding="utf-8")
    left = {path.name for path in full.folder.iterdir()}
    assert left == {
        "config.yaml", "metrics.jsonl", "credit.json", "images", "checkpoints", "export", "report.html", "summary.json",
        "tensorboard", "inputs.json", "provenance.json", ".lock",
    }  # fmt: skip


def test_metrics_have_their_fixed_names(full: Run) -> None:
    lines = records(full.folder)
    kinds = [(line["kind"], line["epoch"]) for line in lines]
    epoch = [("update", 0), ("update", 0), ("epoch", 0), ("evaluation", 1)]
    assert kinds == [("evaluation", 0), *epoch, *[(kind, n + 1) for kind, n in epoch]]
    update, whole, evaluation = lines[1], lines[3], lines[4]
    assert set(update) >= {
        "kind", "epoch", "update", "time", "policy/clip_fraction", "policy/log_ratio_abs", "policy/taylor_error",
        "policy/grad_norm", "policy/loss", "policy/skipped_updates", "optimizer/lr",
    }  # fmt: skip
    assert set(whole) >= {
        "reward/mean", "reward/std", "reward/tiny_pipeline:redness", "reward/jpeg_compressibility",
        "policy/clip_fraction", "policy/log_ratio_abs", "policy/taylor_error", "policy/grad_norm",
        "policy/skipped_updates", "rollout/mismatch_output", "rollout/mismatch_log_ratio", "optimizer/lr",
        "time/rollout", "time/reward", "time/update", "throughput/images_per_second",
        *(f"policy/clip_fraction_step_{step}" for step in range(3)),
    }  # fmt: skip
    assert "policy/clip_fraction_step_3" not in whole  # the last step is not trained
    assert "reward/jpeg_incompressibility" not in whole  # for evaluation only
    assert set(evaluation) == {
        "kind", "epoch", "time", "heldout/reward/mean", "heldout/reward/std", "heldout/base_distance",
        "heldout/reward/tiny_pipeline:redness",
        "heldout/reward/jpeg_compressibility", "heldout/reward/jpeg_incompressibility",
    }  # fmt: skip
    for line in lines:
        assert all(math.isfinite(value) for value in line.values() if not isinstance(value, str)), line
    parts = whole["reward/tiny_pipeline:redness"] + 0.01 * whole["reward/jpeg_compressibility"]
    assert whole["reward/mean"] == pytest.approx(parts, abs=1e-5)


def test_the_kl_to_the_start_is_a_metric(lora: Run, full: Run) -> None:
    last = [line for line in records(lora.folder) if line["kind"] == "epoch"][-1]
    assert last["policy/kl"] > 0
    assert not any("policy/kl" in line for line in records(full.folder))
    before, *_, after = (line["heldout/kl"] for line in records(lora.folder) if line["kind"] == "evaluation")
    assert before == 0 < after and not any("heldout/kl" in line for line in records(full.folder))


def test_gradients_of_credit_are_measured_on_the_weights_of_a_run(full: Run, capsys: Capture) -> None:
    numbers = ("--rollouts", "3", "--warm-up", "1")
    answer = call(capsys, "step-gradients", full.folder, *numbers, "--json")
    assert answer.code == 0, answer.err
    record = json.loads(answer.out)
    assert (record["epoch"], record["rollouts"], record["kinds"]) == (2, 3, ["final", "baseline", "gain"])
    assert answer.err.count("mean reward") == 4 and len(record["cosines"]) == 3
    for arguments, said in (
        ((full.folder, "--rollouts", "2"), "--rollouts: must be at least 3, got 2"),
        ((), "step-gradients needs either one run directory (or checkpoint) or --config FILE"),
        (("--config", full.config, "--epoch", "1"), "--epoch: selects a checkpoint of a run"),
    ):
        answer = call(capsys, "step-gradients", *arguments)
        assert answer.code == 2 and answer.err.startswith(f"error: {said}")


def test_where_two_forwards_part_is_found_on_the_weights_of_a_run(full: Run, tmp_path: Path, capsys: Capture) -> None:
    answer = call(capsys, "first-difference", full.folder, "--other", "model.dtype=bfloat16", "--step", "1", "--json")
    assert answer.code == 0, answer.err
    record = json.loads(answer.out)
    assert record["compared"] > 100 and record["first"]["distance"] > 1e-4 and record["distances"][""] > 1e-4
    answer = call(capsys, "first-difference", full.folder)
    assert answer.code == 0 and re.search(
        r"no difference: \d+ operations in both forwards|first difference: \S+ in \S+", answer.out
    )
    file = tmp_path / "forward.safetensors"
    answer = call(capsys, "first-difference", full.folder, "--save", file)
    assert answer.code == 0 and re.fullmatch(rf"wrote {file}: \d+ operations\n", answer.out)
    answer = call(capsys, "first-difference", full.folder, "--against", file)
    assert answer.code == 0 and re.search(r"no difference: \d+ operations in both forwards", answer.out)
    answer = call(capsys, "first-difference", full.folder, "model.guidance=5", "--against", file, "--json")
    distances = json.loads(answer.out)["distances"]
    assert distances["x_embedder"] == 0 < distances["time_text_embed"]
    (tmp_path / "empty.safetensors").write_bytes(b"")
    save_file({"latents": torch.zeros(1)}, tmp_path / "other.safetensors")
    for arguments, said in (
        (("--other", "train.epochs=3"), "--other: must be a setting of the model, model.KEY=VALUE, got train.epochs=3"),
        (("--against", tmp_path / "empty.safetensors"), f"--against: {tmp_path}/empty.safetensors cannot be read: "),
        (("--against", tmp_path / "other.safetensors"), f"--against: {tmp_path}/other.safetensors was not written"),
        (("--against", file, "model.height=32"), f"--against: {file} is of another model, image size or number of"),
        (("--against", file, "--step", "1"), "--step: a forward that is compared with --against has the step"),
        (("--save", tmp_path / "no" / "where"), f"--save: {tmp_path}/no is not a folder"),
        (("--step", "99"), "--step: must be 0 to "),
    ):
        answer = call(capsys, "first-difference", full.folder, *arguments)
        assert answer.code == 2 and answer.err.startswith(f"error: {said}")


def test_the_work_of_an_epoch_is_counted(full: Run, lora: Run) -> None:
    work = [
        {name.partition("/")[2]: value for name, value in line.items() if name.startswith("compute/")}
        for run in (full, lora)
        for line in records(run.folder)
        if line["kind"] == "epoch"
    ]
    # 8 images of 4 steps, 3 of them trained; 2 rewards in training. The second run asks the base model for its KL, too.
    expected = {"forwards": 32, "trained": 24, "decodes": 8, "reward_calls": 16}
    assert work == [expected] * 2 + [{**expected, "forwards": 32 + 24, "reward_calls": 8}] * 2


def test_summary_and_credit(full: Run) -> None:
    summary = json.loads((full.folder / "summary.json").read_text())
    lines = [line["heldout/reward/mean"] for line in records(full.folder) if line["kind"] == "evaluation"]
    assert (summary["heldout_reward_before"], summary["heldout_reward_after"]) == (lines[0], lines[-1])
    assert (summary["epochs"], summary["updates"], summary["skipped_updates"]) == (2, 4, 0)
    assert summary["seconds"] > 0
    credit = json.loads((full.folder / "credit.json").read_text())
    assert (credit["sampler"], credit["rule"], credit["trained_steps"]) == ("dance", "proportionate", [0, 1, 2])
    assert credit["used"] == pytest.approx([*credit["proportionate"][:3], 0.0])
    assert len(credit["times"]) == 5


def test_tensorboard_shows_the_same_numbers(full: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(full.folder / "tensorboard" / "epochs"))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("reward/mean")}
    written = {line["epoch"]: line["reward/mean"] for line in records(full.folder) if line["kind"] == "epoch"}
    assert shown == pytest.approx(written)


def test_a_user_reward_gets_the_prompts_and_their_metadata(
    tmp_path: Path,
    pipeline_folder: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = types.ModuleType("noted_rewards")
    seen: list[tuple[int, list[str], list[dict[str, Any]], int]] = []

    def reward(
        images: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]], *, level: int = 0
    ) -> list[float]:
        seen.append((len(images), prompts, metadata, level))
        return [float(n) for n in range(len(images))]

    module.reward = reward  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "noted_rewards", module)
    rewards = [{"name": "noted_rewards:reward", "options": {"level": 3}}]
    config = write_config(tmp_path, pipeline_folder, rewards=rewards, train__epochs=1, scoring__overlap=True)
    answer = call(capsys, "train", "--config", config, "rollout.batch_size=8")
    assert answer.code == 0, answer.err
    assert answer.out.count("warning: scoring.overlap has no effect: a rank samples its 8 images in one batch") == 1
    assert answer.out.count("warning: prompts.heldout: shares 1 of its 2 prompts with prompts.train, so") == 1
    assert [entry[0] for entry in seen] == [2, 8, 2]
    assert seen[0][1:] == (list(PROMPTS[2:]), [{"n": 0}, {"n": 1}], 3)
    assert len(set(seen[1][1])) == 2 and set(seen[1][1]) <= set(PROMPTS[:3])


def test_weights_and_biases_gets_the_metrics(
    tmp_path: Path,
    pipeline_folder: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class FakeRun:
        def __init__(self) -> None:
            self.logged: list[dict[str, Any]] = []
            self.finished = False

        def log(self, values: dict[str, Any]) -> None:
            self.logged.append(values)

        def define_metric(self, *arguments: Any, **options: Any) -> None:
            pass

        def finish(self) -> None:
            self.finished = True

    fake, run, started = types.ModuleType("wandb"), FakeRun(), list[dict[str, Any]]()

    def init(**options: Any) -> FakeRun:
        started.append(options)
        return run

    fake.init = init  # type: ignore[attr-defined]
    fake.Settings = lambda **options: options  # type: ignore[attr-defined]
    fake.Image = lambda image: image  # type: ignore[attr-defined]
    fake.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = write_config(tmp_path, pipeline_folder, train__epochs=1)
    answer = call(capsys, "train", "--config", config, "logging.wandb={project: mine, tags: [a]}")
    assert answer.code == 0, answer.err
    assert (started[0]["project"], started[0]["tags"]) == ("mine", ["a"])
    about = started[0]["config"]
    assert about["train.epochs"] == 1 and about["rewards.0.name"] and about["provenance.libraries"]["torch"]
    assert "output_dir" not in about
    names = {name for values in run.logged for name in values}
    assert names >= {
        "reward/mean",
        "policy/clip_fraction",
        "heldout/reward/mean",
        "update/policy/grad_norm",
        "images/epoch",
    }
    written = next(line for line in records(tmp_path / "run") if line["kind"] == "epoch")
    assert written["reward/mean"] in [values.get("reward/mean") for values in run.logged]
    assert run.finished
