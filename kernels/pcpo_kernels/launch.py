"""What the Triton ops share on the host: how rows and tokens are cut, scratch memory, launching."""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from pcpo_kernels.dispatch import interpreter_lacks, interpreting

if interpreting() and (_reason := interpreter_lacks()):
    raise ImportError(_reason)

COMPILED = tl.constexpr(not interpreting())
"""For kernels: whether they are compiled, not interpreted."""
FINISH = 128
"""How many partial sums of a row are added at once."""
_MOST_KINDS = 4096
_counters: dict[int, Tensor] = {}
_compiled: dict[Any, Any] = {}
# How a compiled kernel is launched is known of these releases. On AMD, Triton specialises on the size of a tensor's
# storage as well; the interpreter compiles nothing.
_KNOWN = ("3.6.", "3.7.", "3.9.")
_remembers = triton.__version__.startswith(_KNOWN) and torch.version.hip is None and not interpreting()


class _Traced(threading.local):
    now = False  # whether this thread's host code runs for a tracer


_traced = _Traced()


def cdiv(count: int, size: int) -> int:
    """How many pieces of a size there are, rounded up; Triton's own takes a microsecond."""
    return -(-count // size)


class Plan(NamedTuple):
    """How a row is cut: a program takes ``ITERATIONS`` blocks of ``BLOCK`` elements.

    It depends on the row's length alone, so a row's sums have the same bits in a batch of any size.
    """

    BLOCK: int
    ITERATIONS: int

    @property
    def warps(self) -> int:
        """Few enough that each thread has at least 8 elements (16 bytes of bf16), if the row is long enough."""
        return min(4, max(1, self.BLOCK // 256))

    def chunks(self, elements: int) -> int:
        """Programs per row, at least one."""
        return max(1, cdiv(elements, self.BLOCK * self.ITERATIONS))


@functools.cache
def plan_for(elements: int) -> Plan:
    """Blocks of 2048 (16 elements a thread: two 16-byte loads of bf16), smaller for rows that do not fill one."""
    block = min(2048, max(128, triton.next_power_of_2(elements)))
    blocks = cdiv(elements, block)
    # A row's programs are along the grid's second axis, which has at most 65535.
    return Plan(block, 1 if blocks <= 512 else max(2, triton.next_power_of_2(cdiv(blocks, 65535))))


def tokens_per_program(tokens: int) -> int:
    """How many consecutive tokens of one image a backward program takes.

    It depends on the length of the sequence alone, so an image's sums have the same bits in a batch of any size. Few
    for short sequences, so that there are programs enough; many for long ones, so that partial sums cost little.
    """
    return 4 if tokens <= 1024 else 8 if tokens <= 2048 else 16


def launch(
    kernel: Any,
    like: Tensor,
    grid: tuple[int, int, int],
    warps: int,
    pointers: Sequence[Tensor | None],
    *numbers: Any,
) -> None:
    """Launch a kernel on the device of ``like``.

    Fused multiply-add only where a kernel writes ``tl.fma``: Triton's default is about to change, and it changes bits.

    Triton binds and inspects every argument of every launch, which takes longer than all else that a small op does on
    the host. A kernel that was compiled for arguments of the same kind is remembered here and launched directly.

    Args:
        kernel: a Triton function.
        like: a tensor on the device.
        grid: programs along each axis.
        warps: warps per program.
        pointers: the kernel's tensors, which are its first parameters.
        numbers: the others, in its order, with its constants last.
    """
    if _traced.now:
        torch.library.wrap_triton(kernel)[grid](*pointers, *numbers, num_warps=warps, enable_fp_fusion=False)
        return None
    if like.is_meta:  # there is nothing to compute
        return None
    device = like.device.index
    if device is not None and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, like, grid, warps, pointers, *numbers)
    if not _remembers or _hooked():
        kernel[grid](*pointers, *numbers, num_warps=warps, enable_fp_fusion=False)
        return None
    # At least as fine as what Triton specialises on.
    kinds = [None if p is None else (p.dtype, p.data_ptr() % 16 == 0) for p in pointers]
    key = (kernel.fn, device, warps, *kinds, *numbers)
    compiled = _compiled.get(key)
    if compiled is None:
        if len(_compiled) >= _MOST_KINDS:
            _compiled.clear()
        _compiled[key] = kernel[grid](*pointers, *numbers, num_warps=warps, enable_fp_fusion=False)
        return None
    stream = driver.active.get_current_stream(device)
    compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *pointers, *numbers)
    return None


def traced(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The same host code for a tracer such as torch.compile, which is to see the launches of kernels."""

    def run(*arguments: Any) -> Any:
        before, _traced.now = _traced.now, True
        try:
            return implementation(*arguments)
        finally:
            _traced.now = before

    return run


def _hooked() -> bool:
    """Whether a profiler listens to Triton's launches."""
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def arrival_counters(like: Tensor, rows: int) -> Tensor:
    """``rows + 1`` int32 zeros that a kernel leaves zero: finished rows, then arrivals at each row.

    On a GPU's default stream they are kept, so that no launch is spent on clearing them. Elsewhere they are fresh:
    kernels of two streams may run beside each other, a captured graph needs its own, and memory that another library's
    pool lends to its stream must not be held beyond the call.
    """
    device = like.device
    if _traced.now or not like.is_cuda or torch.cuda.current_stream(device) != torch.cuda.default_stream(device):
        return torch.zeros(rows + 1, dtype=torch.int32, device=device)
    counters = _counters.get(device.index)
    if counters is None or counters.numel() < rows + 1:
        counters = torch.zeros(max(rows + 1, 1024), dtype=torch.int32, device=device)
        _counters[device.index] = counters
    return counters


def as_read(tensor: Tensor | None) -> Tensor | None:
    """An image tensor or a value per row as the kernels read it: the tensor itself where possible, otherwise a copy.

    Of an image tensor each row must be contiguous, whatever the distance between rows. Values per row [B] are
    contiguous, and float32 where they were float64.
    """
    if tensor is None or (tensor.is_contiguous() and (tensor.dtype != torch.float64 or tensor.dim() > 1)):
        return tensor
    if tensor.dim() == 1:
        return tensor.to(torch.float32 if tensor.dtype == torch.float64 else tensor.dtype).contiguous()
    expected = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor


def all_as_read(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Each tensor :func:`as_read`; that most of them can be read as they are is found without a call."""
    double = torch.float64
    return [t if t is None or (t.is_contiguous() and t.dtype != double) else as_read(t) for t in tensors]


def channels_contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself where its last axis is contiguous, whatever the other strides; otherwise a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Unwritten memory of the tensor's shape, contiguous; ``new_empty`` takes twice as long to read a shape."""
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def empty_scalar(like: Tensor) -> Tensor:
    """Unwritten memory for a float32 scalar. One allocated as such, Inductor fills, which takes a launch."""
    if _traced.now:
        return like.new_empty(1, dtype=torch.float32).squeeze(0)
    return like.new_empty((), dtype=torch.float32)


def row_strides(*tensors: Tensor | None) -> list[int]:
    """From one row of a tensor to the next; 0 where there is none."""
    return [0 if tensor is None else tensor.stride(0) for tensor in tensors]
