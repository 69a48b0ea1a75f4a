"""ZeRO++'s second copy of the weights within a machine: the same run. Two pairs of CPU ranks stand for two machines."""

import json
from pathlib import Path
from typing import Any

import pytest
from cli_runs import ROOT, records, write_config
from launched_ranks import launch_ranks


def launched(folder: Path, pipeline: Path, name: str, zero: dict[str, Any], finetune: str) -> list[dict[str, Any]]:
    """Metrics of a run on four ranks, without what a clock measures."""
    ds_config = folder / f"{name}.json"
    ds_config.write_text(json.dumps({"zero_optimization": zero}))
    changes: dict[str, Any] = {
        "output_dir": str(folder / name),
        "deepspeed": str(ds_config),
        "model__finetune": finetune,
        **({"model__lora": {"rank": 2, "alpha": 4.0}} if finetune == "lora" else {}),
        "rewards": [{"name": "tiny_pipeline:redness"}],
        "train__updates_per_epoch": 1,
        "train__micro_batch_size": 3,
    }
    config = write_config(folder, pipeline, **changes)
    path = f"{ROOT / 'tests' / 'support'}:{ROOT}"
    script = ROOT / "train.py"
    done = launch_ranks(4, script, "--config", config, folder=folder, timeout=600, PYTHONPATH=path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    timed = ("time", "throughput", "memory")
    return [{key: value for key, value in line.items() if not key.startswith(timed)} for line in records(folder / name)]


@pytest.mark.slow
@pytest.mark.parametrize("finetune", ["full", "lora"])
def test_a_second_copy_within_each_machine_changes_no_number(
    tmp_path: Path, pipeline_folder: Path, finetune: str
) -> None:
    shipped = json.loads((ROOT / "ds_configs" / "zero3_hpz.json").read_text())["zero_optimization"]
    second_copy = launched(tmp_path, pipeline_folder, "second", {**shipped, "zero_hpz_partition_size": 2}, finetune)
    plain = {key: value for key, value in shipped.items() if key != "zero_hpz_partition_size"}
    assert launched(tmp_path, pipeline_folder, "plain", plain, finetune) == second_copy
    assert len(second_copy) >= 6
