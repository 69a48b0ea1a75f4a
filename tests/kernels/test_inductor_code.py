"""Inductor takes our kernels into its code: each by name, as often as in eager mode, without copies around them."""

import re

import pytest
import torch
from pcpo_kernels import swiglu
from pcpo_kernels.dispatch import interpreting

pytest.importorskip("triton")

from visible_cases import cases, run

pytestmark = [
    pytest.mark.skipif(interpreting(), reason="triton_op needs compiled kernels"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is made up where there is none; others compile for it"),
]

# Inductor's own kernels, forward and backward: what else there is to compute.
OWN = {
    "loss": [["zeros"], []],  # the arrival counters
    "step": [["zeros", "add"]],
    "norms": [["add"], ["cat"]],  # the chunks' gradients put together
    "swiglu": [[], []],
    "heads": [[], ["add"]],  # a weight of both sequences
    "neighbours": [["add", "sigmoid"], ["sigmoid", "mul"]],
}


def neighbours(x):
    """Elementwise operations before and after ours."""
    return torch.sigmoid(swiglu(x * 0.5 + 1) * 3) * 2


@pytest.fixture
def backend(monkeypatch, tmp_path):
    from inductor_gpu import DeviceProperties, gpu_backend

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    codes: list[str] = []
    yield gpu_backend(codes, monkeypatch), codes
    DeviceProperties.create.cache_clear()


def calls(code: str) -> list[tuple[str, str]]:
    """Each launch in generated code, in order: the kernel and its arguments."""
    return re.findall(r"^ +(\w+)_\d+\.run\((.*)\)$", code, re.MULTILINE)


@pytest.mark.parametrize("name", list(OWN))
def test_generated_code_launches_our_kernels(shown_launches, backend, name) -> None:
    inductor, codes = backend
    function, given, wanted = {"neighbours": (neighbours, cases()["swiglu"][1], 1), **cases()}[name]
    run(function, given, wanted)
    eager = [launch.function[0] for launch in shown_launches]
    shown_launches.clear()
    run(torch.compile(function, fullgraph=True, backend=inductor), given, wanted)
    assert len(codes) == len(OWN[name])  # one graph, or two with the backward
    assert [kernel for code in codes for kernel, _ in calls(code) if not kernel.startswith("triton_")] == eager
    for code, expected in zip(codes, OWN[name], strict=True):
        own = [kernel for kernel, _ in calls(code) if kernel.startswith("triton_")]
        assert len(own) == len(expected), own
        assert all(what in kernel for what, kernel in zip(expected, own, strict=True)), own
        assert not re.search(r"torch\.ops\.pcpo_kernels|extern_kernels\.\w+\(|aten\.\w+\.\w+\(|\.copy_\(", code)


@pytest.mark.parametrize(("name", "kernel"), [("loss", "policy_loss_forward_kernel"), ("step", "sample_step_kernel")])
def test_arrival_counters_are_cleared_in_every_call(shown_launches, backend, name, kernel) -> None:
    inductor, codes = backend
    function, given, _ = cases()[name]
    with torch.no_grad():
        run(torch.compile(function, fullgraph=True, backend=inductor), given, 0)
    (code,) = codes
    (counters,) = re.findall(r"(buf\d+) = empty_strided_cuda\(\(4, \), \(1, \), torch\.int32\)", code)
    touching = [by for by, arguments in calls(code) if counters in arguments.split(", ")]
    assert len(touching) == 2
    assert "zeros" in touching[0]
    assert touching[1] == kernel
