"""The size of an image as a JPEG file: DDPO's two rewards that need no model.

Black et al., "Training Diffusion Models with Reinforcement Learning" (2023), section 5.1. Sizes are in kilobytes
(1000 bytes) at quality 95 with the encoder's default chroma subsampling, as in the authors' PyTorch code.
"""

import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor

_QUALITY = 95


def jpeg_incompressibility(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """Size of each image's JPEG file in kB: rises with detail and noise.

    ``images`` [B, 3, H, W] in 0..1, any floating dtype; ``prompts`` and ``metadata`` are not used. Returns float32 [B].
    """
    pixels = (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)
    rows = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return torch.tensor([_jpeg_bytes(Image.fromarray(row)) / 1000 for row in rows], dtype=torch.float32)


def jpeg_compressibility(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """Minus the size of each image's JPEG file in kB: rises as the image gets plainer. See the other reward here."""
    return -jpeg_incompressibility(images, prompts, metadata)


def _jpeg_bytes(image: Image.Image) -> int:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=_QUALITY)
    return buffer.tell()
