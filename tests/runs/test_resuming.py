"""Directories that hold a run: complete, to go on with, stopped in the middle, or another one."""

import hashlib
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_runs import (
    ROOT,
    Output,
    Run,
    call,
    records,
    start,
    write_config,
)

import pcpo_fast.training.trainer
from pcpo_fast.config.loading import load_config
from pcpo_fast.errors import UserError
from pcpo_fast.runs.run_directory import _check_same_run

pytest_plugins = ["cli_fixtures"]
Capture = pytest.CaptureFixture[str]


# train: directories that hold a run


def test_a_complete_run_says_so(full: Run, capsys: Capture) -> None:
    before = (full.folder / "metrics.jsonl").read_bytes()
    answer = call(capsys, "train", "--config", full.config)
    assert (answer.code, answer.err) == (0, "")
    assert "is finished (2 epochs): there is nothing left to train" in answer.out
    assert "train.epochs" in answer.out and "another output_dir" in answer.out
    assert "Loading" not in answer.out
    assert (full.folder / "metrics.jsonl").read_bytes() == before
    answer = call(capsys, "train", "--config", full.config, "--json")
    assert json.loads(answer.out) == json.loads((full.folder / "summary.json").read_text())
    assert "is finished" in answer.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--resume", "never"), "already holds a run; choose another output_dir, remove it, or resume it"),
        (("seed=1",), "seed: the run in {run} has 0, this configuration 1; choose another output_dir"),
        (
            ("rewards.0.weight=2",),
            "{{name: jpeg_incompressibility, evaluation_only: true}}], this configuration "
            "[{{name: 'tiny_pipeline:redness', weight: 2.0}}, {{name: jpeg_",
        ),
        (("evaluation.seed=3",), "evaluation.seed: the run in {run} has 1000003"),
        (("--resume", "{run}", "seed=1"), "seed: the run in {run} has 0"),
        (("--resume", "{run}/checkpoints/epoch_000001"), "holds a later checkpoint than --resume"),
        (("--resume", "{run}/images"), "is not a checkpoint of this trainer"),
        (("--resume", "nowhere"), "--resume: nowhere is not a folder; allowed: auto, accept-changes, never, or"),
    ],
)
def test_a_run_is_never_overwritten(arguments: tuple[str, ...], words: str, full: Run, capsys: Capture) -> None:
    before = {path: path.stat().st_mtime_ns for path in full.folder.rglob("*")}
    filled = [argument.format(run=full.folder) for argument in arguments]
    answer = call(capsys, "train", "--config", full.config, *filled)
    assert answer.code == 2
    assert answer.err.startswith("error: ") and answer.err.count("\n") == 1
    assert words.format(run=full.folder) in answer.err
    assert {path: path.stat().st_mtime_ns for path in full.folder.rglob("*")} == before


def test_another_runs_directory_is_refused_for_a_checkpoint(full: Run, lora: Run, capsys: Capture) -> None:
    answer = call(capsys, "train", "--config", full.config, "--resume", lora.folder)
    assert answer.code == 2
    assert "already holds a run other than --resume" in answer.err


def test_more_epochs_go_on_from_the_end(copy_of_full: Run, capsys: Capture) -> None:
    run = copy_of_full.folder
    before = records(run)
    answer = call(capsys, "train", "--config", copy_of_full.config, "train.epochs=3", "logging.tensorboard=false")
    assert answer.code == 0, answer.err
    assert f"Resuming after epoch 2 from {run / 'checkpoints' / 'epoch_000002'}" in answer.out
    after = records(run)
    assert after[: len(before) - 1] == before[:-1]  # the evaluation at epoch 2 is made again, of the same weights
    again = after[len(before) - 1]
    assert again["heldout/reward/mean"] == pytest.approx(before[-1]["heldout/reward/mean"], abs=1e-6)
    assert [line["epoch"] for line in after if line["kind"] == "epoch"] == [0, 1, 2]
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["epochs"], summary["heldout_reward_before"]) == (3, before[0]["heldout/reward/mean"])
    assert load_config(run / "config.yaml").train.epochs == 3


