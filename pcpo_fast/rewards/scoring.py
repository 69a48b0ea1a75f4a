"""The rewards of a run: called one after the other and summed with their weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pcpo_fast.config.schema import RewardConfig, ScoringConfig
from pcpo_fast.config.wording import counted
from pcpo_fast.errors import UserError
from pcpo_fast.method.advantages import LARGEST_REWARD
from pcpo_fast.prompts import Prompt
from pcpo_fast.rewards.calling import call_reward, row_text
from pcpo_fast.rewards.composition import clipped
from pcpo_fast.rewards.failures import RewardFailure, scores_of_what_works
from pcpo_fast.rewards.registry import Reward, load_reward, prompt_check, scores_predictions
from pcpo_fast.rewards.sources import Sources, noted_sources
from pcpo_fast.rewards.time_limit import TimeLimit

PREDICTED_AT = "predicted_at"
"""Metadata key that marks an image as a step's prediction; the value is its time, from 1 (noise) to 0 (image)."""


@dataclass(frozen=True)
class Scores:
    """Scores of B images. All tensors are float64 [B] on the images' device.

    Attributes:
        total: the weighted sum of the rewards trained on, each clipped to its limits.
        components: raw scores of every computed reward, by name.
        failures: the reasons of NaN scores, which only occur with ``on_failure: drop_group``.
    """

    total: Tensor
    components: dict[str, Tensor]
    failures: tuple[RewardFailure, ...] = ()

    @classmethod
    def joined(cls, parts: Sequence["Scores"]) -> "Scores":
        """Concatenate the scores of one or more batches."""
        components = {name: torch.cat([part.components[name] for part in parts]) for name in parts[0].components}
        failures = tuple(failure for part in parts for failure in part.failures)
        return cls(torch.cat([part.total for part in parts]), components, failures)


