"""SwiGLU in plain PyTorch: the reference for the kernels' tests and the path on CPUs."""

from torch import Tensor
from torch.nn import functional

from pcpo_kernels.arithmetic import wide_dtype


def swiglu(x: Tensor) -> Tensor:
    """Plain PyTorch version of :func:`pcpo_kernels.swiglu`."""
    first, second = x.to(wide_dtype(x)).chunk(2, dim=-1)
    return (functional.silu(first) * second).to(x.dtype)
