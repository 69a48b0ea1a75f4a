"""Caption match: whether an image shows the scene described by its caption, measured from pixels, 0..1.

The background color is the median of the image's border. Whatever differs from it is the object: its color is the mean
over its core, and its outline is compared with the four shapes, each drawn at the object's position with its area.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pcpo_fast.config.wording import counted
from pcpo_fast.errors import UserError
from pcpo_fast.rewards.scenes import COLORS, IMAGE_SIZE, SHAPES, Scene, parse_caption, shape_coverage, unit_areas

# Squared RGB distance that makes a color e times less likely. The two nearest colors of the palette are 0.31 apart, so
# a pixel with exactly one of them has a probability of 99.9 %.
_COLOR_TEMPERATURE = 0.04
# A pixel counts fully up to the first RGB distance from its color, and not at all from the second. Without this a pixel
# would only have to be nearer to its color than to any other, and colors would drift in training.
_NEAR, _FAR = 0.10, 0.60
# Factor in the softmax over the shapes' overlaps; the nearest wrong shape overlaps a clean one by 0.80 to 0.85.
_SHAPE_SHARPNESS = 20.0
_RIM = 2  # pixels at the image's edge that a scene never covers
_SMALLEST, _LARGEST = 5.5, 10.5  # radii of the shapes compared; scenes have 6.7 to 9.5


@dataclass(frozen=True)
class SceneMeasurement:
    """Whether each part is right, bool tensors [B]: background color, color of the shape, shape."""

    background: Tensor
    color: Tensor
    shape: Tensor


@dataclass(frozen=True)
class _Reading:
    palette: Tensor  # [8, 3], the colors
    named: tuple[Tensor, Tensor, Tensor]  # [B] each: indices of the captions' background, color and shape
    pixels: Tensor  # [B, 3, P]
    background: Tensor  # [B, 3], the border's median
    foreground: Tensor  # [B, 3], color of the object's core
    presence: Tensor  # [B], 0 (no object) to 1 (object)
    coverage: Tensor  # [B, P], 0 (background) to 1 (object)
    overlap: Tensor  # [B, 4], intersection over union with each shape


def _scene(prompt: str) -> Scene:
    scene = parse_caption(prompt)
    if scene is None:
        raise UserError(
            f"the reward caption_match cannot judge the prompt {prompt!r}: allowed are captions like "
            f"'a red circle on a blue background' with two different colors of {', '.join(COLORS)} "
            f"and a shape of {', '.join(SHAPES)}"
        )
    return scene


def check_prompt(prompt: str, metadata: dict[str, Any]) -> None:
    """Raises UserError for a prompt that is not a scene caption; ``metadata`` is unused."""
    _scene(prompt)


def _resize(images: Tensor) -> Tensor:
    images = images.detach().float().clamp(0, 1)
    if images.shape[-2:] == (IMAGE_SIZE, IMAGE_SIZE):
        return images
    smaller = images.shape[-1] >= IMAGE_SIZE and images.shape[-2] >= IMAGE_SIZE
    if smaller and images.shape[-1] % IMAGE_SIZE == 0 and images.shape[-2] % IMAGE_SIZE == 0:
        return F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="area")
    return F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True, align_corners=False)


def _read(images: Tensor, prompts: Sequence[str]) -> _Reading:
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[0] != len(prompts):
        raise ValueError(
            f"images must be [B, 3, H, W] with one prompt each, got {tuple(images.shape)}, "
            f"{counted(len(prompts), 'prompt')}"
        )
    colors = list(COLORS)
    scenes = [_scene(prompt) for prompt in prompts]
    rows = [(colors.index(s.background), colors.index(s.color), SHAPES.index(s.shape)) for s in scenes]
    background, color, shape = torch.tensor(rows, dtype=torch.long, device=images.device).reshape(-1, 3).unbind(1)
    named = (background, color, shape)
    images = _resize(images)
    count, size = images.shape[0], IMAGE_SIZE
    pixels = images.reshape(count, 3, size * size)
    inner = torch.zeros(size, size, dtype=torch.bool, device=images.device)
    inner[_RIM:-_RIM, _RIM:-_RIM] = True
    rim = pixels[:, :, ~inner.flatten()].median(dim=2).values

    # The object's color: the mean over pixels far from the background, weighted by their distance.
    offset = pixels - rim[:, :, None]
    distance = offset.square().sum(1).sqrt()
    strongest = distance.topk(24, dim=1).values.mean(1)
    core = ((distance / strongest.clamp(min=1e-3)[:, None] - 0.6) / 0.3).clamp(0, 1)
    foreground = (core[:, None] * pixels).sum(2) / core.sum(1, keepdim=True).clamp(min=1e-3)
    presence = ((strongest - 0.15) / 0.2).clamp(0, 1)

    # Coverage: each pixel's position between the background's color and the object's, stretched around one half, so
    # that faint noise does not add up to an area, while anti-aliased edges stay in place.
    way = foreground - rim
    along = (way[:, :, None] * offset).sum(1) / way.square().sum(1, keepdim=True).clamp(min=1e-3)
    coverage = ((along - 0.2) / 0.6).clamp(0, 1)

    area = coverage.sum(1)
    grid = torch.arange(size, dtype=torch.float32, device=images.device) + 0.5
    mask = coverage.reshape(count, size, size)
    center_x = ((mask.sum(1) * grid).sum(1) / area.clamp(min=1e-3)).clamp(8, size - 8)
    center_y = ((mask.sum(2) * grid).sum(1) / area.clamp(min=1e-3)).clamp(8, size - 8)
    overlap = []
    for kind, unit in zip(SHAPES, unit_areas().tolist(), strict=True):
        radius = (area / unit).sqrt().clamp(_SMALLEST, _LARGEST)
        template = shape_coverage(kind, center_x, center_y, radius, size)
        both = torch.minimum(template, mask).sum((1, 2))
        overlap.append(both / (template.sum((1, 2)) + area - both))
    palette = torch.tensor(list(COLORS.values()), device=images.device)
    return _Reading(palette, named, pixels, rim, foreground, presence, coverage, torch.stack(overlap, 1))


@torch.no_grad()
def measure_scenes(images: Tensor, prompts: Sequence[str]) -> SceneMeasurement:
    """Hard decisions for each image, used to evaluate pre-training.

    ``images`` float [B, 3, H, W] in 0..1, ``prompts`` B scene captions. The background is right if the border's median
    is nearest to the color in the caption, the shape's color likewise for the object's core, and the shape if the shape
    in the caption has the largest overlap; the latter two require an object.
    Raises UserError for a prompt that is not a scene caption.
    """
    reading = _read(images, prompts)
    palette, (background, color, shape) = reading.palette, reading.named
    there = (reading.presence > 0.5) & (reading.overlap.amax(1) > 0.4)
    return SceneMeasurement(
        background=torch.cdist(reading.background, palette).argmin(1) == background,
        color=(torch.cdist(reading.foreground, palette).argmin(1) == color) & there,
        shape=(reading.overlap.argmax(1) == shape) & there,
    )


@torch.no_grad()
def caption_match(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]] | None = None) -> Tensor:
    """Reward in 0..1: a quarter for the background's color, a quarter for the shape's color, a half for the shape.

    ``images`` float [B, 3, H, W] in 0..1 (any size, brought to 32 x 32), ``prompts`` B scene captions, ``metadata``
    unused. Returns float32 [B]. Rendered scenes score about 0.98.

    All three parts are soft, so that small improvements count. A color's part is the mean, over the pixels of the
    background or of the object's core, of the probability that the pixel has the right color among those of the
    palette, times its closeness to that color. The shape's part is the softmax over the overlaps with all four shapes,
    softmax(20 IoU), times the fit of the right shape: the overlap alone would reward any blob in the middle (a circle
    overlaps a square by 0.85), the softmax alone any picture for which the right shape is the least bad.
    Raises UserError for a prompt that is not a scene caption.
    """
    reading = _read(images, prompts)
    palette, (background, color, shape) = reading.palette, reading.named
    rows = torch.arange(len(prompts), device=images.device)

    # |pixel|^2 is the same for every color and cancels in the softmax. Multiplying colors by pixels is much faster.
    closeness = (2 * palette @ reading.pixels - palette.square().sum(1)[:, None]) / _COLOR_TEMPERATURE
    likely = closeness.softmax(1)  # [B, 8, P]

    def has(color: Tensor) -> Tensor:
        distance = (reading.pixels - palette[color][:, :, None]).square().sum(1).sqrt()
        return likely[rows, color] * ((_FAR - distance) / (_FAR - _NEAR)).clamp(0, 1)

    outside = ((0.3 - reading.coverage) / 0.3).clamp(0, 1)
    core = ((reading.coverage - 0.7) / 0.3).clamp(0, 1)
    background_part = (outside * has(background)).sum(1) / outside.sum(1).clamp(min=1)
    color_part = (core * has(color)).sum(1) / core.sum(1).clamp(min=1)

    compared = (_SHAPE_SHARPNESS * reading.overlap).softmax(1)[rows, shape]
    fits = ((reading.overlap[rows, shape] - 0.35) / 0.6).clamp(0, 1)
    return background_part / 4 + reading.presence * (color_part / 4 + compared * fits / 2)
