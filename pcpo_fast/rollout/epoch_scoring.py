"""From an epoch's images to its advantages: rewards of all ranks, failures, composition, metrics."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pcpo_fast.config.schema import Config, RewardConfig
from pcpo_fast.config.wording import counted
from pcpo_fast.distributed.collectives import gather_objects, gather_rows, shared_errors
from pcpo_fast.errors import UserError
from pcpo_fast.method.advantages import RunningAdvantages, centered
from pcpo_fast.method.noise_keys import Purpose, random_key
from pcpo_fast.method.step_advantages import Segments, StepAdvantages
from pcpo_fast.method.step_tables import EpochTables
from pcpo_fast.prompts import Prompt
from pcpo_fast.rewards import RewardSet, Scores
from pcpo_fast.rewards.composition import RewardUnits, clipped, compose_advantages, composition_metrics
from pcpo_fast.rewards.failures import RewardFailure
from pcpo_fast.rewards.overlapping import BatchScoring
from pcpo_fast.rewards.scoring import PREDICTED_AT
from pcpo_fast.rollout.branches import Branches
from pcpo_fast.rollout.candidates import Candidates
from pcpo_fast.rollout.epoch_plan import EpochPlan, chosen_steps
from pcpo_fast.rollout.rollout import PredictedImages

STRIPS = 4
"""Images whose predictions are shown."""


@dataclass(frozen=True)
class ScoredEpoch:
    """Advantages and reward metrics of an epoch.

    Attributes:
        advantages: float64 [n], of this rank's images in the order of the rollout, or [n, N] of their steps; 0 in
            groups that were dropped.
        metrics: the same on every rank.
        equal: trained rewards whose scores have no spread, but for rounding, wherever they are compared.
        warning: message about dropped groups, the same on every rank; empty if there are none.
        leads: by step, how much higher the reward of predictions is than that of their final images: mean and its
            standard error over prompts, where two or more prompts are scored.
    """

    advantages: Tensor
    metrics: dict[str, float]
    warning: str
    equal: tuple[str, ...] = ()
    leads: dict[str, tuple[float, float]] = field(default_factory=dict)


class RolloutScoring:
    """The rewards of one epoch's rollout.

    Args:
        config: the run.
        rewards, prompts: those of the run.
        running: the buffers of running advantages.
        stepwise: per-step statistics of earlier epochs.
        tables: the epoch's sampler and trained steps.
        plan: this rank's images.
        device: where tensors are gathered.

    Attributes:
        candidates: those of which the rollout's images were chosen, set before :meth:`finish`; None without.
        predicted: the predictions that the rollout must decode; None if every step has the image's advantage.
    """

    def __init__(
        self,
        config: Config,
        rewards: RewardSet,
        prompts: Sequence[Prompt],
        running: RunningAdvantages,
        stepwise: StepAdvantages,
        tables: EpochTables,
        plan: EpochPlan,
        device: torch.device,
    ) -> None:
        self.config, self.rewards, self.running, self.plan, self.device = config, rewards, running, plan, device
        self.stepwise = stepwise
        self.per_group = config.rollout.images_per_prompt
        self.numbers = plan.images.flatten()
        self.group_prompts = [prompts[index] for index in plan.prompts.tolist()]
        self.overlap = config.scoring.overlap
        self.jobs = BatchScoring(rewards, self.overlap)
        # Of each job: which prediction, and of which images; None for final images, and an audit's branches.
        self.batches: list[tuple[int | Branches | None, list[int]]] = []
        self.branches: tuple[Branches, Scores] | None = None
        self.candidates: Candidates | None = None
        self.predicted: PredictedImages | None = None
        self.prediction_seconds = 0.0
        self.strips: dict[int, dict[int, Tensor]] | None = None  # of the first images, by prediction and position
        if config.advantage.steps != "final":
            everyone = torch.arange(config.images_per_epoch)
            steps = chosen_steps(config, tables.steps, plan.epoch, everyone)
            self.trained = torch.zeros(len(everyone), tables.sampler.steps, dtype=torch.bool).scatter(1, steps, True)
            self.segments = Segments.of(tables.sampler.noisy, config.advantage.scored_steps)
            by_group = self.trained.reshape(-1, self.per_group, self.trained.shape[1]).any(dim=1)
            if not config.advantage.within_prompts:  # an image is compared with those of all prompts
                by_group = by_group.any(dim=0).expand_as(by_group)
            needed = self.segments.needed(by_group, stepwise.gain_lambda)
            self.times = [float(tables.sampler.times[step]) for step in self.segments.scored]
            self.predicted = PredictedImages(self.segments.scored, needed, self._add_predictions)

    def add(self, rows: Sequence[int], images: Tensor) -> None:
        """Accept a finished batch of the rollout; with ``scoring.overlap`` its scoring starts now."""
        if self.overlap:
            self.batches.append((None, list(rows)))
            self.jobs.add(images, *self._prompts_of(rows))

    def keep_strips(self) -> None:
        """Keep the steps' predictions of the first images for :meth:`strips_of`; call before the rollout."""
        self.strips = {} if self.predicted is not None else None

    def strips_of(self, images: Tensor) -> tuple[Tensor, list[str]] | None:
        """One row for each of the first images: its predictions, then itself [n, S + 1, 3, H, W], and captions.

        Steps whose predictions were not scored for all of them are omitted; None if no step is left.
        """
        if self.predicted is None or self.strips is None:
            return None
        last = images[:STRIPS].cpu()
        whole = {position: rows for position, rows in sorted(self.strips.items()) if len(rows) == len(last)}
        if not whole:
            return None
        columns = [*(torch.stack([rows[row] for row in range(len(last))]) for rows in whole.values()), last]
        return torch.stack(columns, dim=1), [*(f"step {self.predicted.steps[position]}" for position in whole), "image"]

    def _add_predictions(self, position: int, rows: list[int], images: Tensor) -> None:
        if self.strips is not None:
            first = {row: images[index].cpu() for index, row in enumerate(rows) if row < STRIPS}
            self.strips.setdefault(position, {}).update(first)
        self.batches.append((position, rows))
        texts, metadata = self._prompts_of(rows, self.times[position])
        before = self.jobs.seconds
        self.jobs.add(images, texts, metadata, predictions=True)
        if not self.overlap:
            self.prediction_seconds += self.jobs.seconds - before

    def add_branches(self, branches: Branches) -> None:
        """Score an audit's branches; :meth:`finish` compares their rewards."""
        texts, metadata = self._prompts_of(branches.rows * 2)
        metadata += self._prompts_of(branches.rows * 2, branches.time)[1]
        images = torch.cat([branches.images, branches.predictions])
        self.batches.append((branches, branches.rows))
        self.jobs.add(images, texts * 2, metadata, predictions=True)  # after the batches before: no reward runs twice

    def finish(self, images: Tensor) -> ScoredEpoch:
        """Wait for the scores of the rollout's images [n, 3, H, W]. Collective.

        Raises:
            UserError: a reward failed on any rank, or no group is left.
        """
        specs = [spec for spec in self.config.rewards if spec.trained_on]
        with shared_errors():
            scores, predictions = self._scores(images, specs)
        table = torch.stack([column.double().cpu() for column in (scores.total, *scores.components.values())], dim=1)
        count = 1 + table.shape[1]
        table = torch.cat([self.numbers.double()[:, None], table, predictions.flatten(1)], dim=1)
        everyone = gather_rows(table.to(self.device)).cpu()
        everyone = everyone[everyone[:, 0].argsort()]  # by image number: the same order for every world size
        total, components = everyone[:, 1], dict(zip(scores.components, everyone[:, 2:count].T, strict=True))
        predictions = everyone[:, count:].reshape(len(everyone), *predictions.shape[1:])
        trained = torch.stack([components[spec.column] for spec in specs], dim=1)
        kept = self._kept_groups(trained, predictions)
        warning = self._warning(scores, kept)
        chosen = {} if self.candidates is None else self.candidates.metrics(total)
        counts = {"dropped_groups": (~kept).sum(), "failed_images": (~trained.isfinite()).any(dim=1).sum()}
        rows = kept.repeat_interleave(self.per_group).nonzero().flatten()
        if warning:
            total, trained, predictions = total[rows], trained[rows], predictions[rows]
            components = {name: column[rows] for name, column in components.items()}
        computed, steps = self._advantages(total, trained, predictions, specs, rows)
        advantages = torch.zeros(len(everyone), *computed.shape[1:], dtype=torch.float64)
        advantages[rows] = computed
        metrics = self._metrics(total, components) | composition_metrics(trained, specs, self.per_group)
        metrics |= steps | chosen
        if self.config.scoring.on_failure == "drop_group":
            metrics |= {f"scoring/{name}": float(count) for name, count in counts.items()}
        if self.overlap:
            metrics["time/reward_overlapped"] = self.jobs.seconds
        elif self.predicted is not None:
            metrics["time/predictions"] = self.prediction_seconds
        equal, leads = tuple(self._equal(trained, specs)), self._leads(total, predictions)
        return ScoredEpoch(advantages[self.numbers], metrics, warning, equal, leads)

    def _scores(self, images: Tensor, specs: Sequence[RewardConfig]) -> tuple[Scores, Tensor]:
        """Scores of the images, and float64 [n, S, 1 + R] total and scores of predictions, NaN where not scored."""
        done = self.jobs.results()
        final: list[Scores] = []
        if not self.overlap:
            final = [self.rewards.score(images, *self._prompts_of(range(len(images))), evaluation=False)]
        scored = 0 if self.predicted is None else len(self.predicted.steps)
        predictions = torch.full((len(images), scored, 1 + len(specs)), torch.nan, dtype=torch.float64)
        failures: list[RewardFailure] = []
        for (position, rows), scores in zip(self.batches, done, strict=True):
            if position is None:
                final.append(scores)
            elif isinstance(position, Branches):
                self.branches = position, scores
            else:
                columns = (scores.total, *(scores.components[spec.column] for spec in specs))
                predictions[rows, position] = torch.stack([column.double().cpu() for column in columns], dim=1)
                failures += scores.failures
        if self.candidates is not None:
            failures += self.candidates.failures
        joined = Scores.joined(final)
        return replace(joined, failures=(*joined.failures, *failures)), predictions

    def _prompts_of(
        self, rows: Sequence[int], predicted_at: float | None = None
    ) -> tuple[list[str], list[dict[str, Any]]]:
        """Texts and metadata of some images, or of one step's predictions of them."""
        groups = (self.numbers // self.per_group).tolist()
        prompts = [self.group_prompts[groups[row]] for row in rows]
        mark = {} if predicted_at is None else {PREDICTED_AT: predicted_at}
        return [prompt.text for prompt in prompts], [{**prompt.metadata, **mark} for prompt in prompts]

    def _kept_groups(self, trained: Tensor, predictions: Tensor) -> Tensor:
        """bool [P]: whether all images of the group, and its candidates, have all scores that enter the advantage."""
        kept = trained.isfinite().all(dim=1).reshape(-1, self.per_group).all(dim=1)
        if self.candidates is not None:
            kept &= self.candidates.scores.isfinite().flatten(1).all(dim=1)
        if self.predicted is not None:
            known = predictions.isfinite().all(dim=2).reshape(-1, self.per_group, predictions.shape[1]).all(dim=1)
            kept &= (known | ~self.predicted.needed).all(dim=1)
        return kept

    def _leads(self, total: Tensor, predictions: Tensor) -> dict[str, tuple[float, float]]:
        """Of the kept images' weighted sums [B] and of their predictions' scores [B, S, 1 + R]."""
        if self.predicted is None:
            return {}
        by_prompt = (predictions[..., 0] - total[:, None]).reshape(-1, self.per_group, predictions.shape[1]).mean(dim=1)
        found = {}
        for step, column in zip(self.predicted.steps, by_prompt.T, strict=True):
            known = column[column.isfinite()]
            if len(known) > 1:
                found[f"step_{step}"] = float(known.mean()), float(known.std()) / len(known) ** 0.5
        return found

    def _warning(self, scores: Scores, kept: Tensor) -> str:
        if bool(kept.all()):
            return ""
        messages = [text for texts in gather_objects([str(f) for f in scores.failures]) for text in texts]
        dropped, cause = int((~kept).sum()), messages[0]
        more = f" ({counted(len(messages) - 1, 'more failure')})" if len(messages) > 1 else ""
        if not bool(kept.any()):
            raise UserError(f"no image in epoch {self.plan.epoch} has a reward: {cause}{more}")
        return f"epoch {self.plan.epoch}: {dropped} of {counted(len(kept), 'group')} dropped: {cause}{more}"

    def _advantages(
        self, total: Tensor, trained: Tensor, predictions: Tensor, specs: Sequence[RewardConfig], rows: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """Advantages of the kept images [B], or of their steps [B, N], and metrics of the steps."""
        settings, normalize = self.config.advantage, self.config.scoring.normalize
        groups = torch.arange(len(self.group_prompts)).repeat_interleave(self.per_group)[rows]
        own = torch.arange(len(rows))  # the images' places among those that they are compared with
        if self.candidates is not None:
            kept = groups.unique()
            scores, own = self.candidates.with_exact(torch.cat([total[:, None], trained], dim=1), kept)
            total, trained = scores[:, 0], scores[:, 1:]
            groups = kept.repeat_interleave(self.candidates.scores.shape[1])
        if settings.normalization == "running":
            texts = [self.group_prompts[group].text for group in groups.tolist()]
            return self.running.compute(total, texts, settings.clip), {}
        if settings.steps == "final" and settings.scale == "own":
            return compose_advantages(total, trained, specs, groups, settings, normalize)[own], {}
        units = RewardUnits(total, trained, specs, groups, settings, normalize, self.stepwise.spreads)
        metrics = self._audited(units, specs)
        self.stepwise.learn_spreads(units.spreads)
        if self.predicted is None:
            return units.final[own].clamp(-settings.clip, settings.clip), {}
        predicted = torch.full(predictions.shape[:2], torch.nan, dtype=torch.float64)
        for position, step in enumerate(self.predicted.steps):
            known = predictions[:, position, 0].isfinite().nonzero().flatten()
            if len(known):
                scores = predictions[known, position]
                predicted[known, position] = units.of(scores[:, 0], scores[:, 1:], own[known])
                metrics[f"stepwise/predicted_reward_step_{step}"] = float(scores[:, 0].mean())
        order = self._permutation(len(rows)) if settings.control == "permuted" else None
        advantages, steps = self.stepwise.compute(units.final[own], predicted, self.segments, units.equal[own], order)
        unknown = advantages.isnan()
        assert not bool((unknown & self.trained[rows]).any()), "a trained step's advantage needs an unscored prediction"
        return advantages.masked_fill(unknown, 0.0), metrics | steps

    def _permutation(self, count: int) -> Tensor:
        """int64 [count], a permutation of images within groups, fixed by seed and epoch, the same on all ranks."""
        generator = torch.Generator().manual_seed(random_key(Purpose.CONTROL, self.config.seed, self.plan.epoch))
        drawn = torch.rand(count // self.per_group, self.per_group, generator=generator).argsort(dim=1)
        return (drawn + self.per_group * torch.arange(len(drawn))[:, None]).flatten()

    def _audited(self, units: RewardUnits, specs: Sequence[RewardConfig]) -> dict[str, float]:
        """Add an audit's branches to the statistics, and return its metrics."""
        if self.branches is None:
            return {}
        branches, scores = self.branches
        columns = [scores.total, *(clipped(scores.components[spec.column], spec) for spec in specs)]
        table = torch.stack([column.double().cpu() for column in columns], dim=1)
        # Final images of +z and of -z, then their predictions: half of each pair's difference.
        final, predicted = (plus_minus.unflatten(0, (2, -1)) for plus_minus in table.tensor_split(2))
        halves = torch.stack([(pair[0] - pair[1]) / 2 for pair in (final, predicted)], dim=1)
        halves = gather_rows(halves.to(self.device)).cpu()
        changes = units.changes(halves[:, :, 0].flatten(), halves[:, :, 1:].flatten(0, 1)).reshape(-1, 2)
        self.stepwise.branches.add([branches.step], changes[:, :1], changes[:, 1:])
        effect = changes[:, 0][changes[:, 0].isfinite()].square().mean().sqrt()
        slope = self.stepwise.branches.slopes[branches.step]
        metrics = {
            f"stepwise/branch_effect_step_{branches.step}": float(effect),
            f"stepwise/branch_slope_step_{branches.step}": float(slope),
        }
        if self.config.scoring.on_failure == "drop_group":
            metrics["scoring/failed_audits"] = float((~changes.isfinite()).any(dim=1).sum())
        return metrics

    def _equal(self, trained: Tensor, specs: Sequence[RewardConfig]) -> Iterator[str]:
        """Columns of rewards without spread, within groups if advantages compare within groups, else in the epoch."""
        for spec, scores in zip(specs, trained.T, strict=True):
            per_group = self.per_group if self.config.advantage.within_prompts else len(scores)
            if not bool(centered(clipped(scores, spec), torch.arange(len(scores)) // per_group).any()):
                yield spec.column

    def _metrics(self, total: Tensor, components: dict[str, Tensor]) -> dict[str, float]:
        spread = total.reshape(-1, self.per_group).std(dim=1, unbiased=False).mean()
        metrics = {"reward/mean": float(total.mean()), "reward/std": float(total.std(unbiased=False))}
        metrics["reward/group_std"] = float(spread)
        return metrics | {f"reward/{name}": _mean(column) for name, column in components.items()}


def _mean(scores: Tensor) -> float:
    """Mean of the finite scores: a reward of weight 0 may lack scores in a kept group."""
    finite = scores.isfinite()
    return float(scores.mean() if finite.all() else scores[finite].mean())
