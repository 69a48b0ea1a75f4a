"""The precision study runs, and what docs/kernels.md says of it is in its numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pcpo_kernels.dispatch import triton_installed

ROOT = Path(__file__).parents[2]
OURS = ("reference_endpoints", "kernel_endpoints", "kernel_key")


def test_committed_numbers() -> None:
    records = json.loads((ROOT / "benchmarks" / "results" / "kernels" / "precision.json").read_text())
    assert {record["size"] for record in records} == {"sd15_512", "flux_512", "flux_720", "flux_1024"}
    largest = {
        method: [record[method]["largest"] for record in records] for method in (*OURS, "eager_fp32", "stored_bf16")
    }
    assert max(max(largest[method]) for method in OURS) < 2.5e-10
    assert 2e-7 < max(largest["eager_fp32"]) < 2.4e-7
    assert 9e-4 < max(largest["stored_bf16"]) < 1e-3
    for record in records:
        assert all(record[method]["rms"] < 2e-3 * record["eager_fp32"]["rms"] for method in OURS)


@pytest.mark.slow
@pytest.mark.skipif(not triton_installed(), reason="triton is not installed")
def test_study_runs(tmp_path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PCPO_KERNELS"}
    command = [sys.executable, str(ROOT / "benchmarks" / "kernel_precision.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "benchmarks" / "results" / "kernels" / "precision.json").read_text())[0]
    assert all(record[method]["largest"] < record["eager_fp32"]["largest"] for method in OURS)
    assert (tmp_path / "docs" / "figures" / "kernel_precision.png").stat().st_size > 10_000
