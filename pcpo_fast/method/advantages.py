"""Advantages: rewards normalized for the policy loss.

All statistics are float64. Published trainers differ in small ways that are parameters here:

| run | mean | standard deviation | added to it | here |
|---|---|---|---|---|
| DanceGRPO | prompt | prompt, sample (n - 1) | 1e-8 | ``group``, ``unbiased=True`` |
| Flow-GRPO | prompt | whole batch, population (n) | 1e-4 | ``flow_grpo``, ``epsilon=1e-4`` |
| DDPO without buffer | whole batch | whole batch, population | 1e-8 | ``global`` |
| DDPO with buffer | prompt's history | prompt's history, population | 1e-6 | :class:`RunningAdvantages` |

The default is the population form, which most public code computes and which is defined for any count. DanceGRPO's
sample form scales all advantages of a group of n by ``sqrt(1 - 1/n)`` (4 % smaller at n = 12).
"""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pcpo_fast.config.wording import counted

Normalization = Literal["group", "flow_grpo", "global"]

LARGEST_REWARD = 1e100  # squares of rewards must stay finite
_ROUNDING = 1e-14  # rewards of a group that differ by a smaller share of their size are equal


def compute_advantages(
    rewards: Tensor,
    groups: Tensor | None,
    normalization: Normalization = "group",
    clip: float | None = 5.0,
    *,
    epsilon: float = 1e-8,
    unbiased: bool = False,
) -> Tensor:
    """Advantages ``(r - mean) / (std + epsilon)`` of all images of an epoch.

    If all rewards of a group (of the batch for ``"global"``) are equal, their advantages are exactly 0.

    Args:
        rewards: [B], any real dtype.
        groups: integer [B], equal for images of the same prompt; unused (may be None) with ``"global"``.
        normalization: ``"group"``: mean and std per group; ``"flow_grpo"``: mean per group, std of the whole batch;
            ``"global"``: mean and std of the whole batch.
        clip: advantages are clipped to ±clip; None: no clipping.
        epsilon: added to the standard deviation.
        unbiased: divide by n - 1 instead of n in the variance.

    Returns:
        float64 [B] on the device of ``rewards``.

    Raises:
        ValueError: a reward is not finite (the message gives its index), shapes disagree, a group or the batch has a
            single image, or an option is invalid.
    """
    if normalization not in get_args(Normalization):
        allowed = ", ".join(get_args(Normalization))
        raise ValueError(
            f"normalization must be one of {allowed} (running: see RunningAdvantages), got {normalization!r}"
        )
    values = _check_rewards(rewards)
    _check_options(clip, epsilon)
    if len(values) < 2:
        raise ValueError("advantages compare images, but the batch has a single reward")
    everyone = torch.zeros(len(values), dtype=torch.long)
    members = everyone if normalization == "global" else _check_groups(groups, len(values), normalization)
    deviation = centered(values, members)
    if normalization == "flow_grpo":
        divisor = spread(centered(values, everyone), everyone, unbiased)
    else:
        divisor = spread(deviation, members, unbiased)
    return _clipped(deviation / (divisor + epsilon), clip).to(torch.as_tensor(rewards).device)


