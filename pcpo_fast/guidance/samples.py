"""Sample images from a pipeline, from trained runs, or over a sweep of reward guidance scales."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torch import Tensor

from pcpo_fast.config.schema import Config, RewardConfig
from pcpo_fast.config.wording import counted
from pcpo_fast.distributed.collectives import lone_device
from pcpo_fast.errors import UserError
from pcpo_fast.guidance.guided_runs import guided_policies
from pcpo_fast.guidance.scale_sweep import ScaleResult, sweep_numbers, sweep_picture, sweep_scales, write_reward_plot
from pcpo_fast.policies import Policy
from pcpo_fast.policies.families import load_policy
from pcpo_fast.policies.fine_tunes import FineTune
from pcpo_fast.reporting.grids import image_grid, to_image
from pcpo_fast.reporting.progress import StepProgress
from pcpo_fast.reporting.tables import fixed_text
from pcpo_fast.rewards import RewardSet
from pcpo_fast.rollout.generation import ImageRequest, generate


@dataclass(frozen=True)
class SampleRequest(ImageRequest):
    """Images to sample and score.

    Attributes:
        rewards: rewards that score the images.
        place: where the prompts come from, for error messages.
    """

    rewards: Sequence[RewardConfig]
    place: str


@dataclass(frozen=True)
class Samples:
    """The images, with their prompts and scores.

    Attributes:
        request: the request.
        scales: for each column, the scale of every run; empty without runs.
        columns: one column, or one per scale of a sweep.
        sweep: whether this is a sweep.
        written: what :func:`write_samples` returned; None if nothing has been written.
    """

    request: SampleRequest
    scales: Sequence[tuple[float, ...]]
    columns: Sequence[ScaleResult]
    sweep: bool
    written: Mapping[str, Any] | None = None

    @property
    def captions(self) -> list[str]:
        """The prompt of each image of a column, P * count entries, prompt-major."""
        return self.request.captions

    @property
    def images(self) -> list[Image]:
        """All images in the order of :attr:`captions`; for a sweep one scale after the other."""
        return [to_image(image) for column in self.columns for image in column.images]

    @property
    def scores(self) -> dict[str, list[float]]:
        """The scores of :attr:`images` by reward name."""
        names = self.columns[0].scores
        return {name: [score for one in self.columns for score in one.scores[name].tolist()] for name in names}

    @property
    def picture(self) -> Image:
        """A grid of the images, with prompts and the first reward's scores."""
        count, captions = self.request.count, self.captions
        if self.sweep:
            return sweep_picture(self.columns, captions, count)
        column = self.columns[0]
        labels = captions
        if column.scores:
            name, scores = next(iter(column.scores.items()))
            labels = [
                f"{caption} ({name} {fixed_text(score, 2)})"
                for caption, score in zip(labels, scores.tolist(), strict=True)
            ]
        return image_grid(column.images, columns=min(count if count > 1 else 8, len(captions)), captions=labels)


def scale_settings(runs: int, scales: Sequence[float], sweep: str | None) -> list[tuple[float, ...]]:
    """The combinations of scales to sample with, each with one scale per run.

    Args:
        runs: number of composed runs; 0: the base model alone, which has no scale.
        scales: one per run, or one for all; empty means 1 for a single run.
        sweep: use each of these scales for all runs; see :func:`pcpo_fast.guidance.scale_sweep.sweep_scales`.

    Raises:
        UserError: the arguments contradict each other.
    """
    if not runs:
        for option, given in (("--guidance-scale-reward", scales), ("--sweep", sweep is not None)):
            if given:
                raise UserError(f"{option}: needs a trained run to scale; give one with --run RUN")
        return []
    if sweep is not None:
        return [(scale,) * runs for scale in sweep_scales(sweep)]
    wrong = next((scale for scale in scales if not math.isfinite(scale)), None)
    if wrong is not None:
        raise UserError(f"--guidance-scale-reward: must be a finite number, got {wrong}")
    if not scales and runs > 1:
        raise UserError(
            f"--guidance-scale-reward: {counted(runs, 'run')} need one scale each, or one for all (or --sweep)"
        )
    if len(scales) not in (0, 1, runs):
        raise UserError(
            f"--guidance-scale-reward: {counted(len(scales), 'scale')} for {counted(runs, 'run')}; give one per "
            "--run, in the same order, or one for all"
        )
    return [tuple(scales) if len(scales) == runs else tuple(scales or [1.0]) * runs]


