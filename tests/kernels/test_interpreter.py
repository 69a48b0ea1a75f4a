"""Runs the folder ``device`` in Triton's interpreter: kernels proved on a machine without a GPU.

The interpreter is chosen when the kernels are imported, so this takes processes of its own; two of them share the work.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pcpo_kernels.dispatch import interpreting, triton_installed

DEVICE = Path(__file__).parent / "device"
LONGEST = DEVICE / "test_device_policy_loss.py"
PARTS = [[LONGEST], sorted(set(DEVICE.glob("test_*.py")) - {LONGEST})]


@pytest.mark.skipif(not triton_installed(), reason="triton is not installed")
@pytest.mark.skipif(interpreting(), reason="this process is the interpreter already")
@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_in_the_interpreter(chosen: str) -> None:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PCPO_KERNELS", "PYTEST_"))
    }
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    # numpy warns of what float32 arithmetic on a GPU does in silence: 0/0 in a branch that is not taken.
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning:triton", "-m", chosen]
    running = []
    for part in PARTS:
        command = [sys.executable, "-m", "pytest", *options, *map(str, part)]
        running.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    outputs = [process.communicate()[0] for process in running]
    for process, output in zip(running, outputs, strict=True):
        if chosen == "slow" and process.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
            continue
        assert process.returncode == 0, output
        counted = re.search(r"(\d+) passed", output)
        assert counted is not None and int(counted[1]) >= 20, output
