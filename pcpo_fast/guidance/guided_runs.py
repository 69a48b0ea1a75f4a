"""Trained runs as policies to sample from: one run, or several composed by implicit reward guidance."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from pcpo_fast.config.loading import load_config
from pcpo_fast.config.roles import roles
from pcpo_fast.config.schema import Config, ModelConfig
from pcpo_fast.config.shipped import find
from pcpo_fast.config.wording import counted
from pcpo_fast.errors import UserError
from pcpo_fast.guidance.reward_guidance import RewardGuided
from pcpo_fast.policies.fine_tunes import FineTune, load_fine_tunes
from pcpo_fast.runs.input_record import read_differently
from pcpo_fast.runs.run_directory import CONFIG_FILE

SHARED = tuple(key for key, role in roles(ModelConfig) if role is not None and role.base_model)
"""Model settings that composed runs must share: everything that the base model's output depends on."""


def read_runs(folders: Sequence[str | Path], overrides: Sequence[str] = ()) -> list[FineTune]:
    """Configurations and weight folders of run directories; does not read weights.

    Args:
        folders: run directories. The sampler of the first one is used.
        overrides: ``key=value`` settings that take precedence over each run's own.

    Raises:
        UserError: a folder is not a run or has no export, or the runs have different base models.
    """
    runs = [read_fine_tune(Path(folder), overrides) for folder in folders]
    for run, folder in zip(runs[1:], folders[1:], strict=True):
        different = base_difference(runs[0].config, run.config)
        if different is not None:
            key, first, other = different
            raise UserError(
                f"--run: composed runs must share one base model, but model.{key} is {first!r} in {folders[0]} and "
                f"{other!r} in {folder} (model.{key}=... on the command line sets it for all)"
            )
        changed = read_differently([Path(folders[0]), Path(folder)])
        base = next((text for text in changed if text.startswith("model.path ")), None)
        if base is not None and not any(text.startswith("model.path=") for text in overrides):
            raise UserError(
                f"--run: composed runs must share one base model, but the content of {base} changed between "
                f"{folders[0]} and {folder} (model.path=... on the command line sets it for both)"
            )
    return runs


def base_difference(first: Config, second: Config) -> tuple[str, object, object] | None:
    """The first ``model`` setting in which the base models differ, with both values; None if they are the same."""
    for key in SHARED:
        one, other = (getattr(config.model, key) for config in (first, second))
        if key == "path":
            one, other = _same_folder(one), _same_folder(other)
        if one != other:
            return key, one, other
    return None


def guided_policies(
    runs: Sequence[FineTune],
    settings: Sequence[Sequence[float]],
    device: torch.device,
    prompts: Sequence[str] = (),
) -> list[RewardGuided]:
    """One policy per combination of scales; all share one base model in memory.

    Weights that no combination needs are not loaded: the base model's if every combination is one full fine-tune at
    scale 1, and those of a fine-tune whose scale is always 0.

    Args:
        runs: from :func:`read_runs`.
        settings: combinations with one scale per run; see :class:`pcpo_fast.guidance.reward_guidance.RewardGuided`.
        device: where the models are placed.
        prompts: prompts to encode before the models are loaded.

    Raises:
        UserError: a model or its weights cannot be loaded.
        ValueError: a combination does not have one finite scale per run.
    """
    for scales in settings:
        if len(scales) != len(runs) or not all(map(math.isfinite, scales)):
            raise ValueError(f"expected {counted(len(runs), 'finite scale')}, one per run, got {list(scales)}")
    wanted = [any(column) for column in zip(*settings, strict=True)]
    keep_base = any(math.fsum(scales) != 1 for scales in settings)
    policy, predictions = load_fine_tunes(runs, wanted, device, prompts, keep_base=keep_base)
    return [
        RewardGuided(
            policy,
            [(predict, scale) for predict, scale in zip(predictions, scales, strict=True) if predict is not None],
        )
        for scales in settings
    ]


def read_fine_tune(
    folder: Path, overrides: Sequence[str] = (), *, weights: Path | None = None, option: str = "--run"
) -> FineTune:
    """A run's configuration and weight folder; does not read weights.

    Args:
        folder: run directory.
        overrides: ``key=value`` settings that take precedence over the run's own.
        weights: folder of the weights; None: the run's export.
        option: prefix of error messages.

    Raises:
        UserError: the folder is not a run or has no export.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{option}: {folder} is not a run directory (no {CONFIG_FILE} in it)")
    weights = folder / "export" if weights is None else weights
    if not weights.is_dir():
        raise UserError(f"{option}: {folder} has no exported weights yet; write them with: pcpo-fast export {folder}")
    config = load_config(folder / CONFIG_FILE, overrides)
    # The run may have been moved, and its weights already include the adapter it started from (model.lora.init).
    model = config.model.model_copy(update={"lora": config.model.lora.model_copy(update={"init": None})})
    return FineTune(config.model_copy(update={"output_dir": str(folder), "model": model}), weights)


def _same_folder(path: str) -> str:
    """The resolved path of a folder, so that spellings compare equal; a hub id unchanged."""
    folder = find(path)
    return str(folder.resolve()) if folder.is_dir() else path