def test_a_run_that_goes_on_has_no_summary_of_its_shorter_self(
    copy_of_full: Run, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pcpo_fast.training.trainer, "collect_rollout", interrupt)
    answer = call(capsys, "train", "--config", copy_of_full.config, "train.epochs=3", "logging.tensorboard=false")
    assert answer.code == 130
    assert answer.err == "interrupted: the same command resumes the run after epoch 2\n"
    assert not (copy_of_full.folder / "summary.json").exists()
    answer = call(capsys, "train", "--config", copy_of_full.config, "logging.tensorboard=false")  # two epochs will do
    assert answer.code == 0, answer.err
    assert json.loads((copy_of_full.folder / "summary.json").read_text())["epochs"] == 2


def test_settings_that_do_not_change_the_result_may_change(copy_of_full: Run, capsys: Capture) -> None:
    settings = ("train.micro_batch_size=4", "rollout.batch_size=3", "evaluation.every=5", "evaluation.batch_size=1")
    others = (
        "checkpoint.keep=1",
        "model.gradient_checkpointing=true",
        "model.attention=_native_math",
        "model.embedding_cache=null",
        "logging.wandb=null",
        "scoring.timeout=60",
        "train.max_skipped_updates=9",
    )
    answer = call(capsys, "train", "--config", copy_of_full.config, "--resume", "auto", *settings, *others)
    assert answer.code == 0, answer.err
    assert "is finished (2 epochs)" in answer.out


def test_resume_path_goes_on_in_a_new_directory(full: Run, tmp_path: Path, capsys: Capture) -> None:
    checkpoint, new = full.folder / "checkpoints" / "epoch_000001", tmp_path / "new"
    arguments = (
        "train",
        "--config",
        full.config,
        "--resume",
        checkpoint,
        f"output_dir={new}",
        "logging.tensorboard=false",
    )
    answer = call(capsys, *arguments)
    assert answer.code == 0, answer.err
    assert f"Resuming after epoch 1 from {checkpoint}" in answer.out
    first, second = ([line for line in records(run) if line["kind"] == "epoch"] for run in (full.folder, new))
    assert [line["epoch"] for line in second] == [1]
    assert second[0]["reward/mean"] == pytest.approx(first[1]["reward/mean"], abs=1e-6)
    assert second[0]["policy/grad_norm"] == pytest.approx(first[1]["policy/grad_norm"], rel=1e-3)
    assert (new / "images" / "before_after.png").is_file()  # before means: where this run began
    assert full.folder.exists() and len(list((full.folder / "checkpoints").glob("epoch_*"))) == 2


def test_what_is_known_of_other_rewards_is_left_behind(full: Run, tmp_path: Path, capsys: Capture) -> None:
    checkpoint = full.folder / "checkpoints" / "epoch_000001"
    arguments = (
        "train",
        "--config",
        full.config,
        "--resume",
        checkpoint,
        "train.epochs=1",
        "logging.tensorboard=false",
    )
    for name, settings, expected in (("same", (), False), ("other", ("rewards.0.weight=2",), True)):
        answer = call(capsys, *arguments, f"output_dir={tmp_path / name}", *settings)
        assert answer.code == 0, answer.err
        assert ("The checkpoint was trained with other rewards" in answer.out) == expected


def test_a_checkpoint_keeps_what_the_next_evaluation_looks_at(full: Run, tmp_path: Path, capsys: Capture) -> None:
    """Stopped between an epoch and its evaluation, a run still compares the epoch's predictions with that."""
    settings = ("advantage.steps=gain", "evaluation.every=2", "checkpoint.every=1", "logging.tensorboard=false")
    answer = call(capsys, "train", "--config", full.config, f"output_dir={tmp_path / 'run'}", *settings)
    assert answer.code == 0, answer.err
    states = sorted((tmp_path / "run" / "checkpoints").glob("epoch_*/state.json"))
    waiting, looked_at = (json.loads(file.read_text())["leads"] for file in states)
    assert waiting and all(name.startswith("step_") for name in waiting)
    assert looked_at == {}


