"""Which backend is taken, and that nothing but tensors on a GPU needs Triton."""

import contextlib
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from cases import make_case
from pcpo_kernels import dispatch, philox_normal


@pytest.fixture(autouse=True)
def no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PCPO_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_cpu_takes_the_reference() -> None:
    assert dispatch.backend_for(torch.zeros(2)) == "reference"
    assert dispatch.backend_for(torch.zeros(2, dtype=torch.float64)) == "reference"


@pytest.mark.skipif(not dispatch.triton_installed(), reason="triton is not installed")
def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch) -> None:
    monkeypatch.setenv("PCPO_KERNELS", "triton")
    with pytest.raises(
        ValueError, match="tensors are on cpu, where Triton only runs in its interpreter: set TRITON_INTERP"
    ):
        make_case(2, (3,)).cast(torch.float32).run()
    seed = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        philox_normal(seed, seed, 4)
    # float64 is the reference's, whatever is asked for.
    assert dispatch.backend_for(torch.zeros(2, dtype=torch.float64)) == "reference"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.backend_for((torch.zeros(2), None, torch.zeros(2))) == "triton"
    assert dispatch.backend_for((torch.zeros(2), None, torch.zeros(2, dtype=torch.float64))) == "reference"


def test_triton_missing(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    assert dispatch.backend_for(torch.zeros(2)) == "reference"
    monkeypatch.setenv("PCPO_KERNELS", "triton")
    with pytest.raises(ValueError, match="triton is not installed"):
        dispatch.backend_for(torch.zeros(2))


@pytest.mark.skipif(not dispatch.triton_installed(), reason="triton is not installed")
@pytest.mark.parametrize(
    ("of_triton", "of_numpy", "works"),
    [("3.6.0", "2.4.0", False), ("3.6.0", "2.5.2", False), ("3.6.0", "2.3.5", True), ("3.7.1", "2.10.0rc1", True)],
)
def test_the_interpreter_of_triton_3_6_and_a_new_numpy(monkeypatch, of_triton, of_numpy, works) -> None:
    import numpy
    import triton

    monkeypatch.setattr(triton, "__version__", of_triton)
    monkeypatch.setattr(numpy, "__version__", of_numpy)
    reason = dispatch.interpreter_lacks()
    assert reason == (
        ""
        if works
        else f"the interpreter of Triton {of_triton} fails with numpy {of_numpy}: "
        "install numpy below 2.4, or Triton 3.7 or newer"
    )
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec = importlib.util.find_spec("pcpo_kernels.launch")
    assert spec is not None and spec.loader is not None
    with contextlib.nullcontext() if works else pytest.raises(ImportError, match="fails with numpy"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_imports_and_runs_without_triton() -> None:
    """A whole call in a process where importing Triton fails."""
    code = """
import sys
sys.modules["triton"] = None
import torch
import pcpo_kernels as k
key = k.NoiseKey(torch.arange(2), torch.zeros(2, dtype=torch.int64))
x, ones = torch.zeros(2, 3, requires_grad=True), torch.ones(2)
step = k.sample_step(x, x, ones, ones, ones, key)
k.policy_loss(x, step.next_latents, key, ones, ones, ones, ones, clip_range=0.1).loss.backward()
k.guidance(x, x, 2.0)
print("fine", not any(name.startswith("pcpo_kernels.") and name.endswith(".triton") for name in sys.modules))
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PCPO_", "TRITON_"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["fine", "True"], done.stderr
