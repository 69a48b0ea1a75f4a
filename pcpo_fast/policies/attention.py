"""Attention kernels by diffusers' name, checked before the run instead of in its first forward."""

from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

from pcpo_fast.errors import UserError, reason_of
from pcpo_fast.policies.quiet import quiet_libraries


def choose_attention(module: Any, backend: str, device: torch.device | None = None) -> None:
    """Make a diffusers model use an attention backend; ``native`` is PyTorch's scaled dot product.

    The backend is tried on two tokens of the model's dtype and head sizes on ``device`` (default: the model's), forward
    and backward: some serve no CPU, no float32 or no head of this size, and some compute no gradients. diffusers' UNet
    and its transformer of Stable Diffusion 3 know no backends: they have ``native`` and ``xformers``.

    Raises:
        UserError: no such backend, what it needs is not installed, or it cannot train this model here.
    """
    known = [str(member.value) for member in AttentionBackendName]
    if backend not in known:
        raise UserError(f"model.attention: unknown backend {backend!r}; diffusers offers {', '.join(sorted(known))}")
    layers = [child for child in module.modules() if hasattr(child, "processor")]
    # diffusers passes over a layer that knows no backends, and says nothing.
    dispatched = all(hasattr(layer.processor, "_attention_backend") for layer in layers)
    if not dispatched and backend not in ("native", "xformers"):
        raise UserError(
            f"model.attention: {backend} does not serve a {type(module).__name__}; allowed are native and xformers"
        )
    try:
        with quiet_libraries():  # diffusers warns on every call that the interface is experimental
            if dispatched:
                module.set_attention_backend(backend)
                for heads, head_size in {(layer.heads, layer.inner_dim // layer.heads) for layer in layers}:
                    _try(module, backend, heads, head_size, device)
            elif backend == "xformers":
                module.enable_xformers_memory_efficient_attention()  # tries it, too
    except (ImportError, RuntimeError, ValueError, TypeError, OSError, NotImplementedError) as error:
        reason = reason_of(error)
        raise UserError(f"model.attention: {backend} cannot be used here: {reason}") from None


def _try(module: Any, backend: str, heads: int, head_size: int, device: torch.device | None) -> None:
    weight = next(module.parameters())
    if weight.is_meta:
        return
    states = torch.zeros(1, 2, heads, head_size, device=device or weight.device, dtype=weight.dtype, requires_grad=True)
    result = dispatch_attention_fn(states, states, states, backend=AttentionBackendName(backend))
    if not result.requires_grad:
        raise RuntimeError("it computes no gradients")
    result.sum().backward()