def make_samples(
    config: Config, runs: Sequence[FineTune], settings: Sequence[tuple[float, ...]], request: SampleRequest, sweep: bool
) -> Samples:
    """Sample and score the images.

    Args:
        config: model and sampler; with ``runs``, the first run's.
        runs: the runs whose weights are used; empty: the base model.
        settings: from :func:`scale_settings`; each gives a column.
        request: which images.
        sweep: whether the settings form a sweep.

    Raises:
        UserError: a model, a reward or a prompt is unusable.
    """
    rewards = RewardSet(request.rewards)
    rewards.check_prompts(request.prompts, request.place)
    device = lone_device()
    texts = [prompt.text for prompt in request.prompts]
    policies: Sequence[Policy]
    if runs:
        policies = guided_policies(runs, settings, device, texts)
    else:
        policies = [load_policy(config, device, texts)]
    table, captions = request.table(config.sampler, policies[0]), request.captions
    metadata = [prompt.metadata for prompt in request.repeated]
    batches = -(-len(captions) // request.batch_size)
    columns = []
    with StepProgress(len(policies) * batches * table.steps, "sampling") as progress:
        for place, policy in enumerate(policies):
            if sweep:
                progress.describe(f"sampling at scale {settings[place][0]:g}")
            images = generate(policy, texts, request.count, table, request.seed, request.batch_size, progress.advance)
            scores = rewards.score(images, captions, metadata).components if request.rewards else {}
            columns.append(ScaleResult(settings[place][0] if runs else 0.0, images.cpu(), scores))
    return Samples(request, settings if runs else (), columns, sweep)


def write_samples(samples: Samples, output: Path, folder: Path | None) -> dict[str, Any]:
    """Write the grid to ``output``, single images to ``folder``, and the plot of a sweep with rewards.

    Returns:
        ``{"guidance_scale_reward", "images", "rewards": {name: {"mean", "scores"}}}`` with one scale per run; for a
        sweep ``{"plot", "sweep"}`` with one entry per scale: ``{"guidance_scale_reward", "images", "diversity",
        "rewards": {name: {"mean", "low", "high", "std", "scores"}}}``.

    Raises:
        UserError: a file cannot be written.
    """
    captions, columns = samples.captions, samples.columns
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        samples.picture.save(output)
        if not samples.sweep:
            rewards = {
                name: {"mean": float(scores.double().mean()), "scores": scores.tolist()}
                for name, scores in columns[0].scores.items()
            }
            scales = list(samples.scales[0]) if samples.scales else []
            files = [] if folder is None else _single_images(columns[0].images, captions, folder)
            return {"guidance_scale_reward": scales, "images": files, "rewards": rewards}
        numbers = sweep_numbers(columns, samples.request.count)
        plot = write_reward_plot(columns, numbers, len(captions), output)
        for entry, column in zip(numbers, columns, strict=True):
            entry["images"] = []
            if folder is not None:
                entry["images"] = _single_images(column.images, captions, folder / f"scale_{column.scale:g}")
        return {"plot": None if plot is None else str(plot), "sweep": numbers}
    except OSError as error:
        raise UserError(f"{error.filename or output} cannot be written: {error.strerror or error}") from None


def _single_images(images: Tensor, captions: Sequence[str], folder: Path) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    files = [str(folder / f"{index:05d}.png") for index in range(len(images))]
    for file, image in zip(files, images, strict=True):
        to_image(image).save(file)
    (folder / "prompts.json").write_text(json.dumps(captions, ensure_ascii=False), encoding="utf-8")
    return files
