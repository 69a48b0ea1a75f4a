"""The rewards of a run: called one after the other, and summed with their weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pcpo_fast.config.schema import RewardConfig, ScoringConfig
from pcpo_fast.errors import UserError
from pcpo_fast.prompts import Prompt
from pcpo_fast.rewards.calling import call_reward
from pcpo_fast.rewards.composition import clipped
from pcpo_fast.rewards.failures import RewardFailure, scores_of_what_works
from pcpo_fast.rewards.registry import Reward, load_reward, prompt_check
from pcpo_fast.rewards.sources import Sources, noted_sources
from pcpo_fast.rewards.time_limit import TimeLimit

PREDICTED_AT = "predicted_at"
"""Key of the metadata by which a reward knows that an image is a step's prediction: its time, 1 noise to 0 image."""


@dataclass(frozen=True)
class Scores:
    """What the rewards say of B images. All tensors are float32 [B] on the images' device.

    Attributes:
        total: the weighted sum of the rewards trained on, each clipped to its limits.
        components: every reward that was computed, by name, without weight and limits.
        failures: what went wrong where a score is NaN, which only a set that drops groups has.
    """

    total: Tensor
    components: dict[str, Tensor]
    failures: tuple[RewardFailure, ...] = ()

    @classmethod
    def joined(cls, parts: Sequence["Scores"]) -> "Scores":
        """The scores of several batches as those of one; at least one part."""
        components = {name: torch.cat([part.components[name] for part in parts]) for name in parts[0].components}
        failures = tuple(failure for part in parts for failure in part.failures)
        return cls(torch.cat([part.total for part in parts]), components, failures)


class RewardSet:
    """The rewards of a run, with their weights.

    Args:
        specs: the configuration's ``rewards``.
        settings: its section ``scoring``; None: the defaults.

    Attributes:
        sources: the files that each was made from, by :attr:`names`.
        calls: images that were scored so far, counted once for each reward.

    Raises:
        UserError: a reward cannot be found or made (see :func:`pcpo_fast.rewards.registry.load_reward`).
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
        """Names of all rewards, evaluation-only ones too, in the order of the config."""
        return tuple(spec.column for spec in self._specs)

    def check_prompts(self, prompts: Sequence[Prompt], where: str, *, evaluation: bool = True) -> None:
        """Refuse prompts that a reward cannot judge, before any image is made of them. With ``on_failure: drop_group``
        they are not refused: their groups are left out when they are scored.

        Args:
            prompts: all that may be drawn.
            where: they come from, for the message.
            evaluation: also ask the rewards that are ``evaluation_only``.

        Raises:
            UserError: there is one.
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
        """Refuse per-step credit where a reward trained on declines to score what a step predicts.

        Raises:
            UserError: there is one.
        """
        for spec, reward in zip(self._specs, self._rewards, strict=True):
            if spec.trained_on and not getattr(getattr(reward, "func", reward), "scores_predictions", True):
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
            prompts: B texts.
            metadata: B dictionaries, or None for empty ones.
            evaluation: also compute the rewards that are ``evaluation_only``; they never count in the total.
            predictions: the images are what steps predict, and only the rewards trained on are computed. The metadata
                says so (:data:`PREDICTED_AT`).

        Raises:
            RewardFailure: a reward raises, takes too long, or returns anything but B finite numbers; with
                ``on_failure: drop_group`` the scores of the images it concerns are NaN instead.
            UserError: a reward changes the images.
            ValueError: images, prompts and metadata do not fit together.
        """
        count = len(images)
        rows = [{} for _ in range(count)] if metadata is None else metadata
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.float32:
            raise ValueError(f"images must be float32 [B, 3, H, W], got {images.dtype} {tuple(images.shape)}")
        if not count == len(prompts) == len(rows):
            raise ValueError(f"{count} images need as many prompts and metadata, got {len(prompts)} and {len(rows)}")
        total = torch.zeros(count, device=images.device)
        components: dict[str, Tensor] = {}
        failures: list[RewardFailure] = []
        for index, spec in enumerate(self._specs):
            if (spec.evaluation_only and not evaluation) or (predictions and not spec.trained_on):
                continue
            scores = total.new_zeros(0)
            if count:
                self.calls += count
                scores, failed = self._call(index, images.detach(), list(prompts), [dict(row) for row in rows])
                scores = scores.to(images.device)
                failures += failed
            components[spec.column] = scores
            if spec.trained_on:
                total += spec.weight * clipped(scores, spec)
        return Scores(total, components, tuple(failures))

    def _call(
        self, index: int, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> tuple[Tensor, tuple[RewardFailure, ...]]:
        name, reward, limit = self._specs[index].column, self._rewards[index], self._limits[index]
        if self._stop:
            return call_reward(name, reward, images, prompts, metadata, limit=limit), ()

        def call(rows: list[int]) -> Tensor:
            whole = len(rows) == len(prompts)
            batch = images if whole else images[rows]
            texts, data = [prompts[row] for row in rows], [dict(metadata[row]) for row in rows]
            return call_reward(name, reward, batch, texts, data, limit=limit, search=False)

        return scores_of_what_works(call, prompts)
