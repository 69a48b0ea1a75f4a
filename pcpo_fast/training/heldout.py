"""Held-out evaluation: the same captions and seeds before, during and after training."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from pcpo_fast.config.schema import Config, EvaluationConfig
from pcpo_fast.distributed.collectives import gather_rows, rank, shared_errors, world_size
from pcpo_fast.files.image_files import read_image
from pcpo_fast.method.diversity import mean_pixel_diversity
from pcpo_fast.method.step_tables import RunTables, StepTable
from pcpo_fast.policies import Policy
from pcpo_fast.prompts import Prompt
from pcpo_fast.reporting.grids import SHOWN, image_grid, to_image
from pcpo_fast.rewards import RewardSet, Scores
from pcpo_fast.rollout.generation import generate, path_kl
from pcpo_fast.training.collapse import base_distance
from pcpo_fast.training.run_inputs import RunInputs


def _present(scores: Tensor) -> Tensor:
    """The finite scores as float64; a failed reward may have left some out (``scoring.on_failure``)."""
    return scores.double()[scores.isfinite()]


@dataclass
class HeldOut:
    """Evaluates a policy on held-out prompts.

    Attributes:
        prompts: the held-out prompts; empty without a held-out file.
        folder: where the shown images from before training are kept for resumed runs.
        stochastic: the rollout's sampler, where the KL from the base model is measured (``evaluation.kl``).
        last: the shown images of the latest evaluation, [SHOWN, 3, H, W] on the CPU.
    """

    policy: Policy
    prompts: Sequence[Prompt]
    rewards: RewardSet
    table: StepTable
    settings: EvaluationConfig
    folder: Path
    stochastic: StepTable | None = None
    last: Tensor | None = field(default=None, init=False)

    @classmethod
    def of(cls, config: Config, policy: Policy, tables: RunTables, inputs: RunInputs) -> "HeldOut":
        """Set up evaluation on the rollout's time grid, without noise unless configured otherwise."""
        sampler = tables.deterministic if config.evaluation.deterministic else tables.transitions
        table = StepTable.of(sampler, policy.device)
        folder = Path(config.output_dir) / "images" / "before"
        stochastic = StepTable.of(tables.transitions, policy.device) if config.evaluation.kl else None
        return cls(policy, inputs.heldout, inputs.rewards, table, config.evaluation, folder, stochastic)

    @property
    def texts(self) -> list[str]:
        """The prompt strings."""
        return [prompt.text for prompt in self.prompts]

    @property
    def captions(self) -> list[str]:
        """Captions of the shown images: the first image of each prompt, then the second of each, ..."""
        return [self.texts[index // self.settings.images_per_prompt] for index in self._shown()]

    def evaluate(self) -> tuple[dict[str, float], Image.Image]:
        """Sample and score images; returns the metrics and the grid of shown images. All ranks must call it."""
        count = self.settings.images_per_prompt
        images = generate(self.policy, self.texts, count, self.table, self.settings.seed, self.settings.batch_size)
        repeated = [prompt for prompt in self.prompts for _ in range(count)]
        scores = self._score(images, repeated)
        total = _present(scores.total)
        metrics = {"heldout/reward/mean": float(total.mean()), "heldout/reward/std": float(total.std(unbiased=False))}
        metrics |= {f"heldout/reward/{name}": float(_present(c).mean()) for name, c in scores.components.items()}
        if len(total) < len(scores.total):
            metrics["heldout/failed_images"] = float(len(scores.total) - len(total))
        if count > 1:
            metrics["heldout/diversity"] = mean_pixel_diversity(images, count)
        if self.stochastic is not None:
            settings = self.settings
            metrics["heldout/kl"] = path_kl(
                self.policy, self.texts, count, self.stochastic, settings.seed, settings.batch_size
            )
        self.last = images[torch.tensor(self._shown(), device=images.device)].cpu()
        return metrics, image_grid(self.last, columns=min(6, len(self.last)), captions=self.captions)

    def _score(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """The scores of all images; every rank scores its share."""
        share = -(-len(images) // world_size())
        # The last rank repeats the last image if the images do not divide evenly, because a gather needs equal shares.
        mine = [min(rank() * share + index, len(images) - 1) for index in range(share)]
        chosen = [prompts[index] for index in mine]
        with shared_errors():
            scores = self.rewards.score(images[mine], [p.text for p in chosen], [p.metadata for p in chosen])
        columns = gather_rows(torch.stack([scores.total, *scores.components.values()], dim=1))[: len(images)]
        return Scores(columns[:, 0], dict(zip(scores.components, columns[:, 1:].unbind(dim=1), strict=True)))

    def keep_as_first(self) -> None:
        """Save the latest shown images as those from before training."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        for index, image in enumerate([] if self.last is None else self.last):
            to_image(image).save(self.folder / f"{index:03d}.png")

    def moved(self) -> dict[str, float]:
        """The distance of the latest shown images from those before training, as a metric; empty without either."""
        first = self.first()
        if first is None or self.last is None or first.shape != self.last.shape:
            return {}
        return {"heldout/base_distance": base_distance(first, self.last)}

    def first(self) -> Tensor | None:
        """The shown images from before training [n, 3, H, W]; None if there are none."""
        files = sorted(self.folder.glob("*.png"))
        return torch.stack([read_image(file) for file in files]) if files else None

    def _shown(self) -> list[int]:
        count, total = self.settings.images_per_prompt, len(self.prompts) * self.settings.images_per_prompt
        by_prompt = [prompt * count + image for image in range(count) for prompt in range(len(self.prompts))]
        return by_prompt[: min(SHOWN, total)]
