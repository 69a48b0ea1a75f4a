"""What the Triton ops share on the host: how rows and tokens are cut, scratch memory, launch options, registration."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple, get_type_hints

import torch
import triton
from torch import Tensor

from pcpo_kernels.dispatch import interpreter_lacks, interpreting

if interpreting() and (_reason := interpreter_lacks()):
    raise ImportError(_reason)

SCHEMA_TYPES: dict[Any, str] = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "int", bool: "bool"}
SCHEMA_TYPES |= {torch.dtype: "ScalarType", torch.dtype | None: "ScalarType?"}
_counters: dict[int, Tensor] = {}


class Plan(NamedTuple):
    """How a row is cut: a program takes ``ITERATIONS`` blocks of ``BLOCK`` elements.

    It depends on the row's length alone, so a row's sums have the same bits in a batch of any size.
    """

    BLOCK: int
    ITERATIONS: int

    @property
    def warps(self) -> int:
        """So many that a thread has at least 8 elements where the row is long enough: 16 bytes of bf16."""
        return min(4, max(1, self.BLOCK // 256))

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of a launch that cuts rows this way.

        Fused multiply-add only where a kernel writes ``tl.fma``: Triton's default is about to change, and it changes
        bits.
        """
        return {"BLOCK": self.BLOCK, "ITERATIONS": self.ITERATIONS, "num_warps": self.warps, "enable_fp_fusion": False}

    def chunks(self, elements: int) -> int:
        """Programs per row, at least one."""
        return max(1, triton.cdiv(elements, self.BLOCK * self.ITERATIONS))


def plan_for(elements: int) -> Plan:
    """Blocks of 2048 (16 elements a thread: two 16-byte loads of bf16), smaller for rows that do not fill one."""
    block = min(2048, max(128, triton.next_power_of_2(elements)))
    return Plan(block, 1 if elements <= 1 << 20 else 2)


def tokens_per_program(tokens: int) -> int:
    """How many consecutive tokens of one image a backward program takes.

    It depends on the length of the sequence alone, so an image's sums have the same bits in a batch of any size. Few
    for short sequences, so that there are programs enough; many for long ones, so that partial sums cost little.
    """
    return min(16, max(4, triton.next_power_of_2(tokens) // 256))


def block_options(elements: int, *, sums: int = 0) -> dict[str, Any]:
    """Block and warps for rows of so many elements: 16 of them per thread of a large row, 8 where three sums are kept.

    So a thread needs at most 128 registers, and still loads 16 bytes of bf16 at once.
    """
    block = triton.next_power_of_2(elements)
    warps = min(16 if sums == 3 else 8, max(1, block // 256))
    return {"BLOCK": block, "num_warps": warps, "enable_fp_fusion": False}


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make a GPU tensor's device the current one for a launch; free where it already is."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def arrival_counters(like: Tensor, rows: int) -> Tensor:
    """``rows + 1`` int32 zeros that a kernel leaves zero: finished rows, then arrivals at each row.

    On a GPU's default stream they are kept, so that no launch is spent on clearing them. Elsewhere they are fresh:
    kernels of two streams may run beside each other, a captured graph needs its own, and memory that another library's
    pool lends to its stream must not be held beyond the call.
    """
    device = like.device
    if not like.is_cuda or torch.cuda.current_stream(device) != torch.cuda.default_stream(device):
        return torch.zeros(rows + 1, dtype=torch.int32, device=device)
    counters = _counters.get(device.index)
    if counters is None or counters.numel() < rows + 1:
        counters = torch.zeros(max(rows + 1, 1024), dtype=torch.int32, device=device)
        _counters[device.index] = counters
    return counters


def rows_contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself where each row is contiguous, whatever the distance between rows; otherwise a copy."""
    if tensor.is_contiguous():
        return tensor
    expected = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor


def channels_contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself where its last axis is contiguous, whatever the other strides; otherwise a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def row_values(values: Tensor) -> Tensor:
    """[B] as the kernels read it: contiguous, and float32 where it was float64."""
    if values.dtype == torch.float64:
        values = values.to(torch.float32)
    return values.contiguous()


def parameters(fields: type[NamedTuple]) -> str:
    """The fields of a named tuple, as an operator's schema lists its parameters."""
    return ", ".join(f"{SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(fields).items())


def register(name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define the operator ``pcpo_kernels::name``, for GPUs, for the interpreter on CPUs, and for tracing.

    Every operator is functional: fresh outputs, inputs untouched.
    """
    qualified = f"pcpo_kernels::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, ("cuda", "cpu"), implementation)
    torch.library.register_fake(qualified, fake)
