"""pcpo_fast.reporting.records and metrics_file: what is written survives kills, resumes and full disks."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reporting_runs import make_run

from pcpo_fast.errors import UserError
from pcpo_fast.reporting.metrics_file import read_metrics
from pcpo_fast.reporting.records import RunRecorder
from pcpo_fast.reporting.summary import write_summary


def recorder(folder: Path) -> RunRecorder:
    return RunRecorder(folder, tensorboard=False, wandb=None)


def log_epochs(folder: Path, epochs: range, updates: int = 2) -> None:
    with recorder(folder) as records:
        for epoch in epochs:
            records.log("evaluation", {"heldout/reward/mean": 0.1 * epoch}, epoch=epoch)
            for update in range(updates):
                records.log("update", {"policy/loss": 0.5}, epoch=epoch, update=update)
            records.log("epoch", {"reward/mean": float(epoch)}, epoch=epoch)


def test_lines_hold_the_fixed_fields_and_the_metrics(tmp_path: Path) -> None:
    with recorder(tmp_path) as records:
        records.log("update", {"policy/loss": torch.tensor(0.25), "policy/n": 3}, epoch=0, update=1)
        records.log("epoch", {"reward/mean": np.float32(0.5), "reward/x": np.array([2.0])[0]}, epoch=0)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line) for line in lines)
    assert 0 <= first.pop("time") < 60
    assert first == {"kind": "update", "epoch": 0, "update": 1, "policy/loss": 0.25, "policy/n": 3}
    assert list(second)[:3] == ["kind", "epoch", "time"]
    assert (second["reward/mean"], second["reward/x"]) == (0.5, 2.0)


def test_lines_are_on_the_disk_before_close(tmp_path: Path) -> None:
    records = recorder(tmp_path)
    records.log("epoch", {"reward/mean": 1.0}, epoch=0)
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["reward/mean"] == 1.0
    records.close()
    records.close()


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    with recorder(tmp_path) as records:
        records.log("epoch", {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1e308}, epoch=0)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (line["a"], line["b"], line["c"], line["d"]) == (None, None, None, 1e308)
    read = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert all(math.isnan(read[name]) for name in "abc")


@pytest.mark.parametrize("name", ["kind", "epoch", "update", "time"])
def test_a_metric_cannot_hide_a_fixed_field(tmp_path: Path, name: str) -> None:
    with recorder(tmp_path) as records, pytest.raises(ValueError, match=name):
        records.log("epoch", {name: 1.0}, epoch=0)


def test_a_metric_must_be_one_number(tmp_path: Path) -> None:
    with recorder(tmp_path) as records:
        for value in (torch.zeros(2), "high", None):
            with pytest.raises((ValueError, RuntimeError), match=r"policy/x|one element|scalar"):
                records.log("epoch", {"policy/x": value}, epoch=0)  # type: ignore[dict-item]
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_cut_last_line_is_left_out_and_repaired(tmp_path: Path, cut: int) -> None:
    log_epochs(tmp_path, range(2))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "epoch", "epoch": 2, "reward/mean": 0.5}\n'[:cut])
    assert len(read_metrics(path)) == 8
    log_epochs(tmp_path, range(2, 3))
    records = read_metrics(path)
    assert [record["epoch"] for record in records] == [0] * 4 + [1] * 4 + [2] * 4
    assert path.read_bytes().startswith(whole)


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path: Path) -> None:
    log_epochs(tmp_path, range(1))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    assert len(read_metrics(path)) == 4
    log_epochs(tmp_path, range(1, 2))
    assert len(read_metrics(path)) == 8


@pytest.mark.parametrize("damage", [b'{"kind": "ep', b"[1, 2]", b"\xff\xfe", b"3"])
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "epoch", "epoch": 0}\n' + damage + b'\n{"kind": "epoch", "epoch": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


def test_missing_file_and_unwritable_folder_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        read_metrics(tmp_path / "metrics.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot open"):
        recorder(tmp_path / "file")


def test_killed_while_writing(tmp_path: Path) -> None:
    """SIGKILL in the middle of the stream: every line there is whole, in order, and the run continues."""
    code = (
        "import sys; from pathlib import Path; from pcpo_fast.reporting.records import RunRecorder\n"
        "records = RunRecorder(Path(sys.argv[1]), tensorboard=False, wandb=None)\n"
        "for epoch in range(10**9): records.log('epoch', {f'metric/{i}': i / 7 for i in range(200)}, epoch=epoch)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    path = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not path.exists() or path.stat().st_size < 200_000:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    records = read_metrics(path)
    assert [record["epoch"] for record in records] == list(range(len(records)))
    assert all(len(record) == 203 for record in records)
    log_epochs(tmp_path, range(len(records), len(records) + 1))
    assert len(read_metrics(path)) == len(records) + 4


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_epochs(tmp_path, range(1))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    records = recorder(tmp_path)
    write, calls = os.write, []

    def full(descriptor: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) == 1:
            return write(descriptor, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(UserError, match="No space left"):
            records.log("epoch", {"reward/mean": 1.0}, epoch=1)
    assert len(calls) == 2
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    records.log("epoch", {"reward/mean": 1.0}, epoch=1)
    records.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 5


def test_resuming_drops_exactly_what_will_be_run_again(tmp_path: Path) -> None:
    log_epochs(tmp_path, range(5))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines) + b'{"kind": "upd')
    with recorder(tmp_path) as records:
        records.truncate_after(3)
        assert path.read_bytes() == b"".join(lines[:12])
        records.log("epoch", {"reward/mean": 9.0}, epoch=3)
    read = read_metrics(path)
    assert [r["epoch"] for r in read] == [0] * 4 + [1] * 4 + [2] * 4 + [3]
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl"]


def test_the_evaluation_of_the_resumed_weights_can_be_kept(tmp_path: Path) -> None:
    log_epochs(tmp_path, range(5))
    with recorder(tmp_path) as records:
        records.truncate_after(3, keep_evaluation=True)
    read = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["kind"], r["epoch"]) for r in read[12:]] == [("evaluation", 3)]


def test_truncating_to_nothing_and_beyond_the_end(tmp_path: Path) -> None:
    log_epochs(tmp_path, range(2))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    with recorder(tmp_path) as records:
        records.truncate_after(2)
        assert path.read_bytes() == whole
        records.truncate_after(0)
        assert path.read_bytes() == b""


def test_a_kill_while_truncating_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_epochs(tmp_path, range(3))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    records = recorder(tmp_path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        records.truncate_after(1)
    assert path.read_bytes() == whole


def test_time_goes_on_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"kind": "epoch", "epoch": e, "time": 100.0 * e}) + "\n" for e in range(4)))
    with recorder(tmp_path) as records:
        assert 300 <= records.seconds() < 360
        records.truncate_after(2)
        records.log("epoch", {}, epoch=2)
    assert 100 <= read_metrics(path)[-1]["time"] < 160


def test_other_ranks_touch_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with RunRecorder(folder, tensorboard=True, wandb={"project": "x"}, enabled=False) as records:
        records.log("epoch", {"reward/mean": 1.0}, epoch=0)
        assert records.image("epoch_0000", torch.zeros(3, 4, 4), 0) is None
        records.truncate_after(0)
    assert not folder.exists()


def test_images_are_exact_and_replaced(tmp_path: Path) -> None:
    with recorder(tmp_path) as records:
        records.image("epoch_0000", torch.zeros(3, 4, 4), 0)
        pixels = torch.arange(48).reshape(3, 4, 4) / 255
        path = records.image("epoch_0000.png", pixels, 0)
    assert path == tmp_path / "images" / "epoch_0000.png"
    assert os.listdir(tmp_path / "images") == ["epoch_0000.png"]
    shown = np.asarray(Image.open(path)).transpose(2, 0, 1)
    assert (shown == np.arange(48).reshape(3, 4, 4)).all()


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a\\b"])
def test_image_names_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    with recorder(tmp_path) as records, pytest.raises(ValueError, match="image name"):
        records.image(name, torch.zeros(3, 4, 4), 0)


def test_summary(tmp_path: Path) -> None:
    make_run(tmp_path, epochs=20, finished=False)
    summary = write_summary(tmp_path, {"seconds": 12.5, "bad": math.nan})
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    held = [r["heldout/reward/mean"] for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "evaluation"]
    assert (summary["heldout_reward_before"], summary["heldout_reward_after"]) == (held[0], held[-1])
    assert summary["heldout_rewards"] == {"caption_match": {"before": held[0], "after": held[-1]}}
    assert (summary["epochs"], summary["updates"], summary["skipped_updates"]) == (20, 40, 1)
    assert summary["seconds"] == 12.5 and summary["bad"] is None
    assert 100 < summary["images_per_second"] < 115


def test_summary_of_a_run_that_trained_nothing(tmp_path: Path) -> None:
    make_run(tmp_path, epochs=0, finished=False)
    summary = write_summary(tmp_path)
    assert summary["heldout_reward_before"] == pytest.approx(0.625)
    assert summary["heldout_reward_after"] is None
    assert (summary["epochs"], summary["reward_before"], summary["images_per_second"]) == (0, None, None)
