"""Collectives with one process and between two."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from pcpo_fast.distributed.collectives import (
    barrier,
    gather_objects,
    gather_rows,
    is_distributed,
    rank,
    shared_errors,
    sum_over_ranks,
    world_size,
)
from pcpo_fast.errors import UserError


def test_one_process_needs_no_group() -> None:
    rows = torch.arange(6.0).reshape(3, 2)
    assert (rank(), world_size(), is_distributed()) == (0, 1, False)
    barrier()
    assert torch.equal(gather_rows(rows), rows) and torch.equal(sum_over_ranks(rows), rows)
    assert sum_over_ranks(rows) is not rows
    assert gather_objects({"a": 1}) == [{"a": 1}]


def test_shared_errors_of_one_process() -> None:
    with pytest.raises(UserError, match=r"^mine$"), shared_errors():
        raise UserError("mine")
    with pytest.raises(KeyError), shared_errors():
        raise KeyError("not a user's mistake")
    with shared_errors():
        pass


def one_of_two(number: int, folder: str) -> None:
    """What each of the two processes does; its findings go to a file."""
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=number, world_size=2)
    findings: dict[str, Any] = {"rank": rank(), "world_size": world_size()}
    column_major = (torch.arange(6).reshape(3, 2) + 10 * number).T
    findings["rows"] = gather_rows(column_major).tolist()
    mine = torch.tensor([1.0, float(number)])
    findings["sum"] = sum_over_ranks(mine).tolist()
    findings["untouched"] = mine.tolist()
    findings["objects"] = gather_objects(f"rank {number}")
    try:
        with shared_errors():
            if number == 1:
                raise UserError("only the second failed")
    except UserError as error:
        findings["error"] = str(error)
    with shared_errors():
        findings["goes on"] = True
    Path(f"{folder}/{number}.json").write_text(json.dumps(findings))
    dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    for number in (0, 1):
        findings = json.loads((tmp_path / f"{number}.json").read_text())
        assert findings == {
            "rank": number,
            "world_size": 2,
            "rows": [[0, 2, 4], [1, 3, 5], [10, 12, 14], [11, 13, 15]],
            "sum": [2.0, 1.0],
            "untouched": [1.0, float(number)],
            "objects": ["rank 0", "rank 1"],
            "error": "only the second failed",
            "goes on": True,
        }
