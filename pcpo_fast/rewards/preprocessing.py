"""Preprocessing of images for vision models, equivalent to the published processors but on tensors and on any device.

The processors of transformers and the original CLIP resize with Pillow, which works on bytes: it filters rows, rounds
and clips to 0..255, then does the same with columns. Both passes are done here with PyTorch's antialiased filter, which
has the same coefficients, so the result differs from Pillow's by at most one level in a few pixels.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pcpo_fast.errors import UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's constants, as in the processors' files


def as_bytes(images: Tensor) -> Tensor:
    """Images in 0..1 (clipped) as rounded uint8 of the same shape."""
    return (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)


def rows_of_bytes(images: Tensor) -> np.ndarray:
    """Images [B, 3, H, W] in 0..1 in the layout of Pillow and OCR libraries: uint8 [B, H, W, 3] on the CPU."""
    return as_bytes(images).permute(0, 2, 3, 1).contiguous().cpu().numpy()


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop and normalize.

    Attributes:
        size: the shorter side after resizing (with ``pad``: the longer one), or (height, width).
        crop: (height, width) of a centre crop; None: no crop.
        mean, std: per channel, for pixels in 0..1.
        filter: "bicubic" or "bilinear".
        on_bytes: resize like Pillow; otherwise in floating point, like torchvision on tensors.
        antialias: antialias when shrinking in floating point; Pillow always does.
        half_pixel: rounding of half an odd margin: ``math.floor`` in transformers, ``round`` in torchvision.
        pad: keep the whole image: resize its longer side to ``size`` (a number) and pad the square with black.
    """

    size: int | tuple[int, int]
    crop: tuple[int, int] | None
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    filter: str = "bicubic"
    on_bytes: bool = True
    antialias: bool = True
    half_pixel: Callable[[float], int] = math.floor
    pad: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        """float32 [B, 3, H, W] in 0..1 (clipped) -> normalized float32 [B, 3, h, w].

        Pixels are first rounded to bytes, as in an image file, because published scores are those of 8-bit images.
        """
        pixels = (images.detach().float() * 255).round().clamp(0, 255)  # float32 keeps NaN, unlike uint8
        pixels = self._resize(pixels, self._target(*pixels.shape[-2:]))
        if self.crop is not None:
            pixels = self._crop(pixels, self.crop)
        if self.pad:
            pixels = self._padded(pixels)
        mean = torch.tensor(self.mean, device=pixels.device)[:, None, None]
        std = torch.tensor(self.std, device=pixels.device)[:, None, None]
        return (pixels / 255 - mean) / std

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if isinstance(self.size, tuple):
            return self.size
        if self.pad:
            scale = self.size / max(height, width)
            return max(1, round(height * scale)), max(1, round(width * scale))
        longer = int(self.size * max(height, width) / min(height, width))
        return (self.size, longer) if height <= width else (longer, self.size)

    def _resize(self, pixels: Tensor, target: tuple[int, int]) -> Tensor:
        if tuple(pixels.shape[-2:]) == target:
            return pixels
        if not self.on_bytes:
            return F.interpolate(pixels, target, mode=self.filter, antialias=self.antialias, align_corners=False)
        for size in ((pixels.shape[-2], target[1]), target):
            if tuple(pixels.shape[-2:]) != size:
                pixels = F.interpolate(pixels, size, mode=self.filter, antialias=True, align_corners=False)
                pixels = (pixels + 0.5).floor().clamp(0, 255)  # halves are rounded up, as in Pillow
        return pixels

    def _crop(self, pixels: Tensor, crop: tuple[int, int]) -> Tensor:
        top, left = (self.half_pixel((have - want) / 2) for have, want in zip(pixels.shape[-2:], crop, strict=True))
        return pixels[..., top : top + crop[0], left : left + crop[1]]

    def _padded(self, pixels: Tensor) -> Tensor:
        assert isinstance(self.size, int)
        below, right = (self.size - side for side in pixels.shape[-2:])
        return F.pad(pixels, (right // 2, right - right // 2, below // 2, below - below // 2))


def clip_preprocessing(size: int) -> Preprocessing:
    """CLIP's preprocessing for a model with inputs of ``size`` x ``size`` pixels."""
    return Preprocessing(size, (size, size))


def read_preprocessing(folder: Path, size: int, where: str) -> Preprocessing:
    """The preprocessing in a model's ``preprocessor_config.json`` (or ``processor_config.json``); default: CLIP's.

    Args:
        folder: folder of the model.
        size: the image size that the model expects.
        where: reward and model, as prefix of error messages.

    Raises:
        UserError: the file is malformed, describes unsupported preprocessing, or gives another image size.
    """
    found = [folder / name for name in ("preprocessor_config.json", "processor_config.json")]
    file = next((path for path in found if path.is_file()), None)
    if file is None:
        return clip_preprocessing(size)
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings = settings.get("image_processor", settings)
        made = _from_settings(settings)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: {file} does not describe CLIP's image preprocessing: {error!r}") from None
    if (made.crop or made.size) not in (size, (size, size)):
        raise UserError(
            f"{where}: {file} produces images of {made.crop or made.size}, but the model sees {size} x {size}"
        )
    return made


def _from_settings(settings: Mapping[str, Any]) -> Preprocessing:
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if not settings.get(key, True):
            raise ValueError(f"{key} is false")
    size = _sides(settings.get("size", {"shortest_edge": 224}))
    crop = _sides(settings.get("crop_size", 224)) if settings.get("do_center_crop", True) else None
    if isinstance(crop, int):
        crop = (crop, crop)
    smallest = min(size) if isinstance(size, tuple) else size
    if crop is not None and max(crop) > smallest:
        raise ValueError(f"crop_size {crop} is larger than size {size}")
    made = Preprocessing(size, crop, filter=_FILTERS[settings.get("resample", 3)])
    return replace(
        made, mean=_three(settings.get("image_mean", CLIP_MEAN)), std=_three(settings.get("image_std", CLIP_STD))
    )


def _sides(value: Any) -> int | tuple[int, int]:
    """The shorter side, or both; old files have a single number."""
    if isinstance(value, int):
        return value
    if value.get("shortest_edge"):
        return int(value["shortest_edge"])
    return int(value["height"]), int(value["width"])


def _three(values: Sequence[float]) -> tuple[float, ...]:
    if len(values) != 3:
        raise ValueError(f"{values} are not the values of three channels")
    return tuple(float(value) for value in values)