class RewardSet:
    """The rewards of a run, with their weights.

    Args:
        specs: the configuration's ``rewards``.
        settings: its section ``scoring``; None: the defaults.

    Attributes:
        sources: the files that each reward was created from, by :attr:`names`.
        calls: number of images scored so far, counted once per reward.

    Raises:
        UserError: a reward cannot be found or created (see :func:`pcpo_fast.rewards.registry.load_reward`).
    """

    def __init__(self, specs: Sequence[RewardConfig], settings: ScoringConfig | None = None) -> None:
        settings = ScoringConfig() if settings is None else settings  # type: ignore[call-arg]
        self._specs = tuple(specs)
        self.calls = 0
        self._rewards: list[Reward] = []
        self.sources: dict[str, Sources] = {}
        for spec in specs:
            with noted_sources() as self.sources[spec.column]:
                self._rewards.append(load_reward(spec.name, spec.options))
        self._limits = [TimeLimit(settings.timeout) for _ in specs]
        self._stop = settings.on_failure == "stop"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all rewards, including evaluation-only ones, in the order of the configuration."""
        return tuple(spec.column for spec in self._specs)

    def check_prompts(self, prompts: Sequence[Prompt], where: str, *, evaluation: bool = True) -> None:
        """Check that the rewards can score the prompts, before images are sampled. With ``on_failure: drop_group``
        nothing is checked: failing groups are left out when they are scored.

        Args:
            prompts: the prompts.
            where: where they come from, for the error message.
            evaluation: also check with ``evaluation_only`` rewards.

        Raises:
            UserError: a reward cannot score a prompt.
        """
        for spec in self._specs if self._stop else ():
            check = prompt_check(spec.name)
            if check is None or (spec.evaluation_only and not evaluation):
                continue
            for number, prompt in enumerate(prompts, start=1):
                try:
                    check(prompt.text, prompt.metadata)
                except UserError as error:
                    raise UserError(f"{where}: prompt {number} of {len(prompts)} cannot be scored: {error}") from None

    def check_predictions(self) -> None:
        """Check, for per-step credit, that all rewards trained on accept the images that steps predict.

        Raises:
            UserError: one does not.
        """
        for spec, reward in zip(self._specs, self._rewards, strict=True):
            if spec.trained_on and not scores_predictions(reward):
                raise UserError(
                    f"advantage.steps: reward {spec.column} does not score the blurred images that steps predict "
                    "(scores_predictions is false); allowed with it: final"
                )

    @torch.no_grad()
    def score(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[dict[str, Any]] | None = None,
        *,
        evaluation: bool = True,
        predictions: bool = False,
    ) -> Scores:
        """Score images.

        Args:
            images: float32 [B, 3, H, W] in 0..1.
            prompts: B prompts.
            metadata: B dictionaries; None: empty ones.
            evaluation: also compute ``evaluation_only`` rewards, which never count in the total.
            predictions: the images are predictions of steps, for which only the rewards trained on are computed; the
                metadata mark them (:data:`PREDICTED_AT`).

        Raises:
            RewardFailure: a reward raises, takes too long, or returns anything but B finite numbers; with
                ``on_failure: drop_group`` the scores of the affected images are NaN instead.
            ValueError: the shapes of images, prompts and metadata do not match.
        """
        count = len(images)
        rows = [{} for _ in range(count)] if metadata is None else metadata
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.float32:
            raise ValueError(f"images must be float32 [B, 3, H, W], got {images.dtype} {tuple(images.shape)}")
        if not count == len(prompts) == len(rows):
            got = f"got {len(prompts)} and {len(rows)}"
            raise ValueError(f"expected a prompt and metadata for each of {counted(count, 'image')}, {got}")
        total = torch.zeros(count, dtype=torch.float64, device=images.device)
        components: dict[str, Tensor] = {}
        failures: list[RewardFailure] = []
        for index, spec in enumerate(self._specs):
            if (spec.evaluation_only and not evaluation) or (predictions and not spec.trained_on):
                continue
            scores = total.new_zeros(0)
            if count:
                self.calls += count
                scores, failed = self._call(index, images, list(prompts), list(rows))
                scores = scores.to(total)
                failures += failed
            components[spec.column] = scores
            if spec.trained_on:
                total += spec.weight * clipped(scores, spec)
        failures += self._without_too_large(total, components, list(prompts))
        return Scores(total, components, tuple(failures))

    def _without_too_large(
        self, total: Tensor, components: dict[str, Tensor], prompts: list[str]
    ) -> tuple[RewardFailure, ...]:
        """Take out weighted sums that are too large to compute with, and the scores of the rewards that make them so.

        Raises:
            RewardFailure: there is one, and a failure stops the run.
        """
        rows = (total.abs() > LARGEST_REWARD).nonzero().flatten().tolist()  # NaN, where a reward failed, is not
        if not rows:
            return ()
        specs = [spec for spec in self._specs if spec.trained_on]
        parts = torch.stack([spec.weight * clipped(components[spec.column], spec) for spec in specs])
        worst = [specs[index] for index in parts[:, rows].abs().argmax(dim=0).tolist()]
        name, weight = worst[0].column, worst[0].weight
        failure = RewardFailure(
            f"reward {name} returned {float(components[name][rows[0]]):g} for {row_text(rows[0], prompts)}, with which "
            f"its weight of {weight:g} makes a weighted sum of {float(total[rows[0]]):g}; allowed: plus or minus "
            f"{LARGEST_REWARD:g}"
        )
        if self._stop:
            raise failure
        for row, spec in zip(rows, worst, strict=True):
            total[row] = components[spec.column][row] = torch.nan
        return (failure,)

    def _call(
        self, index: int, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> tuple[Tensor, tuple[RewardFailure, ...]]:
        name, reward, limit = self._specs[index].column, self._rewards[index], self._limits[index]
        if self._stop:
            return call_reward(name, reward, images, prompts, metadata, limit=limit), ()

        def call(rows: list[int]) -> Tensor:
            whole = len(rows) == len(prompts)
            batch = images if whole else images[rows]
            texts, data = [prompts[row] for row in rows], [metadata[row] for row in rows]
            return call_reward(name, reward, batch, texts, data, limit=limit, search=False)

        return scores_of_what_works(call, prompts)
