"""A run's weights for other programs, as one call."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pcpo_fast.interface.configuration import check_choice


@dataclass(frozen=True)
class Exported:
    """What has been written.

    Attributes:
        folder: where.
        kind: "pipeline", "LoRA", "transformer" or "unet".
        epoch: of the checkpoint.
    """

    folder: Path
    kind: str
    epoch: int


def export(
    run: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    epoch: int | None = None,
    pipeline: bool = False,
    format: Literal["diffusers", "comfyui", "kohya"] | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
) -> Exported:
    """Write the weights of a run's checkpoint in a format that other programs load (docs/lora.md).

    Args:
        run: run directory, or one of its checkpoints.
        output: folder; None: ``export`` in the run directory, and ``pipeline`` for a whole pipeline.
        epoch: checkpoint after so many epochs, the newest if None.
        pipeline: write a whole pipeline folder with the trained weights in it.
        format: names of a LoRA's layers; None: those that diffusers and ComfyUI both read.
        dtype: of the weights; None: bfloat16 for LoRA with ``output``, else the run's own.

    Raises:
        UserError: no such run or checkpoint, its weights are damaged, or the folder cannot take them.
    """
    from pcpo_fast.runs.exporting import export_run

    check_choice(("diffusers", "comfyui", "kohya"), format=format)
    check_choice(("bfloat16", "float16", "float32"), dtype=dtype)
    target = None if output is None else os.fspath(output)
    written = export_run(os.fspath(run), target, epoch, pipeline, format, dtype)
    return Exported(Path(written["output"]), written["kind"], written["epoch"])
