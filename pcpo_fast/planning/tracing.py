"""Floating-point operations and memory of a forward and backward, counted operation by operation on the meta device.

Meta tensors have shapes and storages but no memory, so FLUX can be traced on a laptop. Workspace inside an operation is
not seen: for convolutions on a CPU it is known and added; on a GPU cuDNN chooses it. Attention and RMS norms are
counted as the fused operations that a GPU runs.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from pcpo_fast.config.schema import Checkpointing
from pcpo_fast.policies.base import Policy
from pcpo_fast.policies.speed import checkpoint_blocks

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""Runs on the meta device; like flash attention it saves inputs, output and log-sum-exp, but no S x S matrix."""
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Cost(NamedTuple):
    """Operations and memory of a traced pass.

    Attributes:
        flops: floating-point operations of matrix products, convolutions and attention, two per multiply-add; the
            backward of attention counts twice its forward.
        recomputed: operations done a second time: the scores in the backward of attention.
        saved: bytes alive at the end of the forward: the output and what is saved for the backward.
        peaks: for each segment of the pass, the highest number of bytes alive beyond those alive before the pass.
    """

    flops: float
    recomputed: float
    saved: float
    peaks: Mapping[str, float]

    @property
    def peak(self) -> float:
        """The highest of all segments, in bytes."""
        return max(self.peaks.values())

    def combine(self, other: "Cost", mine: float, others: float) -> "Cost":
        """``mine * self + others * other``, number by number."""
        peaks = {name: mine * self.peaks[name] + others * other.peaks[name] for name in self.peaks}
        return Cost(
            mine * self.flops + others * other.flops,
            mine * self.recomputed + others * other.recomputed,
            mine * self.saved + others * other.saved,
            peaks,
        )


@contextmanager
def fused_operations(fused_norms: bool) -> Iterator[None]:
    """Count attention, and on GPUs RMS norms, as one operation each; the meta device would decompose them.

    A ``TorchFunctionMode`` cannot do this: it is inactive during the backward, so it would miss recomputation.
    """
    attention, norm = F.scaled_dot_product_attention, F.rms_norm
    F.scaled_dot_product_attention = _attention
    if fused_norms:
        F.rms_norm = _rms_norm
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.rms_norm = attention, norm


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    result: Tensor = ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return result


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    result: Tensor = _FusedRmsNorm.apply(input, weight, len(normalized_shape))
    return result


