"""Several rewards as one advantage: normalised after the sum, or each before it (GDPO)."""

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


class RewardUnits:
    """An epoch's rewards in units: centred, and divided by what divides the advantages of its final images.

    Final rewards in units are the advantages of :func:`compose_advantages` before clipping, with ``scale`` "own" and
    as long as no standard deviation falls below the least one.

    Args:
        total, components, specs, groups, settings, normalize: as there, of the final images.
        running: mean standard deviation of each reward in earlier epochs, 0 where it had none; empty in the first.

    Attributes:
        final: float64 [B], the final rewards in units.
        spreads: this epoch's mean standard deviation of each reward that is normalised, over the images that it tells
            apart; 0 where there are none.
        equal: bool [B], images that have the same final rewards as all that they are compared with.
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
        compared = groups if settings.normalization == "group" else everyone
        self.members = members
        self.spreads, self.divisors = [], []
        self.equal = torch.ones(len(total), dtype=torch.bool)
        normalized = self._normalized(total, components)
        if len(running) != len(normalized):
            running = ()  # of a run with other rewards
        for index, values in enumerate(normalized):
            deviation = centered(values, compared)
            own = spread(deviation, compared, settings.unbiased)
            self.spreads.append(float(own[own > 0].mean()) if bool((own > 0).any()) else 0.0)
            divisor = spread_of_others(deviation, compared, settings.unbiased) if settings.scale == "others" else own
            before = running[index] if running else 0.0
            if before and settings.scale == "earlier":
                divisor = torch.full_like(own, before)
            if settings.steps != "final":
                divisor = divisor.clamp(min=settings.min_spread * (before or self.spreads[-1]))
            self.divisors.append(divisor + settings.epsilon)
            self.equal &= spread(centered(values, members), members, unbiased=False) == 0
        final = self._weighed(total, components, torch.arange(len(total)))
        self.divisor = 1.0  # of the weighted sum, once more
        if normalize == "each":
            self.divisor = float(final.std(correction=int(settings.unbiased))) + settings.epsilon
        self.final = self._brought_together(final)

    def of(self, total: Tensor, components: Tensor, rows: Tensor) -> Tensor:
        """Rewards of predictions of some of the images, centred among these, divided as the final ones are.

        Args:
            total: [n], the weighted sum.
            components: [n, R], scores of the rewards trained on.
            rows: int64 [n], which images; of each group all or none.
        """
        return self._brought_together(self._weighed(total, components, rows))

    def changes(self, total: Tensor, components: Tensor) -> Tensor:
        """Differences of rewards in units, by this epoch's mean standard deviations.

        Args:
            total: [n], of weighted sums.
            components: [n, R], of the scores of the rewards trained on.
        """
        columns = total[:, None] if self.normalize == "sum" else components
        factors = torch.tensor(self.weights, dtype=torch.float64) / (
            torch.tensor(self.spreads, dtype=torch.float64) + self.epsilon
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

    def _brought_together(self, summed: Tensor) -> Tensor:
        if self.normalize == "sum":
            return summed
        return (summed - summed.mean()) / self.divisor


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
