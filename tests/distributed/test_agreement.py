"""What ranks must have in common before anything is loaded, and the sentence where they have not."""

from pathlib import Path

import pytest
from tiny_pipeline import tiny_config

import pcpo_fast.distributed.agreement as agreement
from pcpo_fast.distributed.agreement import check_agreement, disagreement, facts
from pcpo_fast.errors import UserError


def test_one_process_agrees_with_itself(pipeline_folder: Path) -> None:
    config = tiny_config(pipeline_folder)
    check_agreement(config)
    mine = facts(config)
    assert disagreement([("a", mine), ("b", dict(mine))]) is None
    assert {"torch", "deepspeed", "source code", "setting optimizer.lr"} <= mine.keys()
    own = {"setting model.path", "setting model.transformer", "setting model.unet", "setting model.embedding_cache"}
    assert not own & mine.keys() and mine["setting train.epochs"] == "2"


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
