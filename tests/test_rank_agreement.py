"""What ranks must have in common before anything is loaded, and the sentence where they have not."""

import shutil
from pathlib import Path

import pytest
from tiny_pipeline import tiny_config

import pcpo_fast.rank_agreement as agreement
from pcpo_fast.errors import UserError
from pcpo_fast.fingerprints import folder_digest
from pcpo_fast.rank_agreement import check_agreement, disagreement, facts


def test_one_process_agrees_with_itself(pipeline_folder: Path) -> None:
    config = tiny_config(pipeline_folder)
    check_agreement(config)
    mine = facts(config)
    assert disagreement([("a", mine), ("b", dict(mine))]) is None
    assert {"torch", "deepspeed", "source code", "model files", "setting optimizer.lr"} <= mine.keys()
    assert "setting model.path" not in mine and mine["setting train.epochs"] == "2"


def test_who_differs_and_in_what(pipeline_folder: Path) -> None:
    first = facts(tiny_config(pipeline_folder))
    old = first | {"torch": "1.0"}
    other = facts(tiny_config(pipeline_folder, "optimizer.lr=0.5"))
    text = disagreement([("a", first), ("a", first), ("b", old), ("b", old), ("c", other)])
    assert text is not None and text.startswith("ranks differ from rank 0 on a: ranks 2-3 on b: torch 1.0, not ")
    assert "; rank 4 on c: setting optimizer.lr 0.5, not 0.001" in text
    many = dict.fromkeys(first, "?")
    assert f"; and {len(first) - 4} more differences" in str(disagreement([("a", first), ("b", many)]))


def test_every_rank_refuses(pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(pipeline_folder)
    gathered = [("a", facts(config)), ("b", facts(config) | {"source code": "other"})]
    monkeypatch.setattr(agreement, "is_distributed", lambda: True)
    monkeypatch.setattr(agreement, "gather_objects", lambda mine: [mine, gathered[1]])
    with pytest.raises(UserError, match="rank 1 on b: source code other, not "):
        check_agreement(config)


def test_the_model_is_compared_by_content_not_by_place(pipeline_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(pipeline_folder, tmp_path / "elsewhere"))
    digest = folder_digest(pipeline_folder)
    assert folder_digest(copy) == digest
    (copy / ".cache").mkdir()
    (copy / ".cache" / "download.lock").touch()
    assert folder_digest(copy) == digest
    weights = next(copy.glob("transformer/*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert folder_digest(copy) != digest


def test_a_model_of_the_hub_is_known_by_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(path: str) -> str:
        return facts(tiny_config(Path("unused"), f"model.path={path}"))["model files"]

    assert digest("owner/name") == "from the hub" and digest("no/such/folder") == "no folder"
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda *_, **__: "hub/snapshots/abc12/model_index.json"
    )
    assert digest("owner/name") == "abc12"
