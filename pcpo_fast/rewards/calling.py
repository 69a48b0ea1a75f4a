"""Calling a reward and checking its result; errors name the reward and the prompt."""

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pcpo_fast.errors import UserError
from pcpo_fast.rewards.failures import RewardFailure
from pcpo_fast.rewards.registry import Reward
from pcpo_fast.rewards.time_limit import TimeLimit, TookTooLong
from pcpo_fast.rewards.user import first_line

_SEARCH_SECONDS = 10.0  # time limit of the search for the image that makes a reward fail
_NO_LIMIT = TimeLimit(None)


def call_reward(
    name: str,
    reward: Reward,
    images: Tensor,
    prompts: list[str],
    metadata: list[dict[str, Any]],
    *,
    limit: TimeLimit = _NO_LIMIT,
    search: bool = True,
) -> Tensor:
    """Scores of B images, B at least 1.

    Args:
        name: name of the reward in error messages.
        reward: the callable.
        images: float32 [B, 3, H, W] in 0..1.
        prompts, metadata: B each.
        limit: time limit of the call.
        search: if the reward raises, find the image that causes it by scoring images one by one.

    Returns:
        float32 [B], finite, on the images' device.

    Raises:
        RewardFailure: the reward raises, takes too long, or returns anything but B finite numbers.
        UserError: the reward modifies the images.
    """
    version = images._version
    try:
        result = limit.call(lambda: reward(images, list(prompts), metadata))
    except RewardFailure:
        raise
    except UserError as error:
        raise RewardFailure(str(error)) from error.__cause__
    except TookTooLong:
        raise RewardFailure(
            f"reward {name} took longer than {limit.seconds:g} s (scoring.timeout) for {_rows(prompts)}", retry=False
        ) from None
    except Exception as error:
        failing = _first_failing(reward, images, prompts, metadata) if search else None
        place = _rows(prompts) if failing is None else _row(failing, prompts)
        raise RewardFailure(f"reward {name} failed on {place}: {first_line(error)}") from error
    if images._version != version:
        raise UserError(f"reward {name} modifies the images in place, which would affect later rewards and the logs")
    scores = _as_tensor(name, result, prompts).to(images.device)
    finite = scores.isfinite()
    if not finite.all():
        row = int((~finite).nonzero()[0])
        cause = "" if images[row].isfinite().all() else "; the image itself has pixels that are not finite"
        raise RewardFailure(
            f"reward {name} returned {scores[row].item()} for {_row(row, prompts)}{cause}",
            torch.where(finite, scores, torch.nan),
        )
    return scores


def _as_tensor(name: str, result: object, prompts: list[str]) -> Tensor:
    """The result as float32 [B]; RewardFailure if it is anything else."""
    expected = f"expected {len(prompts)} numbers, one for each image, the first for {_row(0, prompts)}"
    try:
        if result is None:  # NumPy would convert it to NaN
            raise TypeError
        if isinstance(result, list | tuple) and any(isinstance(item, Tensor) for item in result):
            result = torch.stack([torch.as_tensor(item).cpu() for item in result])
        values = result if isinstance(result, Tensor) else torch.from_numpy(np.asarray(result, dtype=np.float64))
    except (TypeError, ValueError, RuntimeError):
        raise RewardFailure(
            f"reward {name} returned a {type(result).__name__} which is not a list of numbers; {expected}"
        ) from None
    if values.is_complex():
        raise RewardFailure(f"reward {name} returned complex numbers; {expected}")
    if values.shape != (len(prompts),):
        raise RewardFailure(f"reward {name} returned the shape {tuple(values.shape)}; {expected}")
    return values.detach().to(torch.float32)


def _first_failing(reward: Reward, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> int | None:
    """The first image that fails when scored alone; None if none does or the search takes too long."""
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


def _rows(prompts: list[str]) -> str:
    first = _row(0, prompts)
    return first if len(prompts) == 1 else f"{len(prompts)} images, first {first}"