class _FusedRmsNorm(torch.autograd.Function):
    """Has the memory behaviour of CUDA's fused RMS norm, which saves its input and one float32 per row."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor | None, dimensions: int) -> Tensor:
        rows = torch.empty(*input.shape[:-dimensions], *[1] * dimensions, dtype=torch.float32, device=input.device)
        ctx.save_for_backward(input, weight, rows)
        return torch.empty_like(input)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        input, weight, _ = ctx.saved_tensors
        needed = ctx.needs_input_grad
        return (
            torch.empty_like(input) if needed[0] else None,
            torch.empty_like(weight) if needed[1] else None,
            None,
        )


class Accountant(TorchDispatchMode):
    """Counts operations, and the bytes of all live storages.

    Args:
        known: storages to ignore, such as those of weights.
        on_gpu: False adds the workspace of convolutions on a CPU.
    """

    def __init__(self, known: set[int], *, on_gpu: bool) -> None:
        super().__init__()
        self.known, self.on_gpu = known, on_gpu
        self.flops = self.recomputed = 0.0
        self.live = 0
        self.segment = "forward"
        self.peaks = {self.segment: 0}
        self._alive: dict[int, weakref.ref[Any]] = {}

    def enter(self, segment: str) -> None:
        """Start a new segment."""
        self.segment = segment
        self.peaks[segment] = max(self.peaks.get(segment, 0), self.live)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self._count(function._overloadpacket, args, kwargs or {}, result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._watch(leaf)
        if not self.on_gpu:
            inside = _blocked_copies(function._overloadpacket, args, result)
            self.peaks[self.segment] = max(self.peaks[self.segment], self.live + inside)
        return result

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        name, size = storage._cdata, storage.nbytes()
        if name in self.known or name in self._alive:
            return

        def gone(_: Any) -> None:
            self.live -= size
            del self._alive[name]

        self._alive[name] = weakref.ref(storage, gone)
        self.live += size
        self.peaks[self.segment] = max(self.peaks[self.segment], self.live)

    def _count(self, operation: Any, args: Any, kwargs: Any, result: Any) -> None:
        if operation is ATTENTION:
            self.flops += sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape)
        elif operation is ATTENTION_BACKWARD:
            forward = sdpa_flop_count(args[1].shape, args[2].shape, args[3].shape)
            self.flops += 2 * forward
            self.recomputed += forward / 2  # the scores, one of the forward's two products
        elif operation in flop_registry:
            self.flops += flop_registry[operation](*args, **kwargs, out_val=result)


def _blocked_copies(operation: Any, args: Any, result: Any) -> int:
    """Workspace bytes of a convolution on a CPU, where oneDNN copies tensors into its blocked layout.

    1 x 1 kernels need none. Forward: input and weights, or the output. Backward: input and output gradient for the
    weight gradient, or the weights for the input gradient. (Measured with PyTorch's allocator; the sizes are exact.)
    """
    if operation not in (torch.ops.aten.convolution, torch.ops.aten.convolution_backward):
        return 0
    backward = operation is torch.ops.aten.convolution_backward
    inputs, weights = args[1:3] if backward else args[:2]
    if all(size == 1 for size in weights.shape[2:]):
        return 0
    if backward:
        return max(inputs.nbytes + args[0].nbytes, weights.nbytes)
    return max(inputs.nbytes + weights.nbytes, result.nbytes)


def trace_forward(module: nn.Module, forward: Callable[[], Tensor], *, fused_norms: bool = True) -> Cost:
    """Trace a forward without gradients.

    Args:
        module: its weights are not counted.
        forward: the function to trace; its inputs must already exist.
        fused_norms: count RMS norms and convolutions as run on GPUs; False: as run on CPUs.
    """
    with (
        torch.no_grad(),
        fused_operations(fused_norms),
        Accountant(_storages(module), on_gpu=fused_norms) as accountant,
    ):
        output = forward()
        saved = accountant.live
        del output
    return Cost(accountant.flops, accountant.recomputed, saved, dict(accountant.peaks))


def trace_training(
    module: nn.Module,
    forward: Callable[[], Tensor],
    kinds: Mapping[str, list[nn.Module]] | None = None,
    *,
    keep_gradients: bool = False,
    fused_norms: bool = True,
) -> Cost:
    """Trace a forward and the backward of its sum.

    Args:
        module: its weights are not counted.
        forward: the function to trace; its inputs must already exist.
        kinds: repeated blocks by kind, in forward order; the backward of each kind is a segment of its own.
        keep_gradients: keep parameter gradients until the end; False: free each as soon as it is accumulated.
        fused_norms: count RMS norms and convolutions as run on GPUs; False: as run on CPUs.
    """
    handles, parameters = [], [p for p in module.parameters() if p.requires_grad]
    if not keep_gradients:
        handles = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in parameters]
    accountant = Accountant(_storages(module), on_gpu=fused_norms)
    forward_done = False

    def announce(kind: str) -> Callable[..., None]:
        def after_forward(block: nn.Module, inputs: Any, outputs: Any) -> None:
            for tensor in tree_leaves(outputs):
                if isinstance(tensor, Tensor) and tensor.requires_grad and not forward_done:
                    tensor.register_hook(lambda gradient: accountant.enter(kind))

        return after_forward

    for kind, blocks in (kinds or {}).items():
        accountant.peaks[kind] = 0
        if blocks:
            handles.append(blocks[-1].register_forward_hook(announce(kind)))
    try:
        with torch.enable_grad(), fused_operations(fused_norms), accountant:
            output = forward()
            forward_done, saved = True, accountant.live
            accountant.enter("backward")
            output.backward(torch.empty_like(output))
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters:
            parameter.grad = None
    return Cost(accountant.flops, accountant.recomputed, saved, dict(accountant.peaks))


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _storages(module: nn.Module) -> set[int]:
    tensors = [*module.parameters(), *module.buffers()]
    return {tensor.untyped_storage()._cdata for tensor in tensors}


@contextmanager
def checkpointing(policy: Policy, kind: Checkpointing) -> Iterator[None]:
    """Turn the network's gradient checkpointing on or off within the block; no effect if it has no blocks."""
    network: Any = policy.module
    blocks = policy.recomputed_blocks(network)
    before = bool(getattr(network, "is_gradient_checkpointing", False))
    checkpoint_blocks(network, blocks, float(bool(kind and blocks)), selective=kind == "selective")
    try:
        yield
    finally:
        checkpoint_blocks(network, blocks, float(before))
