"""Calling a reward and checking its result; errors name the reward and the prompt."""

import inspect
import time
from contextlib import suppress
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pcpo_fast.config.wording import counted
from pcpo_fast.errors import UserError
from pcpo_fast.method.advantages import LARGEST_REWARD
from pcpo_fast.rewards.failures import RewardFailure
from pcpo_fast.rewards.registry import Reward
from pcpo_fast.rewards.time_limit import TimeLimit, TookTooLong
from pcpo_fast.rewards.user import USERS_ERRORS, first_line

_SEARCH_SECONDS = 10.0  # time limit of the search for the image that makes a reward fail


def call_reward(
    name: str,
    reward: Reward,
    images: Tensor,
    prompts: list[str],
    metadata: list[dict[str, Any]],
    *,
    limit: TimeLimit | None = None,
    search: bool = True,
) -> Tensor:
    """Scores of B images, B at least 1.

    The reward gets copies of everything, and its result is copied: what it changes, or keeps for its next call, changes
    nothing here, whether it writes through PyTorch, NumPy or anything else.

    Args:
        name: name of the reward in error messages.
        reward: the callable.
        images: float32 [B, 3, H, W] in 0..1.
        prompts, metadata: B each.
        limit: time limit of the call; None: no limit.
        search: if the reward raises, find the image that causes it by scoring images one by one, for at most ten
            seconds and within the limit of one call.

    Returns:
        float64 [B], finite and within plus or minus :data:`LARGEST_REWARD`, on the images' device.

    Raises:
        RewardFailure: the reward raises, takes too long, or returns anything but B such numbers.
    """
    limit = TimeLimit(None) if limit is None else limit

    def score(rows: slice) -> object:
        return reward(images[rows].detach().clone(), prompts[rows], [deepcopy(row) for row in metadata[rows]])

    def first_failing(message: str) -> int | None:
        """The first image that fails alone and in the same way as the batch; None if there is none."""
        end = time.monotonic() + _SEARCH_SECONDS  # a thread that is given up ends, too
        for row in range(len(prompts)):
            if time.monotonic() > end:
                break
            try:
                score(slice(row, row + 1))
            except USERS_ERRORS as error:
                if first_line(error) == message:
                    return row
        return None

    try:
        result = limit.call(lambda: score(slice(None)))
    except RewardFailure:
        raise
    except UserError as error:
        raise RewardFailure(str(error)) from error.__cause__
    except TookTooLong:
        raise RewardFailure(
            f"reward {name} took longer than {limit.seconds:g} s (scoring.timeout) for {_rows(prompts)}", retry=False
        ) from None
    except USERS_ERRORS as error:
        message, failing = first_line(error), None
        if search:
            with suppress(TookTooLong):
                failing = limit.call(lambda: first_failing(message), at_most=_SEARCH_SECONDS)
        place = _rows(prompts) if failing is None else row_text(failing, prompts)
        raise RewardFailure(f"reward {name} failed on {place}: {message}") from error
    scores = _as_tensor(name, result, prompts).to(images.device)
    usable = scores.abs() <= LARGEST_REWARD
    if not usable.all():
        row = int((~usable).nonzero()[0])
        cause = "" if images[row].isfinite().all() else "; the image itself has pixels that are not finite"
        if scores[row].isfinite():
            cause = f"; allowed: plus or minus {LARGEST_REWARD:g}"
        raise RewardFailure(
            f"reward {name} returned {scores[row].item()} for {row_text(row, prompts)}{cause}",
            torch.where(usable, scores, torch.nan),
        )
    return scores


def _as_tensor(name: str, result: object, prompts: list[str]) -> Tensor:
    """The result as a new float64 [B]; RewardFailure if it is anything else."""
    count, first = len(prompts), row_text(0, prompts)
    expected = f"expected {counted(count, 'number')}, one for each image, the first for {first}"
    if count == 1:
        expected = f"expected 1 number, for {first}"
    if inspect.iscoroutine(result):
        result.close()  # otherwise Python warns that it was never awaited
        raise RewardFailure(f"reward {name} is an async function, but must return its numbers itself; {expected}")
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
    if values.shape != (count,):
        raise RewardFailure(f"reward {name} returned the shape {tuple(values.shape)}; {expected}")
    return values.detach().to(torch.float64, copy=True)


def row_text(row: int, prompts: list[str]) -> str:
    """Which image of a call, for messages."""
    text = prompts[row] if len(prompts[row]) <= 100 else prompts[row][:97] + "..."
    return f"the prompt {text!r} (image {row + 1} of {len(prompts)})"


def _rows(prompts: list[str]) -> str:
    first = row_text(0, prompts)
    return first if len(prompts) == 1 else f"{counted(len(prompts), 'image')}, first {first}"
