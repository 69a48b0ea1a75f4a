"""Exporting a checkpoint's weights in formats that other programs load."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcpo_fast.config.loading import load_config
from pcpo_fast.config.wording import counted
from pcpo_fast.errors import UserError
from pcpo_fast.runs.checkpoint import STATE_FILE, WEIGHTS, checkpoints, read_state
from pcpo_fast.runs.manifest import changed_file
from pcpo_fast.runs.provenance import copy_provenance
from pcpo_fast.runs.run_directory import CONFIG_FILE

if TYPE_CHECKING:
    from pcpo_fast.policies.lora_files import Format


def export_run(
    run: str,
    output: str | None,
    epoch: int | None,
    pipeline: bool,
    names: "Format | None" = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Write a checkpoint's weights to ``output``.

    Args:
        run: run directory or checkpoint folder.
        output: target folder; None: ``export`` in the run directory, or ``pipeline`` for a whole pipeline, where an
            earlier export is replaced.
        epoch: epoch of the checkpoint; None: the newest.
        pipeline: write a whole pipeline folder that includes the weights (LoRA is merged).
        names: naming scheme of the LoRA layers; see :func:`pcpo_fast.policies.lora_files.write_lora`.
        dtype: PyTorch's name of the dtype; None: bfloat16 for LoRA in ``output``, otherwise the run's own dtype.

    Returns:
        ``{"output", "kind", "epoch", "run"}``: kind is "pipeline", "LoRA", "transformer" or "unet", and run is the run
        directory.

    Raises:
        UserError: the run or checkpoint does not exist, its weights are damaged, ``names`` is given for weights that
            are not a LoRA, or the output folder is not empty or not writable.
    """
    import torch

    from pcpo_fast.policies.saving import save_lora, save_network, save_pipeline

    checkpoint = find_checkpoint(Path(run), epoch)
    problem = changed_file(checkpoint, WEIGHTS)
    if problem is not None:
        raise UserError(f"checkpoint {checkpoint} is damaged: {problem}; choose another one with --epoch")
    folder = Path(run) if (Path(run) / "checkpoints").is_dir() else checkpoint.absolute().parent.parent
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{checkpoint} is not in a run directory: there is no {folder / CONFIG_FILE}")
    config = load_config(folder / CONFIG_FILE)
    if names is not None and (pipeline or config.model.finetune != "lora"):
        what = "a whole pipeline" if pipeline else "a full fine-tune"
        raise UserError(f"--format {names}: only applies to LoRA files, but this is {what}")
    default = folder / ("pipeline" if pipeline else "export")
    target = default if output is None else Path(output)
    if target != default and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--output: {target} is not an empty folder; choose another one or remove it")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        weights, given = checkpoint / WEIGHTS, None if dtype is None else getattr(torch, dtype)
        if pipeline:
            save_pipeline(config.model, weights, temporary, given)
        elif config.model.finetune == "lora":
            save_lora(config, weights, temporary, names, given or (None if output is None else torch.bfloat16))
        else:
            save_network(weights, temporary, given)
        copy_provenance(folder, temporary)
        for file in temporary.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)  # libraries write files that only the owner can read
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    except OSError as error:
        raise UserError(f"--output: {target} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    part = next((path.name for path in weights.iterdir() if path.is_dir()), "LoRA")
    return {
        "output": str(target),
        "kind": "pipeline" if pipeline else part,
        "epoch": int(read_state(checkpoint)["epoch"]),
        "run": folder,
    }


def find_checkpoint(path: Path, epoch: int | None) -> Path:
    """A run's checkpoint after ``epoch`` epochs, or the newest.

    Raises:
        UserError: there is none.
    """
    if (path / STATE_FILE).is_file():
        if epoch is not None:
            raise UserError(f"--epoch: {path} is a single checkpoint; give its run directory to choose an epoch")
        return path
    if not path.is_dir():
        raise UserError(f"{path} is not a run directory: the folder does not exist")
    found = checkpoints(path / "checkpoints")
    if not found:
        raise UserError(f"{path} has no complete checkpoint (checkpoints/epoch_...)")
    if epoch is None:
        return found[-1]
    by_epoch = {int(read_state(checkpoint)["epoch"]): checkpoint for checkpoint in found}
    if epoch not in by_epoch:
        raise UserError(
            f"--epoch: {path} has no checkpoint after {counted(epoch, 'epoch')}; it has {', '.join(map(str, by_epoch))}"
        )
    return by_epoch[epoch]
