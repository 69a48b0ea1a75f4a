"""The same prompts and noise at several reward guidance scales: parsing, numbers, image grid and plot."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torch import Tensor

from pcpo_fast.config.wording import counted
from pcpo_fast.errors import UserError
from pcpo_fast.method.diversity import mean_pixel_diversity
from pcpo_fast.reporting.grids import image_table
from pcpo_fast.reporting.plots import save_figure
from pcpo_fast.reporting.scale_figure import ScalePoint, scale_figure
from pcpo_fast.reporting.statistics import mean

SHOWN_ROWS = 24
"""Rows of the grid; with more images than rows, the first image of each prompt is shown first."""
MOST_SCALES = 64


@dataclass(frozen=True)
class ScaleResult:
    """The images and scores of one scale.

    Attributes:
        scale: scale of every run.
        images: [prompts * count, 3, H, W] in 0..1, prompt-major.
        scores: [prompts * count] by reward.
    """

    scale: float
    images: Tensor
    scores: Mapping[str, Tensor]


def sweep_scales(text: str) -> list[float]:
    """Parse ``--sweep``: numbers separated by commas; ``...`` continues with the same step, as in ``0,0.25,...,1.5``.

    Raises:
        UserError: the text is malformed, repeats a scale, or has more than 64 of them.
    """
    words = [word.strip() for word in text.split(",")]
    found: list[Decimal] = []
    for place, word in enumerate(words):
        if word != "...":
            found.append(_number(word, text))
            continue
        if place < 2 or place != len(words) - 2:
            raise UserError(f"--sweep: in {text!r} the dots need at least two numbers before them and one after")
        step, rest = found[-1] - found[-2], _number(words[-1], text) - found[-1]
        if step == 0 or rest % step or rest / step < 1:
            raise UserError(f"--sweep: in {text!r} steps of {step} do not lead from {found[-1]} to {words[-1]}")
        if rest / step > MOST_SCALES:
            raise UserError(f"--sweep: {text!r} has more than {counted(MOST_SCALES, 'scale')}")
        found += [found[-1] + step * number for number in range(1, int(rest / step))]
    scales = [float(number) for number in found]
    if len(set(scales)) < len(scales):
        raise UserError(f"--sweep: {text!r} repeats a scale")
    if len(scales) > MOST_SCALES:
        raise UserError(f"--sweep: {text!r} has more than {counted(MOST_SCALES, 'scale')}")
    return scales


def _number(word: str, text: str) -> Decimal:
    try:
        number = Decimal(word)
    except InvalidOperation:
        number = Decimal("nan")
    if not (number.is_finite() and math.isfinite(float(number))):
        raise UserError(f"--sweep: {word!r} in {text!r} is not a finite number; example: 0,0.25,...,1.5")
    return number


def sweep_numbers(columns: Sequence[ScaleResult], count: int) -> list[dict[str, Any]]:
    """For each scale and reward: mean with 95 % bootstrap interval, standard deviation over images, and all scores.

    Args:
        columns: one per scale.
        count: images per prompt; with two or more their diversity is measured too.
    """
    return [
        {
            "guidance_scale_reward": column.scale,
            "diversity": mean_pixel_diversity(column.images, count) if count > 1 else None,
            "rewards": {name: _summary(scores) for name, scores in column.scores.items()},
        }
        for column in columns
    ]


def _summary(scores: Tensor) -> dict[str, Any]:
    values = scores.double()
    estimate = mean(values.tolist())
    return {
        "mean": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "std": float(values.std()) if len(values) > 1 else None,
        "scores": scores.tolist(),
    }


def shown_rows(prompts: int, count: int) -> list[int]:
    """The images that the grid shows: all, or first the first image of each prompt, then the second of each, ..."""
    if prompts * count <= SHOWN_ROWS:
        return list(range(prompts * count))
    return [prompt * count + image for image in range(count) for prompt in range(prompts)][:SHOWN_ROWS]


def sweep_picture(columns: Sequence[ScaleResult], captions: Sequence[str], count: int) -> Image:
    """A grid with one row per image and one column per scale.

    Args:
        columns: one per scale.
        captions: caption of each image.
        count: images per prompt.
    """
    rows = shown_rows(len(captions) // count, count)
    reward = next(iter(columns[0].scores), None)
    meanings = {0.0: " (base)", 1.0: " (tuned)"}
    return image_table(
        [column.images[rows] for column in columns],
        columns=[f"\u03bb = {column.scale:g}{meanings.get(column.scale, '')}" for column in columns],
        rows=[captions[row] for row in rows],
        scores=None if reward is None else [column.scores[reward][rows].tolist() for column in columns],
        title=None if len(rows) == len(captions) else f"{len(rows)} of {counted(len(captions), 'image')}",
    )


def write_reward_plot(
    columns: Sequence[ScaleResult], numbers: Sequence[Mapping[str, Any]], images: int, output: Path
) -> Path | None:
    """Plot the rewards over the scale into a file next to the grid ``output``; return its path, None without rewards.

    Raises:
        OSError: the file cannot be written.
    """
    if not columns[0].scores:
        return None
    points: dict[str, list[ScalePoint]] = {}
    for name in columns[0].scores:
        found = [(entry["guidance_scale_reward"], entry["rewards"][name]) for entry in numbers]
        points[name] = [ScalePoint(scale, one["mean"], one["low"], one["high"], one["std"]) for scale, one in found]
    plot = output.with_name(f"{output.stem}_reward.png")
    save_figure(scale_figure(points, images), plot)
    return plot
