"""The notebook in examples/, executed as Jupyter does it, on fewer images."""

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from notebook_cells import execute
from PIL import Image

from pcpo_fast.runs.input_record import read_record

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "notebook" / "own_reward.ipynb"
FEWER = {
    "train.epochs": 1,
    "train.micro_batch_size": 20,
    "rollout.images_per_prompt": 4,
    "evaluation.every": 1,
    "evaluation.prompts": 2,
    "evaluation.images_per_prompt": 1,
    "logging.tensorboard": False,
}


def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells), "strip the outputs"
    monkeypatch.chdir(NOTEBOOK.parent)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    module = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)
    shown = {}
    for cell in cells:
        shown[cell["id"]] = execute("".join(cell["source"]), f"<cell {cell['id']}>", module)
        if "parameters" in cell["metadata"].get("tags", ()):
            module.__dict__["settings"] |= FEWER | {"output_dir": str(tmp_path / "run")}
    for name in ("images", "sweep"):
        assert isinstance(shown[name], Image.Image) and np.asarray(shown[name].convert("L")).std() > 5
    assert shown["export"].folder == tmp_path / "run" / "export"
    run = module.__dict__["run"]
    assert run.summary["epochs"] == 1 and "heldout/reward/redness" in run.metrics[-1]
    assert list(module.__dict__["samples"].scores) == ["redness"]
    # What a notebook defines stands in no file: the run remembers it by its code.
    assert (read_record(run.folder) or {})["reward redness, module __main__"]["path"] == "the notebook"
