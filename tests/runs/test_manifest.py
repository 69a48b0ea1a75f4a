"""A folder's manifest: every kind of damage is seen, and what was written wrongly is not recorded as right."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pcpo_fast.runs.checkpoint import obsolete
from pcpo_fast.runs.manifest import MANIFEST_FILE, changed_file, damage_of, missing_or_resized, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as a checkpoint's, with its manifest."""
    folder = tmp_path / "epoch"
    (folder / "engine").mkdir(parents=True)
    (folder / "weights").mkdir()
    torch.save({"w": torch.arange(1000.0)}, folder / "engine" / "shard.pt")
    save_file({"w": torch.arange(1000.0)}, folder / "weights" / "w.safetensors")
    (folder / "state.json").write_text("{}")
    write_manifest(folder)
    return folder


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_a_whole_folder_has_no_damage(folder: Path) -> None:
    assert missing_or_resized(folder) is None and damage_of(folder) is None and changed_file(folder, "weights") is None
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    assert set(manifest["files"]) == {"engine/shard.pt", "weights/w.safetensors", "state.json"}
    assert manifest["files"]["state.json"] == {
        "bytes": 2,
        "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    }


@pytest.mark.parametrize(
    ("spoil", "words", "visible"),
    [
        (lambda f: flip(f / "engine" / "shard.pt", 3000), "engine/shard.pt is corrupt", False),
        (lambda f: flip(f / "weights" / "w.safetensors", -1), "weights/w.safetensors is corrupt", False),
        (lambda f: (f / "state.json").write_text("[]"), "state.json is corrupt", False),
        (lambda f: (f / "state.json").write_text("{} "), "state.json has 3 bytes, not 2", True),
        (lambda f: (f / "weights" / "w.safetensors").unlink(), "weights/w.safetensors is missing", True),
        (lambda f: (f / "engine" / "other.pt").touch(), "engine/other.pt is not in its manifest", True),
        (lambda f: (f / MANIFEST_FILE).unlink(), "has no manifest.json", True),
        (lambda f: (f / MANIFEST_FILE).write_text("{"), "manifest.json cannot be read", True),
        (lambda f: (f / MANIFEST_FILE).write_text('{"files": {"a": {"bytes": 1}}}'), "cannot be read", True),
        (lambda f: (f / MANIFEST_FILE).write_text("[]"), "cannot be read", True),
    ],
    ids=["shard", "weights", "text", "longer", "missing", "extra", "none", "cut", "poor", "other"],
)
def test_damage_is_seen(folder: Path, spoil: Callable[[Path], None], words: str, visible: bool) -> None:
    spoil(folder)
    assert words in str(damage_of(folder))
    assert (missing_or_resized(folder) is not None) == visible


def test_one_part_of_a_folder_can_be_read_alone(folder: Path) -> None:
    flip(folder / "engine" / "shard.pt", 3000)
    assert changed_file(folder, "weights") is None
    flip(folder / "weights" / "w.safetensors", -1)
    assert "weights/w.safetensors is corrupt" in str(changed_file(folder, "weights"))
    (folder / "weights" / "w.safetensors").unlink()
    assert changed_file(folder, "weights") == "weights/w.safetensors is missing"


@pytest.mark.parametrize("name", ["/etc/hostname", "../outside"])
def test_a_manifest_names_nothing_outside_of_its_folder(folder: Path, name: str) -> None:
    (folder.parent / "outside").write_text("x")
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": ""}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert damage_of(folder) == "its manifest.json names a file outside of it"


def test_a_link_in_the_place_of_a_file_is_damage(folder: Path) -> None:
    path = folder / "state.json"
    path.rename(folder.parent / "state.json")
    path.symlink_to(folder.parent / "state.json")
    assert damage_of(folder) == "state.json is missing"


@pytest.mark.parametrize(
    ("name", "position"), [("engine/shard.pt", 3000), ("weights/w.safetensors", None)], ids=["flipped", "cut"]
)
def test_what_was_written_wrongly_gets_no_manifest(folder: Path, name: str, position: int | None) -> None:
    """A tensor's own checksum was made in memory, before the disk had it."""
    (folder / MANIFEST_FILE).unlink()
    if position is None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-10])
    else:
        flip(folder / name, position)
    with pytest.raises(OSError, match=name):
        write_manifest(folder)
    assert not (folder / MANIFEST_FILE).exists()


def kept(*rewards: float | None) -> list[tuple[Path, float | None]]:
    return [(Path(str(number)), reward) for number, reward in enumerate(rewards)]


@pytest.mark.parametrize(
    ("rewards", "keep", "keep_best", "gone"),
    [
        ((None,) * 4, 2, 0, "01"),
        ((None,) * 4, 2, 3, "01"),
        ((0.9, 0.5, 0.7, 0.1), 1, 1, "12"),
        ((0.9, 0.5, 0.7, 0.1), 1, 2, "1"),
        ((0.1, 0.5, 0.7, 0.9), 1, 1, "012"),
        ((0.5, 0.5, 0.1), 1, 1, "0"),
        ((0.5,), 3, 0, ""),
    ],
)
def test_retention(rewards: tuple[float | None, ...], keep: int, keep_best: int, gone: str) -> None:
    assert [str(path) for path in obsolete(kept(*rewards), keep, keep_best)] == list(gone)
