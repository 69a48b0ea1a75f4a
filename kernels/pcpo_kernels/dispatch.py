"""Choice of implementation: Triton for tensors on a GPU, the reference otherwise."""

import importlib.util
import os
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["triton", "reference"]
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def backend_for(tensors: Tensor | tuple[Tensor | None, ...]) -> Backend:
    """The backend for an op on one tensor, or on several of one device, of which the first is never None.

    Triton for tensors on a GPU if it is installed; the reference otherwise, and if any tensor is float64, which the
    kernels do not support. The environment variable ``PCPO_KERNELS`` (``triton`` or ``reference``) overrides the
    choice; ``triton`` for tensors on the CPU needs Triton's interpreter.

    Raises:
        ValueError: ``PCPO_KERNELS`` is neither ``triton`` nor ``reference``, or requests Triton where it cannot run.
    """
    if isinstance(tensors, Tensor):
        tensors = (tensors,)
    choice = os.environ.get("PCPO_KERNELS", "")
    if choice not in ("", "triton", "reference"):
        raise ValueError(f"PCPO_KERNELS must be triton or reference, got {choice!r}")
    if choice == "reference" or any(t is not None and t.dtype == torch.float64 for t in tensors):
        return "reference"
    tensor = tensors[0]
    assert tensor is not None
    if not choice:
        return "triton" if tensor.is_cuda and triton_installed() else "reference"
    if not triton_installed():
        raise ValueError("PCPO_KERNELS=triton, but triton is not installed")
    if not tensor.is_cuda and not interpreting():
        raise ValueError(
            f"PCPO_KERNELS=triton, but the tensors are on {tensor.device}, where Triton only runs in its interpreter: "
            "set TRITON_INTERPRET=1 or PCPO_KERNELS=reference"
        )
    return "triton"


def triton_installed() -> bool:
    """Whether Triton is installed; checked once, without importing it."""
    return _TRITON_INSTALLED


def interpreter_lacks() -> str:
    """Why Triton's interpreter fails here on every kernel with a loop; empty if it works."""
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
