"""Calling rewards: every answer is checked, and a wrong one names the reward and the prompt."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pcpo_fast.config import RewardConfig
from pcpo_fast.errors import UserError
from pcpo_fast.rewards.registry import Reward, load_reward
from pcpo_fast.rewards.user import first_line

_SEARCH_SECONDS = 10.0  # for the image that makes a reward fail; a reward that waits for a server takes its time


@dataclass(frozen=True)
class Scores:
    """What the rewards say of B images. All tensors are float32 [B] on the images' device.

    Attributes:
        total: the weighted sum of the rewards trained on.
        components: every reward that was computed, by name and without its weight.
    """

    total: Tensor
    components: dict[str, Tensor]


class RewardSet:
    """The rewards of a run, with their weights.

    Raises:
        UserError: a reward cannot be found or made (see :func:`pcpo_fast.rewards.registry.load_reward`).
    """

    def __init__(self, specs: Sequence[RewardConfig]) -> None:
        self._specs = tuple(specs)
        self._rewards: list[Reward] = [load_reward(spec.name, spec.options) for spec in specs]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all rewards, evaluation-only ones too, in the order of the config."""
        return tuple(spec.name for spec in self._specs)

    @torch.no_grad()
    def score(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[dict[str, Any]] | None = None,
        *,
        evaluation: bool = True,
    ) -> Scores:
        """Score images.

        Args:
            images: float32 [B, 3, H, W] in 0..1.
            prompts: B texts.
            metadata: B dictionaries, or None for empty ones.
            evaluation: also compute the rewards that are ``evaluation_only``; they never count in the total.

        Raises:
            UserError: a reward raises, changes the images, or returns anything but B finite numbers.
            ValueError: images, prompts and metadata do not fit together.
        """
        count = len(images)
        rows = [{} for _ in range(count)] if metadata is None else metadata
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.float32:
            raise ValueError(f"images must be float32 [B, 3, H, W], got {images.dtype} {tuple(images.shape)}")
        if not count == len(prompts) == len(rows):
            raise ValueError(f"{count} images need as many prompts and metadata, got {len(prompts)} and {len(rows)}")
        total = torch.zeros(count, device=images.device)
        components: dict[str, Tensor] = {}
        for spec, reward in zip(self._specs, self._rewards, strict=True):
            if spec.evaluation_only and not evaluation:
                continue
            scores = total.new_zeros(0)
            if count:
                scores = _call(spec.name, reward, images.detach(), list(prompts), [dict(row) for row in rows])
            components[spec.name] = scores
            if not spec.evaluation_only:
                total += spec.weight * scores
        return Scores(total, components)


def _call(name: str, reward: Reward, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    version = images._version
    try:
        result = reward(images, list(prompts), metadata)
    except UserError:
        raise
    except Exception as error:
        failing = _first_failing(reward, images, prompts, metadata)
        place = f"{len(prompts)} images, first {_row(0, prompts)}" if failing is None else _row(failing, prompts)
        raise UserError(f"reward {name} failed on {place}: {first_line(error)}") from error
    if images._version != version:
        raise UserError(f"reward {name} changes the images in place, which later rewards and the logs would see")
    scores = _as_tensor(name, result, prompts).to(images.device)
    finite = scores.isfinite()
    if not finite.all():
        row = int((~finite).nonzero()[0])
        cause = "" if images[row].isfinite().all() else "; the image itself has pixels that are not finite"
        raise UserError(f"reward {name} returned {scores[row].item()} for {_row(row, prompts)}{cause}")
    return scores


def _as_tensor(name: str, result: object, prompts: list[str]) -> Tensor:
    """float32 [B], or a UserError that says what came instead."""
    expected = f"expected {len(prompts)} numbers, one for each image, the first for {_row(0, prompts)}"
    try:
        if result is None:  # which NumPy takes for a NaN
            raise TypeError
        if isinstance(result, list | tuple) and any(isinstance(item, Tensor) for item in result):
            result = torch.stack([torch.as_tensor(item).cpu() for item in result])
        values = result if isinstance(result, Tensor) else torch.from_numpy(np.asarray(result, dtype=np.float64))
    except (TypeError, ValueError, RuntimeError):
        raise UserError(
            f"reward {name} returned a {type(result).__name__} that is no list of numbers; {expected}"
        ) from None
    if values.is_complex():
        raise UserError(f"reward {name} returned complex numbers; {expected}")
    if values.shape != (len(prompts),):
        raise UserError(f"reward {name} returned the shape {tuple(values.shape)}; {expected}")
    return values.detach().to(torch.float32)


def _first_failing(reward: Reward, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> int | None:
    """The first image that fails when scored alone; None where none does or the search takes too long."""
    end = time.monotonic() + _SEARCH_SECONDS
    for row in range(len(prompts)):
        try:
            reward(images[row : row + 1], prompts[row : row + 1], metadata[row : row + 1])
        except Exception:
            return row
        if time.monotonic() > end:
            break
    return None


def _row(row: int, prompts: list[str]) -> str:
    text = prompts[row] if len(prompts[row]) <= 100 else prompts[row][:97] + "..."
    return f"the prompt {text!r} (image {row + 1} of {len(prompts)})"
