"""Several rewards as one advantage: normalised after the sum, or each before it (GDPO)."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from pcpo_fast.config.schema import AdvantageConfig, RewardConfig
from pcpo_fast.method.advantages import compute_advantages


def compose_advantages(
    total: Tensor,
    components: Tensor,
    specs: Sequence[RewardConfig],
    groups: Tensor,
    settings: AdvantageConfig,
    normalize: str,
) -> Tensor:
    """Advantages of a whole epoch's images.

    With ``normalize`` "each", the rewards become advantages first, the weighted advantages are summed, and the sum is
    brought to mean 0 and standard deviation 1 over the batch (Liu et al., "GDPO", 2026, arXiv:2601.05242). A reward
    then counts by its weight, whatever the spread of its scores, and combinations of rewards with the same sum do not
    get the same advantage. ``advantage.normalization`` says how each reward is normalised.

    Args:
        total: [B], the weighted sum.
        components: [B, R], scores of the rewards trained on.
        specs: those R rewards.
        groups: integer [B].
        settings: the configuration's section ``advantage``; its normalization is not "running".
        normalize: "sum" or "each".

    Returns:
        float64 [B].
    """
    assert settings.normalization != "running"
    advantages = partial(compute_advantages, epsilon=settings.epsilon, unbiased=settings.unbiased)
    if normalize == "sum":
        return advantages(total, groups, settings.normalization, settings.clip)
    summed = torch.zeros_like(total, dtype=torch.float64)
    for spec, scores in zip(specs, components.T, strict=True):
        summed += spec.weight * advantages(clipped(scores, spec), groups, settings.normalization, None)
    return advantages(summed, None, "global", settings.clip)


def clipped(scores: Tensor, spec: RewardConfig) -> Tensor:
    """Scores within the reward's limits."""
    return scores if spec.clip is None else scores.clamp(*spec.clip)


def composition_metrics(components: Tensor, specs: Sequence[RewardConfig], per_group: int) -> dict[str, float]:
    """What each reward has to say in the sum.

    Args:
        components: float64 [P per_group, R], scores of the rewards trained on, group-major.
        specs: those R rewards.
        per_group: images of a group.

    Returns:
        ``reward_spread/<name>`` where there are several: the standard deviation within a group times the weight, mean
        over groups. ``reward_clipped/<name>`` where a reward has limits: the share of scores outside of them.
    """
    metrics = {}
    for spec, scores in zip(specs, components.T, strict=True):
        limited = clipped(scores, spec)
        if len(specs) > 1:
            spread = limited.reshape(-1, per_group).std(dim=1, unbiased=False).mean()
            metrics[f"reward_spread/{spec.column}"] = float(abs(spec.weight) * spread)
        if spec.clip is not None:
            metrics[f"reward_clipped/{spec.column}"] = float((limited != scores).double().mean())
    return metrics
