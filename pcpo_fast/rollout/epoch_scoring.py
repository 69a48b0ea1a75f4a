"""From an epoch's images to its advantages: rewards of all ranks, failures, composition, metrics."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pcpo_fast.config.schema import Config, RewardConfig
from pcpo_fast.distributed.collectives import gather_objects, gather_rows, shared_errors
from pcpo_fast.errors import UserError
from pcpo_fast.method.advantages import RunningAdvantages
from pcpo_fast.prompts import Prompt
from pcpo_fast.rewards import RewardSet, Scores
from pcpo_fast.rewards.composition import clipped, compose_advantages, composition_metrics
from pcpo_fast.rewards.overlapping import BackgroundScoring
from pcpo_fast.rollout.epoch_plan import EpochPlan


@dataclass(frozen=True)
class ScoredEpoch:
    """What the rewards say of an epoch.

    Attributes:
        advantages: float64 [n], of this rank's images in the order of the rollout; 0 in groups that were left out.
        metrics: the same on every rank.
        equal: rewards trained on whose scores, in float32, are the same wherever they are compared.
        warning: one sentence about groups that were left out, the same on every rank; empty where there are none.
    """

    advantages: Tensor
    metrics: dict[str, float]
    warning: str
    equal: tuple[str, ...] = ()


class RolloutScoring:
    """The rewards of one epoch's rollout.

    Args:
        config: the run.
        rewards, prompts: those of the run.
        running: the buffers of running advantages.
        plan: this rank's images.
        device: where tensors are gathered.
    """

    def __init__(
        self,
        config: Config,
        rewards: RewardSet,
        prompts: Sequence[Prompt],
        running: RunningAdvantages,
        plan: EpochPlan,
        device: torch.device,
    ) -> None:
        self.config, self.rewards, self.running, self.plan, self.device = config, rewards, running, plan, device
        self.per_group = config.rollout.images_per_prompt
        self.numbers = plan.images.flatten()
        self.group_prompts = [prompts[index] for index in plan.prompts.tolist()]
        self.background = BackgroundScoring(rewards) if config.scoring.overlap else None

    def add(self, rows: Sequence[int], images: Tensor) -> None:
        """Take a finished batch of the rollout: with ``scoring.overlap`` its scoring begins."""
        if self.background is not None:
            chosen = self._prompts_of(rows)
            self.background.add(images, [p.text for p in chosen], [p.metadata for p in chosen])

    def finish(self, images: Tensor) -> ScoredEpoch:
        """Wait for the scores of all images [n, 3, H, W] of the rollout. All ranks must call it.

        Raises:
            UserError: a reward failed, on any rank; or no group is left.
        """
        with shared_errors():
            scores = self._scores(images)
        table = torch.stack([column.double().cpu() for column in (scores.total, *scores.components.values())], dim=1)
        table = torch.cat([self.numbers.double()[:, None], table], dim=1)
        everyone = gather_rows(table.to(self.device)).cpu()
        everyone = everyone[everyone[:, 0].argsort()]  # by image number: the same order for every world size
        total, components = everyone[:, 1], dict(zip(scores.components, everyone[:, 2:].T, strict=True))
        specs = [spec for spec in self.config.rewards if spec.trained_on]
        trained = torch.stack([components[spec.column] for spec in specs], dim=1)
        kept = self._kept_groups(trained)
        warning = self._warning(scores, kept)
        counts = {"dropped_groups": (~kept).sum(), "failed_images": (~trained.isfinite()).any(dim=1).sum()}
        advantages = torch.zeros_like(total)
        rows = kept.repeat_interleave(self.per_group).nonzero().flatten()
        if warning:
            total, trained = total[rows], trained[rows]
            components = {name: column[rows] for name, column in components.items()}
        advantages[rows] = self._advantages(total, trained, specs, rows)
        metrics = self._metrics(total, components) | composition_metrics(trained, specs, self.per_group)
        if self.config.scoring.on_failure == "drop_group":
            metrics |= {f"scoring/{name}": float(count) for name, count in counts.items()}
        if self.background is not None:
            metrics["time/reward_overlapped"] = self.background.seconds
        return ScoredEpoch(advantages[self.numbers], metrics, warning, tuple(self._equal(trained, specs)))

    def _scores(self, images: Tensor) -> Scores:
        if self.background is not None:
            return self.background.results()
        chosen = self._prompts_of(range(len(images)))
        texts, metadata = [p.text for p in chosen], [p.metadata for p in chosen]
        return self.rewards.score(images, texts, metadata, evaluation=False)

    def _prompts_of(self, rows: Sequence[int]) -> list[Prompt]:
        groups = (self.numbers // self.per_group).tolist()
        return [self.group_prompts[groups[row]] for row in rows]

    def _kept_groups(self, trained: Tensor) -> Tensor:
        """bool [P]: all images of the group have all the scores that the advantage is made of."""
        return trained.isfinite().all(dim=1).reshape(-1, self.per_group).all(dim=1)

    def _warning(self, scores: Scores, kept: Tensor) -> str:
        if bool(kept.all()):
            return ""
        messages = [text for texts in gather_objects([str(f) for f in scores.failures]) for text in texts]
        dropped, cause = int((~kept).sum()), messages[0]
        more = f" ({len(messages) - 1} more failures)" if len(messages) > 1 else ""
        if not bool(kept.any()):
            raise UserError(f"no image of epoch {self.plan.epoch} has a reward: {cause}{more}")
        return f"epoch {self.plan.epoch}: {dropped} of {len(kept)} groups left out: {cause}{more}"

    def _advantages(self, total: Tensor, trained: Tensor, specs: Sequence[RewardConfig], rows: Tensor) -> Tensor:
        settings = self.config.advantage
        groups = torch.arange(len(self.group_prompts)).repeat_interleave(self.per_group)[rows]
        if settings.normalization == "running":
            texts = [self.group_prompts[group].text for group in groups.tolist()]
            return self.running.compute(total, texts, settings.clip)
        return compose_advantages(total, trained, specs, groups, settings, self.config.scoring.normalize)

    def _equal(self, trained: Tensor, specs: Sequence[RewardConfig]) -> Iterator[str]:
        """Rewards without spread: within groups where these are compared, else within the epoch."""
        by_group = self.config.advantage.normalization in ("group", "flow_grpo")
        for spec, scores in zip(specs, trained.T, strict=True):
            compared = clipped(scores, spec).float().reshape(-1, self.per_group if by_group else len(scores))
            if bool((compared == compared[:, :1]).all()):
                yield spec.column

    def _metrics(self, total: Tensor, components: dict[str, Tensor]) -> dict[str, float]:
        spread = total.reshape(-1, self.per_group).std(dim=1, unbiased=False).mean()
        metrics = {"reward/mean": float(total.mean()), "reward/std": float(total.std(unbiased=False))}
        metrics["reward/group_std"] = float(spread)
        return metrics | {f"reward/{name}": _mean(column) for name, column in components.items()}


def _mean(scores: Tensor) -> float:
    """Mean of the scores that there are: a reward of weight 0 may lack some of a group that is kept."""
    finite = scores.isfinite()
    return float(scores.mean() if finite.all() else scores[finite].mean())
