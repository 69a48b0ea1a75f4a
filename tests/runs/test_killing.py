"""Runs that are killed with SIGKILL at random moments, also inside the writing of a checkpoint: nothing is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "kill_test.json"


@pytest.mark.parametrize("kills", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_and_ends_as_if_it_had_not_been(tmp_path: Path, kills: int) -> None:
    answer = tmp_path / "kills.json"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    } | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [
        sys.executable,
        str(ROOT / "tests" / "runs" / "kill_runs.py"),
        "--kills",
        str(kills),
        "--seed",
        os.environ.get("PCPO_TEST_SEED", "0"),
    ]
    process = subprocess.run(
        [*command, "--json", str(answer)], env=environment, capture_output=True, text=True, timeout=120 + 60 * kills
    )
    assert answer.exists(), process.stderr
    result = json.loads(answer.read_text())
    assert result["problems"] == []
    assert result["kills"] >= kills and result["runs_through_to_the_end_bit_identical"] >= 1
    assert result["most_epochs_lost"] <= result["interval"]
    assert result["kills_inside_a_checkpoint_write"] >= kills // 8, "the moments are badly chosen: few are in a write"


def test_the_committed_results_are_of_enough_kills() -> None:
    result = json.loads(RESULTS.read_text())
    assert result["kills"] == len(result["each"]) >= 50 and result["problems"] == []
    assert result["kills_inside_a_checkpoint_write"] >= 10
    assert result["most_epochs_lost"] <= result["interval"]
