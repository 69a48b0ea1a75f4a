"""From images to a vision model's input: what the published processors compute, on tensors and on any device.

The processors of transformers and the original CLIP resize with Pillow, which works on bytes: it filters rows, rounds
and clips to 0..255, then does the same with columns. Both passes are done here with PyTorch's antialiased filter, whose
taps are Pillow's, so the result differs from Pillow's by at most one level in few pixels.
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
_FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, which the processors' files hold


def as_bytes(images: Tensor) -> Tensor:
    """Images in 0..1 (what is outside is clipped) as uint8, rounded, of the same shape."""
    return (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)


def rows_of_bytes(images: Tensor) -> np.ndarray:
    """Images [B, 3, H, W] in 0..1 as Pillow and recognisers take them: uint8 [B, H, W, 3] on the CPU."""
    return as_bytes(images).permute(0, 2, 3, 1).contiguous().cpu().numpy()


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop and normalise.

    Attributes:
        size: the shorter side after resizing (with ``pad``: the longer one), or (height, width).
        crop: (height, width) cut from the middle, or None.
        mean, std: of each channel, for pixels in 0..1.
        filter: "bicubic" or "bilinear".
        on_bytes: resize as Pillow does; otherwise in floating point, as torchvision resizes a tensor.
        antialias: without it a smaller image is sampled, not averaged; Pillow always averages.
        half_pixel: where half of an odd margin goes: ``math.floor`` in transformers, ``round`` in torchvision.
        pad: show the whole image: its longer side becomes ``size``, a number, and black fills the square.
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
        """float32 [B, 3, H, W] in 0..1 (what is outside is clipped) -> float32 [B, 3, h, w], normalised.

        Pixels become bytes first, as they would in a file: the published scores are those of 8-bit images.
        """
        pixels = (images.detach().float() * 255).round().clamp(0, 255)  # in float32, in which NaN stays NaN
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
                pixels = (pixels + 0.5).floor().clamp(0, 255)  # halves go up, as in Pillow
        return pixels

    def _crop(self, pixels: Tensor, crop: tuple[int, int]) -> Tensor:
        top, left = (self.half_pixel((have - want) / 2) for have, want in zip(pixels.shape[-2:], crop, strict=True))
        return pixels[..., top : top + crop[0], left : left + crop[1]]

    def _padded(self, pixels: Tensor) -> Tensor:
        assert isinstance(self.size, int)
        below, right = (self.size - side for side in pixels.shape[-2:])
        return F.pad(pixels, (right // 2, right - right // 2, below // 2, below - below // 2))


def clip_preprocessing(size: int) -> Preprocessing:
    """CLIP's, for a model that sees ``size`` x ``size`` pixels."""
    return Preprocessing(size, (size, size))


def read_preprocessing(folder: Path, size: int, where: str) -> Preprocessing:
    """What a model's ``preprocessor_config.json`` (or ``processor_config.json``) asks for.

    Args:
        folder: the model's.
        size: the image size that the model expects; also of the default, CLIP's, where the folder has no such file.
        where: reward and model, for messages.

    Raises:
        UserError: the file is malformed, asks for something else than the above, or does not give that size.
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
    """The shorter side, or both; old files hold a number."""
    if isinstance(value, int):
        return value
    if value.get("shortest_edge"):
        return int(value["shortest_edge"])
    return int(value["height"]), int(value["width"])


def _three(values: Sequence[float]) -> tuple[float, ...]:
    if len(values) != 3:
        raise ValueError(f"{values} are not the values of three channels")
    return tuple(float(value) for value in values)