def test_a_run_without_a_checkpoint_begins_again_unless_it_is_complete(copy_of_full: Run, capsys: Capture) -> None:
    run = copy_of_full.folder
    shutil.rmtree(run / "checkpoints")
    answer = call(capsys, "train", "--config", copy_of_full.config)
    assert (answer.code, answer.err) == (0, "") and "is finished (2 epochs)" in answer.out
    (run / "summary.json").unlink()
    answer = call(capsys, "train", "--config", copy_of_full.config, "train.epochs=1", "logging.tensorboard=false")
    assert answer.code == 0, answer.err
    assert "holds a run without a checkpoint: it starts again" in answer.out
    assert [line["epoch"] for line in records(run) if line["kind"] == "epoch"] == [0]


def test_a_damaged_checkpoint_is_passed_over_and_said_so(copy_of_full: Run, capsys: Capture) -> None:
    run = copy_of_full.folder
    newest = run / "checkpoints" / "epoch_000002"
    shard = next((newest / "engine").glob("*optim_states.pt"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    arguments = ("train", "--config", copy_of_full.config, "train.epochs=3", "logging.tensorboard=false")
    answer = call(capsys, *arguments)
    assert answer.code == 0, answer.err
    assert f"warning: checkpoint {newest} is damaged (engine/{shard.name} is corrupt" in answer.out
    assert f"Resuming after epoch 1 from {run / 'checkpoints' / 'epoch_000001'}" in answer.out
    assert [line["epoch"] for line in records(run) if line["kind"] == "epoch"] == [0, 1, 2]
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"epoch_000002", "epoch_000003", "damaged_epoch_000002", "latest"}

    for name in ("epoch_000002", "epoch_000003"):
        (run / "checkpoints" / name / "manifest.json").unlink()
    answer = call(capsys, *arguments, "train.epochs=4")
    assert answer.code == 2
    assert answer.err.startswith("error: every checkpoint is damaged, so there is nothing to resume from (")
    assert "epoch_000003: it has no manifest.json" in answer.err and "in another output_dir" in answer.err
    answer = call(capsys, "export", run)
    assert answer.code == 2 and "is damaged: it has no manifest.json; choose another one" in answer.err


def test_what_a_run_says_in_a_pipe(tmp_path: Path, pipeline_folder: Path, capsys: Capture) -> None:
    config = write_config(tmp_path, pipeline_folder, model__embedding_cache=str(tmp_path / "cache"))
    answer = call(capsys, "train", "--config", config)
    assert (answer.code, answer.err) == (0, "")
    run = tmp_path / "run"
    lines = answer.out.splitlines()
    assert lines[:4] == [
        f"pcpo on {pipeline_folder}, run directory {run}",
        "warning: prompts.heldout: shares 1 of its 2 prompts with prompts.train, so the held-out reward "
        "includes prompts that are trained on",
        f"Loading {pipeline_folder}",
        "Encoding 4 prompts",
    ]
    assert lines[4].startswith("epoch 1/2  reward ")
    assert lines[-5].startswith("epoch 2/2  reward ")
    assert lines[-4].startswith("Held-out reward:  ")
    assert lines[-3:] == [
        f"Before and after: {run}/images/before_after.png",
        f"Report:           {run}/report.html",
        f"Weights:          {run}/export",
    ]
    assert "\x1b" not in answer.out
    assert answer.out.isascii()


def test_json_of_train_is_alone_on_stdout_and_a_run_without_held_out_prompts(
    tmp_path: Path,
    pipeline_folder: Path,
    capsys: Capture,
) -> None:
    config = write_config(tmp_path, pipeline_folder, prompts__heldout=None, train__epochs=1)
    answer = call(capsys, "train", "--config", config, "--json")
    assert answer.code == 0, answer.err
    summary = json.loads(answer.out)
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["heldout_reward_before"] is None and summary["epochs"] == 1
    assert "epoch 1/1" in answer.err
    assert not (tmp_path / "run" / "images").exists()
    answer = call(capsys, "train", "--config", config)
    assert "Held-out" not in answer.out and "Training reward:" in answer.out and "before_after" not in answer.out


# train: directories that hold a run which has read something else


def test_a_run_whose_inputs_changed_does_not_go_on_in_silence(
    tmp_path: Path, own_pipeline: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards = tmp_path / "rewards_of_this_test.py"
    rewards.write_text("from tiny_pipeline import redness\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = write_config(tmp_path, own_pipeline, rewards=[{"name": "rewards_of_this_test:redness"}], train__epochs=1)
    run, arguments = tmp_path / "run", ("train", "--config", config, "train.epochs=2")
    assert call(capsys, "train", "--config", config).code == 0
    record = json.loads((run / "inputs.json").read_text())
    weights = own_pipeline / "text_encoder" / "model.safetensors"
    assert record["inputs"]["model.path"]["files"]["text_encoder/model.safetensors"] == (
        hashlib.blake2b(weights.read_bytes(), digest_size=16).hexdigest()
    )
    prompts, heldout = tmp_path / "train.txt", tmp_path / "heldout.jsonl"
    tokenizer = own_pipeline / "tokenizer_2" / "tokenizer_config.json"
    changed = {
        prompts: prompts.read_text() + "\na blue square",
        heldout: heldout.read_text().replace('{"n": 0}', '{"n": 5}'),
        rewards: rewards.read_text() + "# as before\n",
        weights: None,
        tokenizer: tokenizer.read_text() + "\n",
    }
    for file, text in changed.items():
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if text is None else text.encode())
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
    answer = call(capsys, *arguments)
    assert answer.code == 2
    assert answer.err == (
        f"error: the run in {run} cannot be resumed because its inputs have changed: "
        f"model.path (text_encoder/model.safetensors and 1 more in {own_pipeline}); "
        f"prompts.heldout ({heldout}: 2 prompts before, 2 different prompts now); "
        f"prompts.train ({prompts}: 3 prompts before, 4 different prompts now); "
        f"reward rewards_of_this_test:redness, module rewards_of_this_test (rewards_of_this_test.py in {tmp_path}); "
        "restore them, choose another output_dir, or accept the changes with --resume accept-changes\n"
    )
    assert {path: path.stat().st_mtime_ns for path in before} == before

    answer = call(capsys, *arguments, "--resume", "accept-changes", "--verify")
    assert answer.code == 0, answer.err
    assert "warning: continuing with inputs whose content has changed: model.path (" in answer.out
    assert "Resuming after epoch 1" in answer.out
    assert json.loads((run / "inputs.json").read_text())["since_epoch"] == 1
    (run / "inputs.json").write_text("{")
    answer = call(capsys, *arguments, "train.epochs=3")
    assert (
        answer.code == 2
        and f"{run / 'inputs.json'} is damaged, so prompts, rewards and model cannot be compared" in answer.err
    )
    (run / "inputs.json").unlink()  # a run from before there was a record
    answer = call(capsys, *arguments, "train.epochs=3")
    assert answer.code == 0 and "warning: continuing" not in answer.out, answer.err


def test_a_revision_may_be_pinned_where_the_models_content_is_compared(tmp_path: Path) -> None:
    """Then it is only a name, and the way back to the model where a branch has moved on."""
    config = load_config(None, ["model.path=someone/model", f"output_dir={tmp_path}"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    pinned = load_config(None, ["model.path=someone/model", f"output_dir={tmp_path}", "model.revision=abc"])
    with pytest.raises(UserError, match=r"^model\.revision: the run in .* has null, this configuration abc;"):
        _check_same_run(tmp_path, pinned)
    (tmp_path / "inputs.json").write_text("{}")
    _check_same_run(tmp_path, pinned)


# train: stopped


def stop_in_epoch(folder: Path, launcher: str, rollout: int, how: signal.Signals) -> Output:
    """Run until the reward of the given rollout (of this process, from 1) is at work, and send a signal."""
    (folder / "wait_at").write_text(str(rollout))
    (folder / "waiting").unlink(missing_ok=True)
    process = start(folder, "--config", "run.yaml", launcher=launcher)
    end = time.monotonic() + 120
    while not (folder / "waiting").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    assert (folder / "waiting").exists(), err
    return Output(process.returncode, out, err)


def finished(process: "subprocess.Popen[str]") -> Output:
    out, err = process.communicate(timeout=240)
    return Output(process.returncode, out, err)


@pytest.mark.slow
def test_a_stopped_run_resumes_and_ends_as_if_it_had_not_been(waiting: Path, launcher: str, capsys: Capture) -> None:
    run = waiting / "run"
    answer = stop_in_epoch(waiting, launcher, 2, signal.SIGINT)
    assert answer.code == 130
    assert answer.err == "interrupted: the same command resumes the run after epoch 1\n"

    answer = stop_in_epoch(waiting, launcher, 2, signal.SIGKILL)
    assert answer.code == -signal.SIGKILL
    assert "Resuming after epoch 1 from" in answer.out
    names = [path.name for path in sorted((run / "checkpoints").iterdir())]
    assert names == ["epoch_000001", "epoch_000002", "latest"]
    assert not (run / "summary.json").exists()

    report = call(capsys, "report", run, "--json")  # of a run that is not over
    assert report.code == 0, report.err
    assert json.loads(report.out)["summary"]["epochs"] == 2
    assert (run / "report.html").is_file()

    # Like the stopped run, both in processes of their own: what other tests left in this one may change a last bit.
    (waiting / "wait_at").write_text("0")
    whole = waiting / "whole"
    plain = (f"output_dir={whole}", "rewards=[{name: 'tiny_pipeline:redness'}]")
    processes = [start(waiting, "--config", "run.yaml", *others, launcher=launcher) for others in ((), plain)]
    resumed, straight_on = (finished(process) for process in processes)
    assert (resumed.code, resumed.err) == (0, "")
    assert "Resuming after epoch 2 from" in resumed.out
    assert straight_on.code == 0, straight_on.err

    stopped, straight = (
        {(line["kind"], line["epoch"], line.get("update")): line for line in records(folder)} for folder in (run, whole)
    )
    assert stopped.keys() == straight.keys()
    for key, line in straight.items():
        for name, value in line.items():
            if name != "kind" and not name.startswith(("time", "throughput")):
                assert stopped[key][name.replace("tiny_pipeline", "waiting_rewards")] == value, (key, name)


def test_an_interrupt_before_the_first_checkpoint_says_so(
    tmp_path: Path,
    pipeline_folder: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pcpo_fast.training.trainer, "collect_rollout", interrupt)
    config = write_config(tmp_path, pipeline_folder)
    answer = call(capsys, "train", "--config", config)
    assert answer.code == 130
    assert answer.err == "interrupted before the first checkpoint: the same command starts the run again\n"


@pytest.mark.slow
def test_train_py_works_from_another_folder(tmp_path: Path) -> None:
    settings = (
        f"output_dir={tmp_path / 'run'}", "train.epochs=1", "sampler.steps=2", "rollout.prompts_per_epoch=2",
        "rollout.images_per_prompt=2", "train.updates_per_epoch=1", "train.micro_batch_size=4", "evaluation.prompts=2",
        "evaluation.images_per_prompt=1", "logging.tensorboard=false", f"model.embedding_cache={tmp_path / 'cache'}",
    )  # fmt: skip
    process = start(tmp_path, *settings)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert f"Working in {ROOT}" in err
    assert "pcpo on assets/tiny-flux" in out
    assert (tmp_path / "run" / "report.html").is_file()
