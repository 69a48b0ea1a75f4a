"""Images for a person to look at: the ``sample`` command."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcpo_fast.config.loading import load_config
from pcpo_fast.config.presets import DEFAULT_CONFIG
from pcpo_fast.config.schema import Config, RewardConfig
from pcpo_fast.errors import UserError
from pcpo_fast.guidance.guided_runs import guided_policies, read_runs
from pcpo_fast.guidance.scale_sweep import ScaleResult, sweep_numbers, sweep_scales, write_sweep
from pcpo_fast.method.samplers import build_transitions, deterministic_transitions
from pcpo_fast.method.step_tables import StepTable
from pcpo_fast.policies import Policy
from pcpo_fast.policies.families import load_policy
from pcpo_fast.policies.fine_tunes import FineTune
from pcpo_fast.prompts import load_prompts, prompt_of
from pcpo_fast.reporting.grids import image_grid, to_image
from pcpo_fast.reporting.step_progress import StepProgress
from pcpo_fast.rewards import RewardSet
from pcpo_fast.rollout.generation import generate


def make_samples(arguments: argparse.Namespace) -> dict[str, Any]:
    """Sample, score and write a grid image, or a sweep over the scales of reward guidance.

    Args:
        arguments: of the ``sample`` command (:mod:`pcpo_fast.commands.sample`).

    Returns:
        ``{"output", "runs", "prompts", "seed", "images", "guidance_scale_reward", "rewards": {name: {"mean",
        "scores"}}}`` with a scale for each run; of a sweep ``{"output", "runs", "prompts", "seed", "plot", "sweep"}``
        with an entry for each scale: ``{"guidance_scale_reward", "images", "diversity", "rewards": {name: {"mean",
        "low", "high", "std", "scores"}}}``.

    Raises:
        UserError: a mistake in the arguments, the configuration, the run or the prompts.
    """
    settings = _checked(arguments)
    config, runs = _model_of(arguments)
    if arguments.prompts:
        prompts = load_prompts(arguments.prompts)
    else:
        prompts = [prompt_of({"prompt": text}, "--prompt") for text in arguments.prompt]
    rewards = RewardSet([RewardConfig(name=name) for name in arguments.reward])
    rewards.check_prompts(prompts, f"--prompts {arguments.prompts}" if arguments.prompts else "--prompt")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    texts = [prompt.text for prompt in prompts]
    policies: Sequence[Policy]
    if runs:
        policies = guided_policies(runs, settings, device, texts)
    else:
        policies = [load_policy(config, device, texts)]
    build = build_transitions if arguments.stochastic else deterministic_transitions
    table = StepTable.of(build(config.sampler, policies[0].schedule(config.sampler.steps)), device)
    repeated = [prompt for prompt in prompts for _ in range(arguments.count)]
    captions = [prompt.text for prompt in repeated]
    batches = -(-len(repeated) // arguments.batch_size)
    columns = []
    with StepProgress(len(policies) * batches * table.steps, "sampling") as progress:
        for place, policy in enumerate(policies):
            if arguments.sweep is not None:
                progress.describe(f"sampling at scale {settings[place][0]:g}")
            images = generate(
                policy, texts, arguments.count, table, arguments.seed, arguments.batch_size, progress.advance
            )
            scores = {}
            if arguments.reward:
                scores = rewards.score(images, captions, [prompt.metadata for prompt in repeated]).components
            columns.append(ScaleResult(settings[place][0] if runs else 0.0, images.cpu(), scores))
    common = {"output": arguments.output, "runs": arguments.runs, "prompts": texts, "seed": arguments.seed}
    try:
        if arguments.sweep is not None:
            return common | _sweep(columns, captions, arguments)
        scales = list(settings[0]) if runs else []
        return common | {"guidance_scale_reward": scales} | _grid(columns[0], captions, arguments)
    except OSError as error:
        raise UserError(f"{error.filename or arguments.output} cannot be written: {error.strerror or error}") from None


def _checked(arguments: argparse.Namespace) -> list[tuple[float, ...]]:
    """The scales of each run, for one or more settings; refuses what is wrong in itself before anything is loaded."""
    for name in ("count", "batch_size"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, got {getattr(arguments, name)}")
    if not 0 <= arguments.seed < 2**63:
        raise UserError(f"--seed: must lie in 0..2^63 - 1, got {arguments.seed}")
    if Path(arguments.output).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--output: {arguments.output} must end in .png, .jpg or .webp")
    if not all(text.strip() for text in arguments.prompt or ["-"]):
        raise UserError("--prompt: must not be empty")
    runs, scales = len(arguments.runs), arguments.scales
    if not runs:
        for option, given in (("--guidance-scale-reward", scales), ("--sweep", arguments.sweep is not None)):
            if given:
                raise UserError(f"{option}: scales what a run has learned; name the run with --run RUN")
        return []
    if arguments.sweep is not None:
        return [(scale,) * runs for scale in sweep_scales(arguments.sweep)]
    wrong = next((scale for scale in scales if not math.isfinite(scale)), None)
    if wrong is not None:
        raise UserError(f"--guidance-scale-reward: must be a finite number, got {wrong}")
    if not scales and runs > 1:
        raise UserError(f"--guidance-scale-reward: {runs} runs need a scale each, or one for all of them (or --sweep)")
    if len(scales) not in (0, 1, runs):
        raise UserError(
            f"--guidance-scale-reward: {len(scales)} scales for {runs} {'run' if runs == 1 else 'runs'}; give one for "
            "each --run in its order, or one for all"
        )
    return [tuple(scales) if len(scales) == runs else tuple(scales or [1.0]) * runs]


def _model_of(arguments: argparse.Namespace) -> tuple[Config, list[FineTune]]:
    overrides = list(arguments.overrides)
    if arguments.steps is not None:
        overrides.append(f"sampler.steps={arguments.steps}")
    if arguments.runs:
        runs = read_runs(arguments.runs, overrides)
        return runs[0].config, runs
    path = arguments.config or DEFAULT_CONFIG
    if arguments.config is None and not Path(path).is_file():
        raise UserError(f"there is no {path} here; name a model with --run RUN or --config FILE")
    return load_config(path, overrides), []


def _grid(column: ScaleResult, captions: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the images of one setting, with the first reward's score of each."""
    labels = list(captions)
    if column.scores:
        name, scores = next(iter(column.scores.items()))
        labels = [f"{caption} ({name} {score:.2f})" for caption, score in zip(labels, scores.tolist(), strict=True)]
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    columns = min(arguments.count if arguments.count > 1 else 8, len(captions))
    image_grid(column.images, columns=columns, captions=labels).save(output)
    files = [] if arguments.folder is None else _single_images(column.images, captions, Path(arguments.folder))
    rewards = {
        name: {"mean": float(scores.double().mean()), "scores": scores.tolist()}
        for name, scores in column.scores.items()
    }
    return {"images": files, "rewards": rewards}


def _sweep(columns: Sequence[ScaleResult], captions: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    numbers = sweep_numbers(columns, arguments.count)
    plot = write_sweep(columns, numbers, captions, arguments.count, output)
    for entry, column in zip(numbers, columns, strict=True):
        entry["images"] = []
        if arguments.folder is not None:
            folder = Path(arguments.folder) / f"scale_{column.scale:g}"
            entry["images"] = _single_images(column.images, captions, folder)
    return {"plot": None if plot is None else str(plot), "sweep": numbers}


def _single_images(images: Tensor, captions: Sequence[str], folder: Path) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    files = [str(folder / f"{index:05d}.png") for index in range(len(images))]
    for file, image in zip(files, images, strict=True):
        to_image(image).save(file)
    (folder / "prompts.json").write_text(json.dumps(captions, ensure_ascii=False), encoding="utf-8")
    return files
