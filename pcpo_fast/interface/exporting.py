"""``export``: a run's weights for other programs."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pcpo_fast.interface.configuration import check_choice


@dataclass(frozen=True)
class Exported:
    """Exported weights.

    Attributes:
        folder: folder that contains them.
        kind: "pipeline", "LoRA", "transformer" or "unet".
        epoch: epoch of the checkpoint.
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
        output: folder; None: ``export`` in the run directory, or ``pipeline`` for a whole pipeline.
        epoch: epoch of the checkpoint; None: the newest.
        pipeline: write a whole pipeline folder that includes the trained weights.
        format: naming scheme of the LoRA layers; None: the one that diffusers and ComfyUI both read.
        dtype: dtype of the weights; None: bfloat16 for LoRA with ``output``, otherwise the run's own.

    Raises:
        UserError: the run or checkpoint does not exist, its weights are damaged, or the folder is not empty or not
            writable.
    """
    from pcpo_fast.runs.exporting import export_run

    check_choice(("diffusers", "comfyui", "kohya"), format=format)
    check_choice(("bfloat16", "float16", "float32"), dtype=dtype)
    target = None if output is None else os.fspath(output)
    written = export_run(os.fspath(run), target, epoch, pipeline, format, dtype)
    return Exported(Path(written["output"]), written["kind"], written["epoch"])
