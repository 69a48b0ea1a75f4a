"""Watching for collapse: does the policy still draw different images for one prompt, how far has it moved, do the
rewards tell its images apart, and do the predictions of its steps improve alone?
"""

import math
from collections import Counter
from collections.abc import Collection, Iterator

from torch import Tensor


def base_distance(first: Tensor, now: Tensor) -> float:
    """Root mean square pixel distance between the same images before the training and now, mean over images.

    Args:
        first, now: [n, 3, H, W] in 0..1, the same prompts and noise. Both are compared as the 8 bits of an image file,
            so that images that have not changed are 0 apart.
    """
    gap = (_levels(first) - _levels(now)) / 255
    return float(gap.square().flatten(1).mean(dim=1).sqrt().mean())


def _levels(images: Tensor) -> Tensor:
    # In the float32 that the files are written with: in float64 a value on the edge falls to the other level.
    return (images.float().clamp(0, 1) * 255).round().double()


class CollapseMonitor:
    """Says when the held-out diversity has fallen below a share of that before the training.

    Args:
        share: ``evaluation.min_diversity``; None never says so.

    Attributes:
        before: diversity before the training, kept in checkpoints.
        reason: one sentence once it has happened, else None.
    """

    def __init__(self, share: float | None) -> None:
        self.share = share
        self.before: float | None = None
        self.reason: str | None = None

    def look(self, diversity: float | None, epoch: int, *, is_first: bool) -> None:
        """Take an evaluation's diversity into account; one that is not there or not finite says nothing."""
        if diversity is None or not math.isfinite(diversity):
            return
        if is_first:
            self.before = diversity
        self.reason = None
        if self.share is not None and self.before is not None and diversity < self.share * self.before:
            self.reason = (
                f"stopped after {epoch} epochs, since the images of a prompt have become alike: held-out diversity "
                f"{diversity:.3f} is below {self.share:g} of the {self.before:.3f} before the training "
                "(evaluation.min_diversity); an earlier checkpoint is more diverse, and a lower optimizer.lr or a "
                "credit.kl_coefficient keeps more of it"
            )


class SpreadMonitor:
    """Says, once for each reward, that it has not told the images it compares apart for some epochs in a row.

    Their advantages are 0, or consist of rounding errors only, and the run continues as if it learned something.

    Args:
        epochs: after how many.
    """

    def __init__(self, epochs: int = 3) -> None:
        self.epochs = epochs
        self._in_a_row: Counter[str] = Counter()
        self._said: set[str] = set()

    def look(self, equal: Collection[str]) -> Iterator[str]:
        """Take an epoch into account; yields a sentence for each reward that there is something to say of.

        Args:
            equal: rewards whose scores were the same, in float32, wherever they are compared.
        """
        self._in_a_row = Counter({name: self._in_a_row[name] + 1 for name in equal})
        for name, count in self._in_a_row.items():
            if count >= self.epochs and name not in self._said:
                self._said.add(name)
                yield (
                    f"the reward {name} has given all images of a prompt the same score for {count} epochs, so nothing "
                    "can be learned from it: look at its scores and at the images (a clip range, a prompt or an image "
                    "size that it was not made for)"
                )


class PredictionMonitor:
    """Says once that the rewards of predictions rise over three evaluations in a row, and the held-out reward does not.

    Per-step credit can then be teaching the policy to please early instead of to end well.
    """

    def __init__(self) -> None:
        self._pairs: list[tuple[float, float]] = []
        self._said = False

    def look(self, predicted: float | None, heldout: float) -> Iterator[str]:
        """Take an evaluation into account; yields a sentence if there is something to say.

        Args:
            predicted: mean reward of the latest epoch's predictions; None where none are scored.
            heldout: held-out reward.
        """
        if predicted is None or self._said:
            return
        self._pairs = [*self._pairs[-2:], (predicted, heldout)]
        (first, before), (second, _), (third, now) = ([(math.inf, math.inf)] * 3 + self._pairs)[-3:]
        if first < second < third and now <= before < math.inf:
            self._said = True
            yield (
                f"the reward of what steps predict has risen from {first:.3g} to {third:.3g} over three evaluations "
                f"and the held-out reward has not ({before:.3g}, now {now:.3g}): per-step credit may be teaching the "
                "policy to please early; raise advantage.gain_lambda, take advantage.steps=baseline, or stop"
            )
