"""Candidates: more images of each prompt than are trained, sampled by a cheaper policy and scored.

The best and the worst of them are sampled again, from the same noise, by the policy itself, and only these are trained
(Sol-RL, 2026, arXiv:2604.06916). Noise has a name, so the two passes differ by the policy's precision alone.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pcpo_fast.config.schema import Config
from pcpo_fast.distributed.collectives import gather_rows, rank, shared_errors, world_size
from pcpo_fast.method.step_tables import StepTable
from pcpo_fast.policies import Conditioning, Policy, select_rows
from pcpo_fast.profiling import profiler_ranges
from pcpo_fast.prompts import Prompt
from pcpo_fast.rewards import RewardSet, Scores
from pcpo_fast.rewards.composition import compose_advantages
from pcpo_fast.rewards.failures import RewardFailure
from pcpo_fast.rewards.overlapping import BatchScoring
from pcpo_fast.rollout.rollout import first_rows, initial_latents, noise_keys, sampler_steps


@dataclass(frozen=True)
class Candidates:
    """An epoch's scored candidates, the same on every rank.

    Attributes:
        scores: float64 [P, M, 1 + R], weighted sum and rewards trained on, of images by the cheaper policy; NaN where a
            reward failed.
        chosen: int64 [P, n], the candidates of each prompt that are trained, ascending.
        failures: of rewards, on this rank.
    """

    scores: Tensor
    chosen: Tensor
    failures: tuple[RewardFailure, ...] = ()

    def with_exact(self, exact: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """All candidates of some prompts, those that were sampled again with their new scores.

        Args:
            exact: float64 [G n, 1 + R], scores of the images sampled again, prompt-major.
            groups: int64 [G], the prompts.

        Returns:
            float64 [G M, 1 + R], prompt-major, and int64 [G n], the places of the chosen ones there.
        """
        chosen, count = self.chosen[groups], self.scores.shape[1]
        places = (chosen + count * torch.arange(len(groups))[:, None]).flatten()
        scores = self.scores[groups].flatten(0, 1)
        scores[places] = exact
        return scores, places

    def metrics(self, exact: Tensor) -> dict[str, float]:
        """What the choice did, over the prompts whose rewards are all known.

        Args:
            exact: float64 [P n], weighted sum of the images sampled again, prompt-major; NaN where a reward failed.
        """
        cheap, again = self.scores[..., 0], exact.reshape(self.chosen.shape)
        known = cheap.isfinite().all(dim=1) & again.isfinite().all(dim=1)
        cheap, again, chosen = cheap[known], again[known], self.chosen[known]
        if not len(cheap):
            return {}
        ranks = [_centered_ranks(column) for column in (cheap.gather(1, chosen), again)]
        lengths = ranks[0].square().sum().sqrt() * ranks[1].square().sum().sqrt()
        spread = cheap.std(dim=1, correction=0).mean()
        found = {
            "reward_mean": float(cheap.mean()),
            "group_std": float(spread),
            "agreement": float((ranks[0] * ranks[1]).sum() / lengths),
            "spread_ratio": float(again.std(dim=1, correction=0).mean() / spread),
        }
        return {f"candidates/{name}": value for name, value in found.items() if value == value}


def choose(totals: Tensor, count: int) -> Tensor:
    """The best and the worst of each prompt's candidates, half of each; one more of the best if ``count`` is odd.

    Args:
        totals: [P, M]; where equal, the first ones count as lower.
        count: at most M.

    Returns:
        int64 [P, count], ascending.
    """
    order = totals.argsort(dim=1, stable=True)
    worst, best = count // 2, count - count // 2
    return torch.cat([order[:, :worst], order[:, order.shape[1] - best :]], dim=1).sort(dim=1).values


def sample_candidates(
    policy: Policy,
    encode: Callable[[list[int]], Conditioning],
    config: Config,
    table: StepTable,
    prompts: Tensor,
    texts: Sequence[Prompt],
    epoch: int,
    rewards: RewardSet,
) -> Candidates:
    """Sample and score an epoch's candidates, and choose. Collective; every rank samples its share.

    Args:
        policy: samples as it would in a rollout; made cheaper by the caller.
        encode: conditioning of prompts, by their index in the prompt list.
        config: the run.
        table: the epoch's sampler.
        prompts: int64 [P], of :class:`pcpo_fast.rollout.epoch_plan.EpochPlan`.
        texts: the prompt list.
        epoch: counted from 0.
        rewards: those of the run.

    Raises:
        UserError: a reward failed on any rank.
    """
    settings, device = config.rollout, policy.device
    assert settings.candidates is not None
    total = len(prompts) * settings.candidates
    share = -(-total // world_size())
    # The last rank repeats the last image if the images do not divide evenly: a gather needs equal shares.
    numbers = torch.arange(rank() * share, (rank() + 1) * share).clamp_max(total - 1)
    groups, members = numbers // settings.candidates, numbers % settings.candidates
    initial_keys, seeds = noise_keys(settings, config.seed, epoch, groups, members, device)
    conditioning = {name: value.to(device) for name, value in encode(prompts.tolist()).items()}
    size = settings.images_at_once
    batches = [
        (slice(begin, begin + size), first_rows(part, device) if settings.share_first_steps else None)
        for begin, part in zip(range(0, share, size), groups.split(size), strict=True)
    ]
    where = groups.to(device)
    jobs = BatchScoring(rewards, config.scoring.overlap)
    for rows, alike in profiler_ranges.each("batch", batches):
        given = select_rows(conditioning, where[rows])
        initial = initial_latents(policy, initial_keys[rows])
        ((_, latents),) = deque(sampler_steps(policy, given, initial, seeds[rows], table, alike), maxlen=1)
        with profiler_ranges.named("decode"):
            images = policy.decode(latents)
        wanted = [texts[index] for index in prompts[groups[rows]].tolist()]
        jobs.add(images, [prompt.text for prompt in wanted], [dict(prompt.metadata) for prompt in wanted])
    with shared_errors():
        scores = Scores.joined(jobs.results())
    columns = [scores.total, *(scores.components[spec.column] for spec in config.rewards if spec.trained_on)]
    everyone = gather_rows(torch.stack([column.double().cpu() for column in columns], dim=1).to(device)).cpu()
    found = everyone[:total].reshape(len(prompts), settings.candidates, -1)
    return Candidates(found, choose(ranked_by(found, config), settings.images_per_prompt), scores.failures)


def ranked_by(scores: Tensor, config: Config) -> Tensor:
    """What candidates are ranked by, float64 [P, M]: advantages among all candidates, before clipping.

    Args:
        scores: float64 [P, M, 1 + R], weighted sum and rewards trained on; where one of a prompt failed, its candidates
            are equal, since the epoch leaves the prompt out.
        config: the run.
    """
    prompts, count, _ = scores.shape
    known = scores.isfinite().flatten(1).all(dim=1)
    ranks = torch.zeros(prompts, count, dtype=torch.float64)
    if not bool(known.any()):
        return ranks
    rows, groups = scores[known].flatten(0, 1), torch.arange(prompts)[known].repeat_interleave(count)
    specs = [spec for spec in config.rewards if spec.trained_on]
    settings = config.advantage.model_copy(update={"clip": None})  # clipped ones could not be told apart
    composed = compose_advantages(rows[:, 0], rows[:, 1:], specs, groups, settings, config.scoring.normalize)
    ranks[known] = composed.reshape(-1, count)
    return ranks


def _centered_ranks(values: Tensor) -> Tensor:
    """Ranks within each row, minus their mean; equal values share the mean of their ranks."""
    # (number below - number above) / 2
    return (values[:, :, None] - values[:, None, :]).sign().sum(dim=2) / 2