class RunningAdvantages:
    """DDPO's advantages: statistics of a prompt's latest rewards, over epochs (Black et al. 2024, arXiv:2305.13301).

    Every call first adds the new rewards to the buffers of their prompts. A prompt with fewer than ``min_count``
    rewards in its buffer uses the mean and population standard deviation of the call's batch instead.

    Args:
        buffer_size: number of latest rewards kept per prompt.
        min_count: number of rewards that a prompt needs for its own statistics.
        epsilon: added to the standard deviation.

    Raises:
        ValueError: a count is not a positive integer, or ``min_count`` exceeds ``buffer_size``.
    """

    def __init__(self, buffer_size: int = 16, min_count: int = 16, epsilon: float = 1e-6) -> None:
        for name, count in (("buffer_size", buffer_size), ("min_count", min_count)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} must be a positive integer, got {count!r}")
        if min_count > buffer_size:
            raise ValueError(f"min_count {min_count} is never reached by buffers of {counted(buffer_size, 'reward')}")
        _check_options(None, epsilon)
        self.buffer_size = buffer_size
        self.min_count = min_count
        self.epsilon = epsilon
        self._buffers: dict[str, deque[float]] = {}

    def compute(self, rewards: Tensor, prompts: Sequence[str], clip: float | None = 5.0) -> Tensor:
        """Add the rewards to the buffers and return their advantages.

        Args:
            rewards: [B], any real dtype, of the whole batch (all ranks).
            prompts: the B prompts.
            clip: advantages are clipped to ±clip; None: no clipping.

        Returns:
            float64 [B] on the device of ``rewards``.

        Raises:
            ValueError: a reward is not finite or the lengths disagree; the buffers are then unchanged.
        """
        values = _check_rewards(rewards)
        _check_options(clip, self.epsilon)
        if len(prompts) != len(values):
            raise ValueError(f"got {counted(len(values), 'reward')} for {counted(len(prompts), 'prompt')}")
        for prompt, value in zip(prompts, values.tolist(), strict=True):
            self._buffers.setdefault(prompt, deque(maxlen=self.buffer_size)).append(value)
        own: dict[str, tuple[float, float]] = {}
        batch = _moments(values)
        for prompt in set(prompts):
            buffer = self._buffers[prompt]
            enough = len(buffer) >= self.min_count
            own[prompt] = _moments(torch.tensor(buffer, dtype=torch.float64)) if enough else batch
        mean, std = torch.tensor([own[prompt] for prompt in prompts], dtype=torch.float64).T
        return _clipped((values - mean) / (std + self.epsilon), clip).to(torch.as_tensor(rewards).device)

    def state_dict(self) -> dict[str, Any]:
        """The buffers as JSON-compatible lists, oldest reward first."""
        return {"rewards": {prompt: list(buffer) for prompt, buffer in self._buffers.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the buffers by saved ones; a smaller ``buffer_size`` keeps the latest rewards.

        Raises:
            ValueError: the state was not made by :meth:`state_dict`, or contains a value that is not finite.
        """
        saved = state.get("rewards")
        if not isinstance(saved, dict):
            raise ValueError("not a saved state of RunningAdvantages: it has no dictionary of rewards")
        for prompt, rewards in saved.items():
            if not all(isinstance(reward, int | float) and math.isfinite(reward) for reward in rewards):
                raise ValueError(f"the saved rewards of the prompt {prompt!r} are not all finite numbers")
        self._buffers = {prompt: deque(rewards, maxlen=self.buffer_size) for prompt, rewards in saved.items()}


def centered(values: Tensor, members: Tensor) -> Tensor:
    """``values`` [B] minus their group's mean; exactly 0 in a group of values that are equal but for rounding."""
    count = torch.bincount(members)
    mean = (torch.bincount(members, weights=values) / count)[members]
    highest = torch.full_like(count, -math.inf, dtype=torch.float64).scatter_reduce(0, members, values, "amax")
    lowest = torch.full_like(count, math.inf, dtype=torch.float64).scatter_reduce(0, members, values, "amin")
    equal = highest - lowest <= _ROUNDING * torch.maximum(highest.abs(), lowest.abs())
    return torch.where(equal[members], 0.0, values - mean)


def spread(deviation: Tensor, members: Tensor, unbiased: bool) -> Tensor:
    """Standard deviation of each value's group, [B], from centred values."""
    count = torch.bincount(members)
    variance = torch.bincount(members, weights=deviation**2) / (count - int(unbiased))
    return variance.sqrt()[members]


def spread_of_others(deviation: Tensor, members: Tensor, unbiased: bool) -> Tensor:
    """Leave-one-out standard deviation of each value's group, [B], from centred values; groups of three or more."""
    others = (torch.bincount(members) - 1)[members]
    squares = torch.bincount(members, weights=deviation**2)[members] - deviation**2
    # The mean of the others is minus the value's deviation divided by their number.
    variance = (squares - deviation**2 / others).clamp(min=0) / (others - int(unbiased))
    return variance.sqrt()


def _moments(values: Tensor) -> tuple[float, float]:
    """Mean and population standard deviation; the common value and exactly 0 if all are equal."""
    if bool((values == values[0]).all()):
        return float(values[0]), 0.0
    return float(values.mean()), float(values.std(correction=0))


def _clipped(advantages: Tensor, clip: float | None) -> Tensor:
    return advantages if clip is None else advantages.clamp(-clip, clip)


def _check_rewards(rewards: Tensor) -> Tensor:
    values = torch.as_tensor(rewards).detach().to(device="cpu", dtype=torch.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"rewards must be a vector with one number per image, got the shape {list(values.shape)}")
    bad = (~(values.abs() <= LARGEST_REWARD)).nonzero()
    if len(bad):
        index = int(bad[0])
        limit = f"finite and within plus or minus {LARGEST_REWARD:g}"
        raise ValueError(f"rewards must be {limit}, got {float(values[index])} at index {index}")
    return values


def _check_groups(groups: Tensor | None, count: int, normalization: str) -> Tensor:
    """Group numbers 0, 1, ... [B]."""
    if groups is None:
        raise ValueError(f"{normalization} advantages need the group of every image")
    groups = torch.as_tensor(groups)
    if groups.is_floating_point() or groups.is_complex() or list(groups.shape) != [count]:
        raise ValueError(
            f"groups must be {counted(count, 'integer')}, got {groups.dtype} with the shape {list(groups.shape)}"
        )
    names, members, sizes = groups.detach().cpu().unique(return_inverse=True, return_counts=True)
    alone = (sizes == 1).nonzero()
    if len(alone):
        raise ValueError(
            f"{normalization} advantages compare the images of a prompt, "
            f"but group {int(names[int(alone[0])])} has a single image"
        )
    return members


def _check_options(clip: float | None, epsilon: float) -> None:
    if clip is not None and not (math.isfinite(clip) and clip > 0):
        raise ValueError(f"clip must be a positive number, or None for no clipping, got {clip}")
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon must be a positive number, got {epsilon}")
