"""``export``: a run's weights for other programs."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pcpo_fast.config.arguments import check_choice
from pcpo_fast.config.wording import counted
from pcpo_fast.errors import UserError


@dataclass(frozen=True)
class Exported:
    """Exported weights.

    Attributes:
        folder: folder that contains them.
        kind: "pipeline", "LoRA", "transformer" or "unet".
        epoch: epoch of the checkpoint.
        address: where it was uploaded; None if it was not.
    """

    folder: Path
    kind: str
    epoch: int
    address: str | None = None


def export(
    run: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    epoch: int | None = None,
    pipeline: bool = False,
    format: Literal["diffusers", "comfyui", "kohya"] | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
) -> Exported:
    """Write the weights of a run's checkpoint, with a model card, in a format that other programs load (docs/lora.md).

    Args:
        run: run directory, or one of its checkpoints.
        output: folder; None: ``export`` in the run directory, or ``pipeline`` for a whole pipeline.
        epoch: epoch of the checkpoint; None: the newest.
        pipeline: write a whole pipeline folder that includes the trained weights.
        format: naming scheme of the LoRA layers; None: the one that diffusers and ComfyUI both read.
        dtype: dtype of the weights; None: bfloat16 for LoRA with ``output``, otherwise the run's own.
        push_to_hub: "owner/name" of a model repository on the Hugging Face hub to upload the folder to.
        private: create that repository as a private one.

    Raises:
        UserError: the run or checkpoint does not exist, its weights are damaged, or the folder is not empty or not
            writable; or the hub refuses the upload.
    """
    from pcpo_fast.config.loading import load_config
    from pcpo_fast.files.hub_upload import check_repository, upload
    from pcpo_fast.policies.families import FAMILIES, family_of
    from pcpo_fast.policies.pipeline_files import folder_here, pipeline_class_of
    from pcpo_fast.reporting.model_card import READERS, write_model_card
    from pcpo_fast.reporting.run_files import read_run_files
    from pcpo_fast.runs.exporting import export_run
    from pcpo_fast.runs.run_directory import CONFIG_FILE

    check_choice(("diffusers", "comfyui", "kohya"), format=format)
    check_choice(("bfloat16", "float16", "float32"), dtype=dtype)
    if push_to_hub is not None:
        check_repository(push_to_hub)
    elif private:
        raise UserError("--private: only takes effect with --push-to-hub")
    target = None if output is None else os.fspath(output)
    written = export_run(os.fspath(run), target, epoch, pipeline, format, dtype)
    folder, kind, trained = Path(written["output"]), written["kind"], written["epoch"]
    config = load_config(written["run"] / CONFIG_FILE)
    base, call, readers = folder_here(config.model.path, config.model.revision), None, READERS
    if base is not None:
        with suppress(UserError):  # another model is there now
            family = family_of(pipeline_class_of(base, FAMILIES))
            call, readers = family.call_options(config.model), family.lora_readers(format)
    write_model_card(folder, read_run_files(written["run"]), config, trained, kind, push_to_hub, call, readers)
    address = None
    if push_to_hub is not None:
        address = upload(folder, push_to_hub, f"{kind} after {counted(trained, 'epoch')}", private=private)
    return Exported(folder, kind, trained, address)
