"""Trained weights out of a run's checkpoint, in the format that diffusers loads."""

import shutil
from pathlib import Path
from typing import Any

from pcpo_fast.checkpoint import STATE_FILE, WEIGHTS, checkpoints, read_state
from pcpo_fast.config import Config
from pcpo_fast.config_loading import load_config
from pcpo_fast.errors import UserError
from pcpo_fast.run_directory import CONFIG_FILE


def export_run(run: str, output: str | None, epoch: int | None, pipeline: bool) -> dict[str, Any]:
    """Copy a checkpoint's weights to ``output``.

    Args:
        run: run directory or checkpoint folder.
        output: target folder, ``RUN/export`` if None.
        epoch: which checkpoint, the newest if None.
        pipeline: write a whole pipeline folder with the weights in place (LoRA is merged).

    Returns:
        ``{"output", "kind", "epoch"}``.

    Raises:
        UserError: no such run or checkpoint, or the output folder holds something else.
    """
    checkpoint = find_checkpoint(Path(run), epoch)
    folder = checkpoint.parent.parent
    target = Path(output) if output is not None else folder / "export"
    config = load_config(folder / CONFIG_FILE)
    if target.exists() and any(target.iterdir()) and output is not None:
        raise UserError(f"--output: {target} is not empty; choose another folder or remove it")
    if pipeline:
        _export_pipeline(config, checkpoint / WEIGHTS, target)
    else:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(checkpoint / WEIGHTS, target)
    kind = "pipeline" if pipeline else "LoRA" if config.model.finetune == "lora" else "transformer"
    return {"output": str(target), "kind": kind, "epoch": int(read_state(checkpoint)["epoch"])}


def find_checkpoint(path: Path, epoch: int | None) -> Path:
    """A run's checkpoint: the one after ``epoch`` epochs, or the newest.

    Raises:
        UserError: there is none; says which there are.
    """
    if (path / STATE_FILE).is_file():
        return path
    found = checkpoints(path / "checkpoints")
    if not found:
        raise UserError(f"{path} is not a run with a complete checkpoint")
    if epoch is None:
        return found[-1]
    by_epoch = {int(read_state(checkpoint)["epoch"]): checkpoint for checkpoint in found}
    if epoch not in by_epoch:
        raise UserError(
            f"--epoch: {path} has no checkpoint after {epoch} epochs; it has {', '.join(map(str, by_epoch))}"
        )
    return by_epoch[epoch]


def _export_pipeline(config: Config, weights: Path, target: Path) -> None:
    from pcpo_fast.policies.exporting import save_pipeline

    save_pipeline(config.model, weights, target)
