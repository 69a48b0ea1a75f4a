"""Attention kernels by diffusers' name, checked before the run instead of in its first forward."""

import logging
from typing import Any

from diffusers.models.attention_dispatch import AttentionBackendName

from pcpo_fast.errors import UserError


def choose_attention(module: Any, backend: str) -> None:
    """Make a diffusers model use an attention backend; ``native`` is PyTorch's scaled dot product.

    Raises:
        UserError: no such backend, or what it needs is not installed.
    """
    known = [str(member.value) for member in AttentionBackendName]
    if backend not in known:
        raise UserError(f"model.attention: unknown backend {backend!r}; diffusers offers {', '.join(sorted(known))}")
    if backend == "native":
        return
    logger = logging.getLogger("diffusers.models.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)  # diffusers warns on every call that the interface is experimental
    try:
        module.set_attention_backend(backend)
    except (ImportError, RuntimeError, ValueError, OSError) as error:
        raise UserError(f"model.attention: {backend} cannot be used here: {str(error).splitlines()[0]}") from None
    finally:
        logger.setLevel(level)
