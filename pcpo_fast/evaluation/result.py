"""The result of an evaluation, and its JSON record."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pcpo_fast.evaluation.candidates import Candidate
from pcpo_fast.evaluation.image_sets import ImageSet
from pcpo_fast.evaluation.matching import Matched
from pcpo_fast.evaluation.metrics import MetricColumn
from pcpo_fast.prompts import Prompt
from pcpo_fast.reporting.statistics import Estimate, mean, mean_difference


@dataclass(frozen=True)
class RewardColumn:
    """One reward of every candidate.

    Attributes:
        name: name of the reward.
        scores: by candidate, P * k scores, prompt-major.
        count: k, images per prompt.
    """

    name: str
    scores: Mapping[str, Sequence[float]]
    count: int

    @property
    def heading(self) -> str:
        """The name with an arrow towards better values."""
        return f"{self.name} ↑"

    def estimate(self, candidate: str) -> Estimate:
        """Mean over images, with an interval over prompts."""
        return mean(self._by_prompt(candidate))

    def difference(self, candidate: str, baseline: str) -> Estimate:
        """Difference of the means, paired by prompt so that differences in prompt difficulty cancel."""
        return mean_difference(self._by_prompt(candidate), self._by_prompt(baseline), paired=True)

    def _by_prompt(self, candidate: str) -> list[float]:
        scores = self.scores[candidate]
        return [sum(scores[i : i + self.count]) / self.count for i in range(0, len(scores), self.count)]


@dataclass(frozen=True)
class Evaluation:
    """Everything that tables, figures and pages show.

    Attributes:
        prompts: the P prompts.
        count: images per prompt.
        seed: seed of the noise.
        candidates: in the order of the command line; the first is the baseline.
        sets: their images, in the same order.
        reference: name of the reference of distances; None without one.
        rewards, columns: scores and metrics.
        matched: distances at equal reward.
        notes: caveats for the reader, one sentence each.
    """

    prompts: Sequence[Prompt]
    count: int
    seed: int
    candidates: Sequence[Candidate]
    sets: Sequence[ImageSet]
    reference: str | None
    rewards: Sequence[RewardColumn]
    columns: Sequence[MetricColumn]
    matched: Sequence[Matched]
    notes: Sequence[str]

    @property
    def names(self) -> list[str]:
        """Names of the candidates."""
        return [one.name for one in self.candidates]

    @property
    def baseline(self) -> str:
        """Name of the candidate from which differences are taken."""
        return self.names[0]

    def record(self) -> dict[str, Any]:
        """The content of evaluation.json; docs/evaluating.md explains the keys."""
        return {
            "prompts": [prompt.text for prompt in self.prompts],
            "images_per_prompt": self.count,
            "seed": self.seed,
            "baseline": self.baseline,
            "reference": self.reference,
            "checkpoints": [self._record_of(*pair) for pair in zip(self.candidates, self.sets, strict=True)],
            "matched_reward": [asdict(found) for found in self.matched],
            "notes": list(self.notes),
        }

    def _record_of(self, one: Candidate, images: ImageSet) -> dict[str, Any]:
        rewards = {
            column.name: {
                **_estimate(column.estimate(one.name)),
                "difference": _estimate(column.difference(one.name, self.baseline)),
                "scores": list(column.scores[one.name]),
            }
            for column in self.rewards
        }
        return {
            "name": one.name,
            "kind": one.kind,
            "path": one.path,
            "guidance_scale_reward": one.scale if one.kind == "run" else None,
            "images": len(images.files),
            "made_by": images.identity,
            "rewards": rewards,
            "metrics": {
                column.key: _estimate(column.estimates[one.name])
                | ({"difference": _estimate(column.difference(one.name, self.baseline))} if column.by_prompt else {})
                for column in self.columns
            },
        }


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {"mean": estimate.value, "low": estimate.low, "high": estimate.high}
