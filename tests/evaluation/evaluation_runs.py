"""A run directory whose weights are the base model's with noise: evaluated without having been trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import write_config
from safetensors.torch import load_file, save_file
from tiny_pipeline import PROMPTS

from pcpo_fast.config.loading import load_config


def fake_run(folder: Path, pipeline: Path, strength: float = 0.05, **changes: Any) -> Path:
    """``folder/run`` with a configuration and a full export; images are 32 x 40, large enough for every metric."""
    folder.mkdir(parents=True, exist_ok=True)
    config = load_config(write_config(folder, pipeline, **({"model__height": 32, "model__width": 40} | changes)))
    run = folder / "run"
    export = run / "export" / "transformer"
    export.mkdir(parents=True)
    (run / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    generator = torch.Generator().manual_seed(1)
    (source,) = (pipeline / "transformer").glob("*.safetensors")
    weights = {
        name: value + strength * torch.randn(value.shape, generator=generator)
        for name, value in load_file(source).items()
    }
    save_file(weights, export / source.name)
    (export / "config.json").write_bytes((pipeline / "transformer" / "config.json").read_bytes())
    return run


@pytest.fixture(scope="module")
def evaluated_run(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not write into it."""
    return fake_run(tmp_path_factory.mktemp("evaluated"), pipeline_folder)


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS[:3]), encoding="utf-8")
    return file
