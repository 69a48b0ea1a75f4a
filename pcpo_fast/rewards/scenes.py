"""Synthetic scenes: one colored shape on a colored background, their captions, and images of them.

There are 224 captions of the form ``a red circle on a blue background`` (8 colors, 4 shapes, 7 background colors). 32
of them are held out: one of the seven backgrounds of every (color, shape) pair, so every word and every pair of color
and shape occurs in training, but no held-out combination does.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IMAGE_SIZE = 32

# Near the corners of the RGB cube, so that the nearest color of a pixel is unambiguous.
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.12, 0.12),
    "green": (0.10, 0.68, 0.18),
    "blue": (0.12, 0.20, 0.88),
    "yellow": (0.95, 0.86, 0.12),
    "purple": (0.66, 0.12, 0.78),
    "cyan": (0.18, 0.82, 0.90),
    "black": (0.06, 0.06, 0.06),
    "white": (0.95, 0.95, 0.95),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")

# Sizes relative to the radius of the circle: half side, circumradius, half length and half width of an arm.
_SQUARE = 0.86
_TRIANGLE = 1.36
_CROSS_LENGTH, _CROSS_WIDTH = 1.10, 0.40
# Extent from the center relative to the radius: left and right, up, down.
_REACH = {
    "circle": (1.0, 1.0, 1.0),
    "square": (_SQUARE, _SQUARE, _SQUARE),
    "triangle": (_TRIANGLE * math.sqrt(3) / 2, _TRIANGLE, _TRIANGLE / 2),
    "cross": (_CROSS_LENGTH, _CROSS_LENGTH, _CROSS_LENGTH),
}

_CAPTION = re.compile(rf"a ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) on a ({'|'.join(COLORS)}) background")


@dataclass(frozen=True)
class Scene:
    """The content of a caption: names from COLORS, SHAPES and COLORS."""

    color: str
    shape: str
    background: str

    @property
    def caption(self) -> str:
        return f"a {self.color} {self.shape} on a {self.background} background"


def parse_caption(text: str) -> Scene | None:
    """The scene described by a caption; None if the text is not one of the 224 captions."""
    match = _CAPTION.fullmatch(text.strip())
    if match is None or match[1] == match[3]:
        return None
    return Scene(match[1], match[2], match[3])


def all_scenes() -> list[Scene]:
    """The 224 scenes in a fixed order."""
    return [
        Scene(color, shape, background)
        for color in COLORS
        for shape in SHAPES
        for background in COLORS
        if color != background
    ]


def _is_heldout(scene: Scene) -> bool:
    # Color i with shape j is held out on the background 1 + 2 j places further (cyclically) in the list of colors: each
    # color, each background and each pair of shape and background is held out equally often.
    names = list(COLORS)
    offset = (names.index(scene.background) - names.index(scene.color)) % len(names)
    return offset == 1 + 2 * SHAPES.index(scene.shape)


def train_captions() -> list[str]:
    """The 192 captions for pre-training and reinforcement learning."""
    return [scene.caption for scene in all_scenes() if not _is_heldout(scene)]


def heldout_captions() -> list[str]:
    """The 32 captions kept for evaluation."""
    return [scene.caption for scene in all_scenes() if _is_heldout(scene)]


def unit_areas() -> Tensor:
    """Area of each shape in SHAPES at radius 1, float32 [4]."""
    triangle = 3 * math.sqrt(3) / 4 * _TRIANGLE**2
    cross = 8 * _CROSS_LENGTH * _CROSS_WIDTH - 4 * _CROSS_WIDTH**2
    return torch.tensor([math.pi, 4 * _SQUARE**2, triangle, cross])


def shape_coverage(shape: str, center_x: Tensor, center_y: Tensor, radius: Tensor, size: int = IMAGE_SIZE) -> Tensor:
    """Anti-aliased masks of one shape.

    ``center_x``, ``center_y`` (centre of mass; y points down) and ``radius`` are float tensors [B] in pixels; the
    centre of a pixel is at index + 0.5. Returns float32 [B, size, size], the covered fraction of each pixel, computed
    from the signed distance to the outline.
    """
    grid = torch.arange(size, dtype=torch.float32, device=center_x.device) + 0.5
    x = (grid - center_x[:, None])[:, None, :]
    y = (grid - center_y[:, None])[:, :, None]
    r = radius[:, None, None]
    if shape == "circle":
        distance = (x * x + y * y).sqrt() - r
    elif shape == "square":
        distance = torch.maximum(x.abs(), y.abs()) - _SQUARE * r
    elif shape == "triangle":
        distance = torch.maximum(math.sqrt(3) / 2 * x.abs() - y / 2, y) - _TRIANGLE / 2 * r
    elif shape == "cross":
        ax, ay = x.abs(), y.abs()
        # The shorter coordinate must be inside the arm's width, the longer one inside its length.
        distance = torch.maximum(torch.minimum(ax, ay) - _CROSS_WIDTH * r, torch.maximum(ax, ay) - _CROSS_LENGTH * r)
    else:
        raise ValueError(f"unknown shape {shape!r}, allowed: {', '.join(SHAPES)}")
    return (0.5 - distance).clamp(0, 1)


def render(scenes: Sequence[Scene], generator: torch.Generator | None = None, size: int = IMAGE_SIZE) -> Tensor:
    """Random images of scenes: float32 [B, 3, size, size] in 0..1.

    The generator varies the radius (21 to 30 % of the size), the position (with a margin of 2/32, at most 3/32 from the
    middle) and both colors (with a standard deviation of 0.02).
    """
    count, unit = len(scenes), size / IMAGE_SIZE
    rand = torch.rand(3, count, generator=generator)
    tint = 0.02 * torch.randn(2, count, 3, generator=generator)
    reach = torch.tensor([_REACH[scene.shape] for scene in scenes]).reshape(count, 3)
    radius = unit * (6.7 + 2.8 * rand[0])
    margin, middle, jitter = 2.0 * unit, size / 2, 3.0 * unit

    def place(uniform: Tensor, before: Tensor, after: Tensor) -> Tensor:
        low = (margin + before * radius).clamp(min=middle - jitter)
        high = (size - margin - after * radius).clamp(max=middle + jitter)
        return low + uniform * (high - low)

    center_x = place(rand[1], reach[:, 0], reach[:, 0])
    center_y = place(rand[2], reach[:, 1], reach[:, 2])
    mask = torch.empty(count, size, size)
    for shape in SHAPES:
        rows = torch.tensor([i for i, scene in enumerate(scenes) if scene.shape == shape], dtype=torch.long)
        mask[rows] = shape_coverage(shape, center_x[rows], center_y[rows], radius[rows], size)
    foreground = torch.tensor([COLORS[scene.color] for scene in scenes]).reshape(count, 3) + tint[0]
    background = torch.tensor([COLORS[scene.background] for scene in scenes]).reshape(count, 3) + tint[1]
    color = background[:, :, None, None] + mask[:, None] * (foreground - background)[:, :, None, None]
    return color.clamp(0, 1)
