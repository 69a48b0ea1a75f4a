"""Combining several rewards into one advantage: normalizing their sum, or each before summing (GDPO)."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from pcpo_fast.config.schema import AdvantageConfig, RewardConfig
from pcpo_fast.method.advantages import centered, compute_advantages, spread, spread_of_others


def compose_advantages(
    total: Tensor,
    components: Tensor,
    specs: Sequence[RewardConfig],
    groups: Tensor,
    settings: AdvantageConfig,
    normalize: str,
) -> Tensor:
    """Advantages of all images of an epoch.

    With ``normalize`` "each", advantages are computed for each reward, summed with their weights, and the sum is
    normalized to mean 0 and standard deviation 1 over the batch (Liu et al., "GDPO", 2026, arXiv:2601.05242). The
    influence of a reward is then its weight, independent of the spread of its scores, and different combinations of
    scores with the same sum get different advantages. ``advantage.normalization`` is applied to each reward.

    Args:
        total: [B], the weighted sum.
        components: [B, R], scores of the rewards trained on.
        specs: these R rewards.
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
    each = torch.stack(
        [
            advantages(clipped(column, spec), groups, settings.normalization, None)
            for spec, column in zip(specs, components.T, strict=True)
        ],
        dim=1,
    )
    summed = torch.zeros_like(total, dtype=torch.float64)
    for spec, column in zip(specs, each.T, strict=True):
        summed += spec.weight * column
    # The batch's mean is 0 but for rounding: images that no reward tells apart stay at exactly 0.
    return advantages(summed, None, "global", settings.clip).masked_fill((each == 0).all(dim=1), 0.0)


class RewardUnits:
    """An epoch's rewards "in units": centred, and divided by the divisor of the final images' advantages.

    The final rewards in units are the advantages of :func:`compose_advantages` before clipping, if ``scale`` is "own"
    and no standard deviation is below the minimum.

    Args:
        total, components, specs, groups, settings, normalize: as in :func:`compose_advantages`, for the final images.
        running: mean standard deviation of each reward in earlier epochs, 0 if it had none; empty in the first epoch.

    Attributes:
        final: float64 [B], the final rewards in units.
        spreads: this epoch's mean standard deviation of each normalized reward, over groups in which it is not 0; 0 if
            there are none.
        equal: bool [B], images whose final rewards equal those of all images they are compared with.
    """

    def __init__(
        self,
        total: Tensor,
        components: Tensor,
        specs: Sequence[RewardConfig],
        groups: Tensor,
        settings: AdvantageConfig,
        normalize: str,
        running: Sequence[float] = (),
    ) -> None:
        self.specs, self.normalize, self.epsilon = specs, normalize, settings.epsilon
        self.weights = [1.0] if normalize == "sum" else [spec.weight for spec in specs]
        everyone = torch.zeros_like(groups)
        members = groups if settings.within_prompts else everyone
        compared = {"group": groups, "flow_grpo": everyone, "global": everyone}[settings.normalization]
        self.members = members
        self.spreads, self.divisors = [], []
        self.equal = torch.ones(len(total), dtype=torch.bool)
        normalized = self._normalized(total, components)
        if len(running) != len(normalized):
            running = ()  # from a run with other rewards
        for index, values in enumerate(normalized):
            deviation = centered(values, compared)
            own = spread(deviation, compared, settings.unbiased)
            self.spreads.append(float(own[own > 0].mean()) if bool((own > 0).any()) else 0.0)
            divisor = spread_of_others(deviation, compared, settings.unbiased) if settings.scale == "others" else own
            before = running[index] if running else 0.0
            if before and settings.scale == "earlier":
                divisor = torch.full_like(own, before)
            divisor = divisor.clamp(min=settings.min_spread * (before or self.spreads[-1]))
            # Final scores that are all equal say nothing, and nothing of what predictions would then be divided by.
            silent = (own == 0) & (divisor == 0)
            self.divisors.append((divisor + settings.epsilon).masked_fill(silent, torch.inf))
            self.equal &= spread(centered(values, members), members, unbiased=False) == 0
        final = self._weighed(total, components, torch.arange(len(total)))
        self.divisor = 1.0  # of the weighted sum, once more
        if normalize == "each":
            self.divisor = float(final.std(correction=int(settings.unbiased))) + settings.epsilon
        self.final = self._combined(final)

    def of(self, total: Tensor, components: Tensor, rows: Tensor) -> Tensor:
        """Rewards of predictions of some images, centred among these and divided like the final rewards.

        Args:
            total: [n], the weighted sum.
            components: [n, R], scores of the rewards trained on.
            rows: int64 [n], the images; all or none of each group.
        """
        return self._combined(self._weighed(total, components, rows))

    def changes(self, total: Tensor, components: Tensor) -> Tensor:
        """Differences of rewards, divided by this epoch's mean standard deviations; 0 for rewards without any spread.

        Args:
            total: [n], differences of weighted sums.
            components: [n, R], differences of the scores of the rewards trained on.
        """
        columns = total[:, None] if self.normalize == "sum" else components
        factors = torch.tensor(
            [
                weight / (spread + self.epsilon) if spread else 0.0
                for weight, spread in zip(self.weights, self.spreads, strict=True)
            ],
            dtype=torch.float64,
        )
        return (columns * factors).sum(dim=1) / self.divisor

    def _normalized(self, total: Tensor, components: Tensor) -> list[Tensor]:
        if self.normalize == "sum":
            return [total]
        return [clipped(scores, spec) for spec, scores in zip(self.specs, components.T, strict=True)]

    def _weighed(self, total: Tensor, components: Tensor, rows: Tensor) -> Tensor:
        summed = torch.zeros(len(rows), dtype=torch.float64)
        for values, weight, divisor in zip(
            self._normalized(total, components), self.weights, self.divisors, strict=True
        ):
            summed += weight * centered(values, self.members[rows]) / divisor[rows]
        return summed

    def _combined(self, summed: Tensor) -> Tensor:
        if self.normalize == "sum":
            return summed
        return (summed - summed.mean()) / self.divisor


def clipped(scores: Tensor, spec: RewardConfig) -> Tensor:
    """Scores clipped to the reward's limits."""
    return scores if spec.clip is None else scores.clamp(*spec.clip)


def composition_metrics(components: Tensor, specs: Sequence[RewardConfig], per_group: int) -> dict[str, float]:
    """Metrics of each reward's influence on the sum.

    Args:
        components: float64 [P per_group, R], scores of the rewards trained on, group-major.
        specs: these R rewards.
        per_group: images per group.

    Returns:
        ``reward_spread/<name>`` if there are several rewards: the standard deviation within a group times the weight,
        mean over groups. ``reward_clipped/<name>`` if a reward has limits: the share of scores outside of them.
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
