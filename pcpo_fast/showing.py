"""Images for a person to look at: the ``sample`` command."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcpo_fast.config import Config, RewardConfig
from pcpo_fast.config_loading import load_config
from pcpo_fast.errors import UserError
from pcpo_fast.policies.loading import load_policy, load_trained_weights
from pcpo_fast.presets import DEFAULT_CONFIG
from pcpo_fast.prompts import Prompt, load_prompts
from pcpo_fast.reporting.grids import image_grid, to_image
from pcpo_fast.rewards import RewardSet
from pcpo_fast.run_directory import CONFIG_FILE
from pcpo_fast.samplers import build_transitions, deterministic_transitions
from pcpo_fast.sampling import generate
from pcpo_fast.step_tables import StepTable


def make_samples(arguments: argparse.Namespace) -> dict[str, Any]:
    """Sample, score and write a grid image.

    Args:
        arguments: of the ``sample`` command (:mod:`pcpo_fast.commands.sample`).

    Returns:
        ``{"output", "prompts", "seed", "images", "rewards": {name: {"mean", "scores"}}}``.

    Raises:
        UserError: a mistake in the arguments, the configuration, the run or the prompts.
    """
    for name in ("count", "batch_size"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, got {getattr(arguments, name)}")
    if not 0 <= arguments.seed < 2**63:
        raise UserError(f"--seed: must lie in 0..2^63 - 1, got {arguments.seed}")
    if Path(arguments.output).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--output: {arguments.output} must end in .png, .jpg or .webp")
    if not all(text.strip() for text in arguments.prompt or ["-"]):
        raise UserError("--prompt: must not be empty")
    config, weights = _model_of(arguments)
    prompts = load_prompts(arguments.prompts) if arguments.prompts else [Prompt(text) for text in arguments.prompt]
    rewards = RewardSet([RewardConfig(name=name) for name in arguments.reward])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = load_policy(config, device, [prompt.text for prompt in prompts])
    if weights is not None:
        load_trained_weights(policy.module, config, weights)
    build = build_transitions if arguments.stochastic else deterministic_transitions
    table = StepTable.of(build(config.sampler, policy.schedule(config.sampler.steps)), device)
    texts = [prompt.text for prompt in prompts]
    images = generate(policy, texts, arguments.count, table, arguments.seed, arguments.batch_size)
    repeated = [prompt for prompt in prompts for _ in range(arguments.count)]
    captions = [prompt.text for prompt in repeated]
    components = rewards.score(images, captions, [p.metadata for p in repeated]).components if arguments.reward else {}
    files = _write(images.cpu(), captions, components, arguments)
    return {
        "output": arguments.output,
        "prompts": texts,
        "seed": arguments.seed,
        "images": files,
        "rewards": {
            name: {"mean": float(scores.double().mean()), "scores": scores.tolist()}
            for name, scores in components.items()
        },
    }


def _model_of(arguments: argparse.Namespace) -> tuple[Config, Path | None]:
    overrides = list(arguments.overrides)
    if arguments.steps is not None:
        overrides.append(f"sampler.steps={arguments.steps}")
    if arguments.run_directory is None:
        path = arguments.config or DEFAULT_CONFIG
        if arguments.config is None and not Path(path).is_file():
            raise UserError(f"there is no {path} here; name a model with --run RUN or --config FILE")
        return load_config(path, overrides), None
    run = Path(arguments.run_directory)
    if not (run / CONFIG_FILE).is_file():
        raise UserError(f"--run: {run} is not a run directory (no {CONFIG_FILE} in it)")
    weights = run / "export"
    if not weights.is_dir():
        raise UserError(f"--run: {run} holds no exported weights yet; write them with: pcpo-fast export {run}")
    config = load_config(run / CONFIG_FILE, overrides)
    # The run may have been moved, and weights that it started from are in its own by now.
    lora = config.model.lora.model_copy(update={"init": None})
    model = config.model.model_copy(update={"lora": lora})
    return config.model_copy(update={"output_dir": str(run), "model": model}), weights


def _write(
    images: Tensor, captions: Sequence[str], components: dict[str, Tensor], arguments: argparse.Namespace
) -> list[str]:
    labels = list(captions)
    if components:
        name, scores = next(iter(components.items()))
        labels = [f"{caption} ({name} {score:.2f})" for caption, score in zip(labels, scores.tolist(), strict=True)]
    output = Path(arguments.output)
    files = []
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        image_grid(
            images, columns=min(arguments.count if arguments.count > 1 else 8, len(images)), captions=labels
        ).save(output)
        if arguments.folder is not None:
            folder = Path(arguments.folder)
            folder.mkdir(parents=True, exist_ok=True)
            for index, image in enumerate(images):
                files.append(str(folder / f"{index:05d}.png"))
                to_image(image).save(files[-1])
            (folder / "prompts.json").write_text(json.dumps(captions, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error.filename or output} cannot be written: {error.strerror or error}") from None
    return files
