"""The size of an image as a JPEG file: the two rewards of DDPO that need no model.

Black et al., "Training Diffusion Models with Reinforcement Learning" (2023), section 5.1. Sizes are in kilobytes
(1000 bytes) at quality 95 with the encoder's default chroma subsampling, as in the authors' PyTorch code.
"""

import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pcpo_fast.rewards.preprocessing import rows_of_bytes

_QUALITY = 95


def jpeg_incompressibility(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """Size of each image's JPEG file in kB; grows with detail and noise.

    ``images`` [B, 3, H, W] in 0..1, any floating dtype; ``prompts`` and ``metadata`` are not used. Returns float32 [B].
    """
    sizes = []
    for row in rows_of_bytes(images):
        buffer = io.BytesIO()
        Image.fromarray(row).save(buffer, format="JPEG", quality=_QUALITY)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32)


def jpeg_compressibility(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """Minus :func:`jpeg_incompressibility`; higher for plainer images."""
    return -jpeg_incompressibility(images, prompts, metadata)
