"""Per-step advantages: credit for what a step changed (docs/stepwise.md).

A step's output predicts the clean image. The reward of that prediction, known before the step's noise, is the expected
reward; the reward of the next prediction shows what the noise changed. All rewards here are centred and divided by the
divisor of the final advantages ("in units"), all arithmetic is float64, and every function sees all ranks' images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pcpo_fast.config.schema import AdvantageConfig

KEPT = 0.9
"""Decay per epoch of the statistics of earlier epochs."""
SETTLED = 1e-12
"""A sum of squares (in units) below this counts as no spread."""


@dataclass(frozen=True)
class Segments:
    """The steps with noise, cut into segments that begin where a prediction is scored.

    Attributes:
        scored: steps whose prediction is scored, ascending; the first step of each of the S segments.
        of_step: the segment of each of the N steps; -1 where the step has no noise.
    """

    scored: tuple[int, ...]
    of_step: tuple[int, ...]

    @classmethod
    def of(cls, noisy: Sequence[bool], every: int) -> "Segments":
        """Score every n-th step with noise, starting with the first."""
        random = [step for step, flag in enumerate(noisy) if flag]
        of_step = [-1] * len(noisy)
        for position, step in enumerate(random):
            of_step[step] = position // every
        return cls(tuple(random[::every]), tuple(of_step))

    def needed(self, trained: Tensor, gain_lambda: float) -> Tensor:
        """Which predictions are needed for the credit of some steps.

        Args:
            trained: bool [..., N], steps whose credit is needed.
            gain_lambda: 1 for the baseline.

        Returns:
            bool [..., S].
        """
        segments = torch.zeros(*trained.shape[:-1], len(self.scored), dtype=torch.bool)
        for step, segment in enumerate(self.of_step):
            if segment >= 0:
                segments[..., segment] |= trained[..., step]
        if gain_lambda == 1:
            return segments
        before = segments.roll(1, dims=-1)  # a gain ends where the next segment begins
        before[..., :1] = False
        if gain_lambda > 0:
            before = before.long().cummax(dim=-1).values.bool()
        return segments | before


def segment_credit(
    final: Tensor, predicted: Tensor, weights: Tensor, gain_lambda: float, multipliers: Tensor | None = None
) -> Tensor:
    """Credit of each segment's steps, before clipping.

    ``values = weights * predicted`` before the final reward; the gain of a segment is the difference of the value
    after it and the one at its start, and its credit the sum of its own and the later gains, each of these times
    ``gain_lambda`` per segment between. With 1 this is the final reward minus the value, with 0 the gain.

    Args:
        final: [B], the images' final rewards in units.
        predicted: [B, S], rewards of the predictions at the start of each segment in units; NaN where not scored.
        weights: [S], beta: regression slope of the final reward on a prediction's.
        gain_lambda: 0 to 1.
        multipliers: [S], factors of the gains of unweighted predictions, in place of ``weights``.

    Returns:
        [B, S]; NaN where a required prediction was not scored.
    """
    if gain_lambda == 1:
        return final[:, None] - weights * predicted
    values = torch.cat([predicted if multipliers is not None else weights * predicted, final[:, None]], dim=1)
    gains = values.diff(dim=1)
    if multipliers is not None:
        gains = gains * multipliers
    if gain_lambda == 0:
        return gains
    credit = gains.clone()
    for segment in reversed(range(gains.shape[1] - 1)):
        credit[:, segment] += gain_lambda * credit[:, segment + 1]
    return credit


class Regression:
    """Regression slope through the origin for each of N steps, with exponentially decaying weight of past epochs.

    Args:
        steps: N.
    """

    def __init__(self, steps: int) -> None:
        self.products, self.squares = (torch.zeros(steps, dtype=torch.float64) for _ in range(2))

    def add(self, steps: Sequence[int], results: Tensor, predictors: Tensor) -> None:
        """Add an epoch's pairs, both [B, K], of K of the steps; pairs with a NaN are ignored."""
        known = results.isfinite() & predictors.isfinite()
        results, predictors = results.where(known, 0.0), predictors.where(known, 0.0)
        for total, new in ((self.products, results * predictors), (self.squares, predictors**2)):
            total[list(steps)] = KEPT * total[list(steps)] + new.sum(dim=0)

    @property
    def slopes(self) -> Tensor:
        """[N], at least 0, and 0 where the predictor has had no spread."""
        spread = self.squares > SETTLED
        return torch.where(spread, self.products / self.squares.where(spread, 1.0), 0.0).clamp(min=0)

    def state_dict(self) -> dict[str, Any]:
        """As plain lists."""
        return {"products": self.products.tolist(), "squares": self.squares.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.products, self.squares = (
            torch.tensor(state[name], dtype=torch.float64) for name in ("products", "squares")
        )


class StepAdvantages:
    """Statistics of each step's predictions over earlier epochs, and the advantages computed with them.

    All ranks hold the same state, computed from the gathered rewards of all ranks.

    Args:
        settings: the configuration's section ``advantage``.
        steps: N of the sampler.

    Attributes:
        spreads: running mean of the standard deviation of each reward that is normalised; empty before the first epoch.
        predictions: regression of final rewards on those of predictions, both in units.
        branches: regression, in audits, of the change of the final reward on the change of the next prediction's.
        seen: steps whose prediction was scored in some epoch with rewards that were not all equal.
        risen: what has been added to ``gain_lambda`` (``advantage.gain_lambda_rise``).
        gains: float64 [2, N, N], sums over images and epochs, earlier ones counting less: products of the gains of two
            steps, and images that have both.
    """

    def __init__(self, settings: AdvantageConfig, steps: int) -> None:
        self.settings, self.steps = settings, steps
        self.spreads: list[float] = []
        self.predictions, self.branches = Regression(steps), Regression(steps)
        self.seen: set[int] = set()
        self.risen = 0.0
        self.gains = torch.zeros(2, steps, steps, dtype=torch.float64)

    @property
    def gain_lambda(self) -> float:
        """The discount in use, at most 1; 1 for the baseline."""
        return 1.0 if self.settings.steps == "baseline" else min(1.0, self.settings.gain_lambda + self.risen)

    def learn_spreads(self, spreads: Sequence[float]) -> None:
        """Update the running spreads with an epoch's mean standard deviations, after their use; zeros are ignored."""
        before = self.spreads if len(self.spreads) == len(spreads) else [0.0] * len(spreads)
        self.spreads = [
            KEPT * old + (1 - KEPT) * new if old and new else old or new
            for old, new in zip(before, spreads, strict=True)
        ]

    def compute(
        self, final: Tensor, predicted: Tensor, segments: Segments, equal: Tensor, order: Tensor | None = None
    ) -> tuple[Tensor, dict[str, float]]:
        """Advantages of an epoch by the regression of earlier epochs, to which this epoch's pairs are then added.

        Until every step scored here has entered the regression in an earlier epoch, all steps get the final advantage.

        Args:
            final: [B], final rewards in units.
            predicted: [B, S], rewards of the predictions in the same units; NaN where not scored.
            segments: the segments that they start.
            equal: bool [B], images whose group has equal final rewards: their advantages are exactly 0.
            order: int64 [B], the image whose predictions are used for each image's credit; None: its own. Regression
                and metrics always use each image's own.

        Returns:
            float64 [B, N], clipped, NaN where a required prediction was not scored, and metrics of the steps.
        """
        settings, scored = self.settings, list(segments.scored)
        known = settings.calibrated is False or self.seen.issuperset(_steps_in(predicted, scored))
        slopes = self.predictions.slopes[scored]
        weights = slopes if settings.calibrated is True else torch.ones_like(slopes)
        multipliers = None
        if settings.calibrated == "branches":
            audited = self.branches.squares[scored] > SETTLED
            multipliers = torch.where(audited, self.branches.slopes[scored], 1.0)
            multipliers[-1] = 1.0  # the next reward is the final one, even if another window's audit has a slope here
        if known:
            seen = predicted if order is None else predicted[order]
            credit = segment_credit(final, seen, weights, self.gain_lambda, multipliers)
        else:
            credit = final[:, None].expand(-1, len(scored))
        credit = credit.masked_fill(equal[:, None], 0.0)
        if settings.control == "rescaled":
            credit = _in_size_of(final.masked_fill(equal, 0.0), credit)
        metrics = self._metrics(final, predicted, credit, scored, slopes, equal)
        pairs = predicted.masked_fill(equal[:, None], torch.nan)
        self.predictions.add(scored, final[:, None].expand_as(pairs), pairs)
        self.seen |= _steps_in(pairs, scored)
        gains = torch.cat([pairs, final[:, None]], dim=1).diff(dim=1)
        there, place = gains.isfinite().double(), torch.tensor(scored)
        gains = gains.nan_to_num()
        new = torch.stack([gains.T @ gains, there.T @ there])
        self.gains[:, place[:, None], place] = KEPT * self.gains[:, place[:, None], place] + new
        advantages = torch.zeros(len(final), self.steps, dtype=torch.float64)
        for step, segment in enumerate(segments.of_step):
            if segment >= 0:
                advantages[:, step] = credit[:, segment]
        return advantages.clamp(-settings.clip, settings.clip), metrics

    def gain_correlations(self) -> dict[str, Any]:
        """Correlation of every two steps' gains over recent epochs, as JSON: S steps and [S, S], None where two are not
        known together or one has no spread.
        """
        products, counts = self.gains
        steps = counts.diagonal().nonzero().flatten()
        mean = (products / counts)[steps[:, None], steps]
        scale = mean.diagonal().where(mean.diagonal() > SETTLED, torch.nan).sqrt()
        rows = (mean / scale / scale[:, None]).tolist()
        return {
            "steps": steps.tolist(),
            "correlations": [[round(value, 4) if value == value else None for value in row] for row in rows],
        }

    def _metrics(
        self,
        final: Tensor,
        predicted: Tensor,
        credit: Tensor,
        scored: list[int],
        slopes: Tensor,
        equal: Tensor,
    ) -> dict[str, float]:
        """Metrics per scored step, over groups whose rewards differ; absent for steps without data."""
        rows = ~equal
        final, predicted, credit = final[rows], predicted[rows], credit[rows]
        gains = torch.cat([predicted, final[:, None]], dim=1).diff(dim=1)
        metrics = {"stepwise/gain_lambda": self.gain_lambda} if self.settings.gain_lambda_rise else {}
        for position, step in enumerate(scored):
            values = {
                "correlation": _correlation(final, predicted[:, position]),
                "gain": _root_mean_square(gains[:, position]),
                "left": _root_mean_square(credit[:, position]) / (_root_mean_square(final) or math.nan),
                "beta": float(slopes[position]),
            }
            if position + 1 < len(scored):
                values["gain_correlation"] = _correlation(gains[:, position], gains[:, position + 1])
            metrics |= {f"stepwise/{name}_step_{step}": value for name, value in values.items() if value == value}
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The state as plain lists and numbers."""
        return {
            "spreads": list(self.spreads),
            "predictions": self.predictions.state_dict(),
            "branches": self.branches.state_dict(),
            "seen": sorted(self.seen),
            "risen": self.risen,
            "gains": self.gains.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state; one with another number of steps is ignored."""
        if len(state["predictions"]["products"]) != self.steps:
            return
        self.spreads, self.seen, self.risen = list(state["spreads"]), set(state["seen"]), state.get("risen", 0.0)
        self.predictions.load_state_dict(state["predictions"])
        self.branches.load_state_dict(state["branches"])
        if "gains" in state:
            self.gains = torch.tensor(state["gains"], dtype=torch.float64)


def _steps_in(rewards: Tensor, scored: Sequence[int]) -> set[int]:
    """The steps with a reward in [B, S]."""
    return {step for step, some in zip(scored, rewards.isfinite().any(dim=0).tolist(), strict=True) if some}


def _in_size_of(final: Tensor, credit: Tensor) -> Tensor:
    """``final`` [B] times a factor for each column of ``credit`` [B, S], so that their root mean squares are equal."""
    known = credit.isfinite()
    finals = final[:, None].where(known, 0.0)
    squares = finals.square().sum(dim=0)
    factors = (credit.where(known, 0.0).square().sum(dim=0) / squares.where(squares > 0, 1.0)).sqrt()
    return (finals * factors).where(known, torch.nan)


def _root_mean_square(values: Tensor) -> float:
    return float(values[values.isfinite()].square().mean().sqrt())


def _correlation(one: Tensor, other: Tensor) -> float:
    """Of centred values; NaN where one of them has no spread, or there are none."""
    known = one.isfinite() & other.isfinite()
    one, other = one[known], other[known]
    if not float(one.square().sum()) > SETTLED or not float(other.square().sum()) > SETTLED:
        return float("nan")
    return float((one * other).sum() / (one.square().sum() * other.square().sum()).sqrt())
