"""What made a run: recorded at each start, with secrets left out, and shown on its page."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import pcpo_fast
from pcpo_fast.config.loading import load_config
from pcpo_fast.reporting.report import write_report
from pcpo_fast.runs import provenance
from pcpo_fast.runs.provenance import copy_provenance, read_provenance, write_provenance


def recorded(folder: Path, *settings: str, epoch: int = 0) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    write_provenance(folder, load_config(None, [f"output_dir={folder}", *settings]), epoch)
    return read_provenance(folder)[-1]


def test_a_start_names_what_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pcpo-fast", "train", "rewards.0.options={api_key: abc, url: x}", "a.token=def"])
    found = recorded(tmp_path / "a")
    assert found["pcpo_fast"] == pcpo_fast.__version__ and found["libraries"]["torch"] == metadata.version("torch")
    assert found["command"].startswith("pcpo-fast train ") and "url: x" in found["command"]
    assert "abc" not in found["command"] and "def" not in found["command"]
    other, changed = recorded(tmp_path / "b"), recorded(tmp_path / "c", "optimizer.lr=3e-5")
    assert found["configuration_sha256"] == other["configuration_sha256"] != changed["configuration_sha256"]


def test_starts_add_up_until_a_run_begins_anew(tmp_path: Path) -> None:
    recorded(tmp_path / "run")
    recorded(tmp_path / "run", epoch=3)
    assert [start["after_epoch"] for start in read_provenance(tmp_path / "run")] == [0, 3]
    recorded(tmp_path / "run")
    assert [start["after_epoch"] for start in read_provenance(tmp_path / "run")] == [0]
    (tmp_path / "run" / "provenance.json").write_text("{")
    assert read_provenance(tmp_path / "run") == []


def test_the_commit_is_that_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_CHECKOUT", tmp_path)
    assert (recorded(tmp_path / "none")["commit"], recorded(tmp_path / "none")["commit_dirty"]) == (None, None)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    found = recorded(tmp_path / "run")  # a run in the checkout is no change of it
    assert (found["commit"], found["commit_dirty"]) == (head, False)
    (tmp_path / "file").write_text("2")
    assert recorded(tmp_path / "run")["commit_dirty"] is True


def test_page_and_exports_carry_it(tmp_path: Path) -> None:
    folder, target = tmp_path / "run", tmp_path / "export"
    found = recorded(folder)
    (folder / "config.yaml").write_text("seed: 0\n")
    page = write_report(folder).read_text()
    assert "<summary>Provenance</summary>" in page and found["configuration_sha256"] in page
    assert f"torch {found['libraries']['torch']}" in page
    target.mkdir()
    copy_provenance(folder, target)
    assert json.loads((target / "provenance.json").read_text()) == [found]
    copy_provenance(tmp_path, target)  # a run from before there was a record
