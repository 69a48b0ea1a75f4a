"""Which implementation an op runs on: Triton where the tensor's device has it, the reference elsewhere."""

import importlib.util
import os
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["triton", "reference"]
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def backend_for(tensor: Tensor, *others: Tensor | None) -> Backend:
    """The backend for an op on tensors of one device.

    Triton for tensors on a GPU where Triton is installed, the reference for everything else and where one of them is
    float64, which the kernels do not know. The environment variable ``PCPO_KERNELS`` (``triton`` or ``reference``)
    overrides the choice; ``triton`` for tensors on the CPU needs Triton's interpreter.

    Raises:
        ValueError: ``PCPO_KERNELS`` is neither ``triton`` nor ``reference``, or asks for Triton where it cannot run.
    """
    choice = os.environ.get("PCPO_KERNELS", "")
    if choice not in ("", "triton", "reference"):
        raise ValueError(f"PCPO_KERNELS must be triton or reference, got {choice!r}")
    if choice == "reference" or any(t is not None and t.dtype == torch.float64 for t in (tensor, *others)):
        return "reference"
    if not choice:
        return "triton" if tensor.is_cuda and triton_installed() else "reference"
    if not triton_installed():
        raise ValueError("PCPO_KERNELS=triton, but triton is not installed")
    if not tensor.is_cuda and not interpreting():
        raise ValueError(
            f"PCPO_KERNELS=triton, but the tensors are on {tensor.device}, where Triton runs in its interpreter only: "
            "set TRITON_INTERPRET=1 or PCPO_KERNELS=reference"
        )
    return "triton"


def triton_installed() -> bool:
    """Whether Triton can be imported; looked up once, without importing it."""
    return _TRITON_INSTALLED


def interpreter_lacks() -> str:
    """Why Triton's interpreter fails here on any kernel with a loop; empty where it does not."""
    import numpy
    import triton

    old, new = (tuple(map(int, module.__version__.split(".")[:2])) for module in (triton, numpy))
    if old >= (3, 7) or new < (2, 4):
        return ""
    return (
        f"the interpreter of Triton {triton.__version__} fails with numpy {numpy.__version__}: "
        "install numpy below 2.4, or Triton 3.7 or newer"
    )


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
