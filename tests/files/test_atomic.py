"""pcpo_fast.files.atomic: a file is whole or untouched."""

import os
from pathlib import Path

import pytest

from pcpo_fast.files.atomic import write_atomically


def test_writes_bytes_and_text_and_makes_folders(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a" / "b" / "data.bin", b"\x00\xff")
    write_atomically(tmp_path / "text.txt", "zwölf\r\nlines\n")
    assert (tmp_path / "a" / "b" / "data.bin").read_bytes() == b"\x00\xff"
    assert (tmp_path / "text.txt").read_bytes() == "zwölf\r\nlines\n".encode()


def test_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["x.json"]


def test_failure_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk gone"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.json"]


def test_permissions_are_those_of_an_ordinary_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "ours", b"")
    (tmp_path / "theirs").write_bytes(b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "theirs").stat().st_mode
