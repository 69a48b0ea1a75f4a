"""Attention kernels by diffusers' name, checked before the run instead of in its first forward."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pcpo_fast.errors import UserError, reason_of
from pcpo_fast.policies.quiet import quiet_libraries

SDPA_KERNELS = {
    "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
    "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "_native_flash": SDPBackend.FLASH_ATTENTION,
    "_native_math": SDPBackend.MATH,
}
"""The single kernels behind PyTorch's scaled dot product, which ``native`` chooses among."""
PLAIN = ("native", *SDPA_KERNELS, "xformers")
"""What serves layers that know no backends: those of diffusers' UNet and of its transformer of Stable Diffusion 3."""


class HeldProcessor:
    """The processor of an attention layer that knows no backends, held to one of :data:`PLAIN`."""

    def __init__(self, original: Any, used: Any, kernel: SDPBackend | None) -> None:
        self.original, self.used, self.kernel = original, used, kernel

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        with nullcontext() if self.kernel is None else sdpa_kernel(self.kernel):
            return self.used(*arguments, **options)


def choose_attention(module: Any, backend: str, device: torch.device | None = None) -> None:
    """Make a diffusers model use an attention backend; ``native`` is PyTorch's scaled dot product.

    The backend is tried on two tokens of the model's dtype and head sizes on ``device`` (default: the model's), forward
    and backward: some serve no CPU, no float32 or no head of this size, and some compute no gradients. diffusers' UNet
    and its transformer of Stable Diffusion 3 know no backends: they have those of :data:`PLAIN`.

    Raises:
        UserError: no such backend, what it needs is not installed, or it cannot train this model here.
    """
    _known(backend)
    layers = attention_layers(module)
    dispatched = all(_dispatches(layer) for layer in layers)
    if not dispatched and backend not in PLAIN:
        raise UserError(
            f"model.attention: {backend} does not serve a {type(module).__name__}; allowed are {', '.join(PLAIN)}"
        )
    try:
        with quiet_libraries():  # diffusers warns on every call that the interface is experimental
            if dispatched:
                module.set_attention_backend(backend)
            set_backend(module, backend)
            for heads, head_size in {(layer.heads, layer.inner_dim // layer.heads) for layer in layers}:
                _try(module, backend, heads, head_size, device)
    except (ImportError, RuntimeError, ValueError, TypeError, OSError, NotImplementedError) as error:
        reason = reason_of(error)
        raise UserError(f"model.attention: {backend} cannot be used here: {reason}") from None


def attention_layers(network: nn.Module) -> list[Any]:
    """diffusers' attention layers of a model."""
    return [child for child in network.modules() if hasattr(child, "processor")]


def set_backend(network: nn.Module, name: str) -> None:
    """Let every attention layer of a diffusers model compute by a backend from here on.

    Nothing is tried and nothing is loaded: :func:`choose_attention` or :func:`check_backend` come first.

    Raises:
        UserError: there is no such backend.
        ValueError: the model's layers know no backends, and it is not one of :data:`PLAIN`.
    """
    _known(name)
    for layer in attention_layers(network):
        if _dispatches(layer):
            layer.processor._attention_backend = AttentionBackendName(name)
            continue
        if name not in PLAIN:
            raise ValueError(f"{name} does not serve a {type(network).__name__}")
        if isinstance(layer.processor, HeldProcessor):
            layer.processor = layer.processor.original
        original = layer.processor
        if name == "xformers":
            layer.set_use_memory_efficient_attention_xformers(True)  # looks at the processor for its counterpart
        if name != "native":
            layer.processor = HeldProcessor(original, layer.processor, SDPA_KERNELS.get(name))


@contextmanager
def attention_backend(network: nn.Module, name: str | None) -> Iterator[None]:
    """Within the block, a diffusers model's attention is computed by another backend; None changes nothing.

    The switch sets one attribute per layer, so that a phase of a run can have a backend of its own.

    Raises:
        UserError, ValueError: as :func:`set_backend`; the model is as before.
    """
    layers = [] if name is None else attention_layers(network)
    before = [(layer, layer.processor, getattr(layer.processor, "_attention_backend", None)) for layer in layers]
    try:
        if name is not None:
            set_backend(network, name)
        yield
    finally:
        for layer, processor, backend in before:
            layer.processor = processor
            if _dispatches(layer):
                processor._attention_backend = backend


def _known(name: str) -> None:
    known = [str(member.value) for member in AttentionBackendName]
    if name not in known:
        raise UserError(f"model.attention: unknown backend {name!r}; diffusers offers {', '.join(sorted(known))}")


def _dispatches(layer: Any) -> bool:
    """Whether a layer asks diffusers' dispatcher; diffusers passes over one that does not, and says nothing."""
    return hasattr(layer.processor, "_attention_backend")


@torch.enable_grad()
def _try(module: Any, backend: str, heads: int, head_size: int, device: torch.device | None) -> None:
    weight = next(module.parameters())
    if weight.is_meta:
        return
    states = torch.zeros(1, 2, heads, head_size, device=device or weight.device, dtype=weight.dtype, requires_grad=True)
    result = dispatch_attention_fn(states, states, states, backend=AttentionBackendName(backend))
    if not result.requires_grad:
        raise RuntimeError("it computes no gradients")
    result.sum().backward()
