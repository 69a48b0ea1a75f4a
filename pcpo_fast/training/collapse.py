"""Detecting collapse: loss of diversity, distance from the base model, rewards without spread, and step predictions
that improve while the held-out reward does not.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterator
from statistics import fmean
from typing import Any

from torch import Tensor

from pcpo_fast.config.wording import counted
from pcpo_fast.method.step_advantages import StepAdvantages


def base_distance(first: Tensor, now: Tensor) -> float:
    """Mean over images of the root mean square pixel distance between the same image before training and now.

    Args:
        first, now: [n, 3, H, W] in 0..1, for the same prompts and noise. Both are rounded to 8 bits, as in image files,
            so that the distance of unchanged images is 0.
    """
    gap = (_levels(first) - _levels(now)) / 255
    return float(gap.square().flatten(1).mean(dim=1).sqrt().mean())


def _levels(images: Tensor) -> Tensor:
    # In float32, as image files are written: in float64 values between two levels would round differently.
    return (images.float().clamp(0, 1) * 255).round().double()


class CollapseMonitor:
    """Detects that held-out diversity has fallen below a share of its value before training.

    Args:
        share: ``evaluation.min_diversity``; None: never.

    Attributes:
        before: diversity before training, kept in checkpoints.
        reason: one sentence once the policy has collapsed, otherwise None.
    """

    def __init__(self, share: float | None) -> None:
        self.share = share
        self.before: float | None = None
        self.reason: str | None = None

    def look(self, diversity: float | None, epoch: int, *, is_first: bool) -> None:
        """Process an evaluation's diversity; missing or non-finite values are ignored."""
        if diversity is None or not math.isfinite(diversity):
            return
        if is_first:
            self.before = diversity
        self.reason = None
        if self.share is not None and self.before is not None and diversity < self.share * self.before:
            self.reason = (
                f"stopped after {counted(epoch, 'epoch')} because the images of a prompt have become alike: held-out "
                f"diversity {diversity:.3f} is below {self.share:g} times the {self.before:.3f} before training "
                "(evaluation.min_diversity); an earlier checkpoint is more diverse, and a lower optimizer.lr or a "
                "credit.kl_coefficient preserves diversity"
            )


class SpreadMonitor:
    """Warns, once per reward, that all compared images have had the same score for several epochs.

    The advantages are then 0 or pure rounding error, and the run learns nothing.

    Args:
        epochs: number of consecutive epochs after which to warn.
    """

    def __init__(self, epochs: int = 3) -> None:
        self.epochs = epochs
        self._in_a_row: Counter[str] = Counter()
        self._said: set[str] = set()

    def look(self, equal: Collection[str]) -> Iterator[str]:
        """Process an epoch; yields the warnings.

        Args:
            equal: rewards whose scores were equal, in float32, among all compared images.
        """
        self._in_a_row = Counter({name: self._in_a_row[name] + 1 for name in equal})
        for name, count in self._in_a_row.items():
            if count >= self.epochs and name not in self._said:
                self._said.add(name)
                yield (
                    f"the reward {name} has given all images of a prompt the same score for "
                    f"{counted(count, 'epoch')}, so nothing can be learned from it; check its scores and the images "
                    "(its clip setting, or prompts or image sizes that it does not support)"
                )


class PredictionMonitor:
    """Warns if predictions catch up with their final images over three evaluations, the held-out reward not rising.

    Per-step credit may then improve early predictions without improving the final images. Rewards of predictions are
    compared with those of their own final images, since every epoch has other prompts, and a rise must be twice its
    standard error. Only steps whose predictions were scored at all three count: those of a window that moves on rise by
    that alone. With ``advantage.gain_lambda_rise`` the discount of later gains then rises, and the next warning takes
    two more evaluations; otherwise there is one warning.

    Args:
        stepwise: holds the discount.
    """

    def __init__(self, stepwise: StepAdvantages) -> None:
        self.stepwise = stepwise
        self._seen: list[tuple[dict[str, tuple[float, float]], float]] = []
        self._said = False

    def look(self, leads: dict[str, tuple[float, float]], heldout: float) -> Iterator[str]:
        """Process an evaluation; yields the warning.

        Args:
            leads: those of the latest epoch, as of :class:`pcpo_fast.rollout.epoch_scoring.ScoredEpoch`; empty if no
                predictions are scored.
            heldout: mean held-out reward.
        """
        if not leads or self._said:
            return
        self._seen = [*self._seen[-2:], (leads, heldout)]
        common = set.intersection(*(set(step_leads) for step_leads, _ in self._seen))
        if len(self._seen) < 3 or not common:
            return
        first, second, third = (fmean(then[step][0] for step in common) for then, _ in self._seen)
        errors = [fmean(then[step][1] for step in common) for then, _ in (self._seen[0], self._seen[2])]
        before, now = self._seen[0][1], heldout
        if first < second < third and third - first > 2 * math.hypot(*errors) and now <= before:
            discount, rise = self.stepwise.gain_lambda, self.stepwise.settings.gain_lambda_rise
            if discount == 1:
                advice = "lower optimizer.lr, or stop"
            elif rise:
                self.stepwise.risen += rise
                advice = f"gain_lambda rises from {discount:.3g} to {self.stepwise.gain_lambda:.3g}"
            else:
                advice = "raise advantage.gain_lambda, use advantage.steps=baseline, or stop"
            self._seen, self._said = self._seen[-1:], discount == 1 or not rise
            yield (
                f"over three evaluations the reward of the steps' predictions, minus that of their final images, has "
                f"risen from {first:.3g} to {third:.3g}, but the held-out reward has not ({before:.3g}, now "
                f"{now:.3g}): per-step credit may be improving early predictions only; {advice}"
            )

    def state_dict(self) -> dict[str, Any]:
        """What has been seen so far."""
        return {"seen": list(self._seen), "said": self._said}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._seen, self._said = [(leads, heldout) for leads, heldout in state.get("seen", ())], state["said"]
