"""Exports trained weights for other programs: as LoRA files, networks, or complete pipelines."""

import json
import shutil
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pcpo_fast.config.schema import Config, ModelConfig
from pcpo_fast.errors import UserError, reason_of
from pcpo_fast.policies.families import family_of_network, find_family
from pcpo_fast.policies.folder_checks import check_folder
from pcpo_fast.policies.lora_files import LORA_FILE, Format, describe_run, read_own_lora, write_lora
from pcpo_fast.policies.pipeline_policy import DTYPES
from pcpo_fast.policies.quiet import quiet_libraries


def save_lora(
    config: Config, weights: Path, target: Path, names: Format | None, dtype: torch.dtype | None = None
) -> None:
    """Write a LoRA file for other programs into a folder.

    Args:
        config: of the run.
        weights: what the policy's ``save_weights`` wrote, in this version or an older one.
        target: the folder, which is made.
        names: as :func:`pcpo_fast.policies.lora_files.write_lora`.
        dtype: of the weights; None: float32.

    Raises:
        UserError: the weights cannot be read or do not fit ``dtype``, or, where an older version wrote them and
            kohya's names are asked for, the model that the run trained is no longer there.
    """
    network, layers = read_own_lora(weights / LORA_FILE, "weights")
    if network is None and names == "kohya":  # the one case in which the transformers differ
        _, family = find_family(config.model)
    else:
        family = family_of_network(network or "SD3Transformer2DModel")
    target.mkdir()
    write_lora(target / LORA_FILE, layers, family, names, dtype, describe_run(config))


def save_network(weights: Path, target: Path, dtype: torch.dtype | None) -> None:
    """Copy a network's folder, in another dtype where one is named."""
    shutil.copytree(weights, target)
    for file in target.rglob("*.safetensors") if dtype is not None else ():
        state = load_file(file)
        save_file({n: v.to(dtype) if v.is_floating_point() else v for n, v in state.items()}, file, {"format": "pt"})
    for index in target.rglob("*.safetensors.index.json") if dtype is not None else ():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["metadata"] = {}  # the size is another one now, and nothing needs it
        index.write_text(json.dumps(content, indent=2), encoding="utf-8")


def save_pipeline(settings: ModelConfig, weights: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Write the pipeline of ``settings.path`` with the trained weights: LoRA merged in, or the network replaced.

    Args:
        settings: the run's ``model`` section.
        weights: what the policy's ``save_weights`` wrote.
        target: folder of the new pipeline.
        dtype: of the pipeline's weights; None: ``settings.dtype``.

    Raises:
        UserError: the model that the run trained is no longer there, or the weights cannot be read as weights of it;
            nothing but safetensors is read.
    """
    folder, family = find_family(settings)
    part, own = family.trained_part, DTYPES[settings.dtype]
    check_folder(folder, family, settings)
    with quiet_libraries():
        pipeline = family.load_pipeline(folder, settings)
        try:
            if settings.finetune == "lora":
                pipeline.load_lora_weights(weights, weight_name=LORA_FILE, use_safetensors=True)
                pipeline.fuse_lora()
                pipeline.unload_lora_weights()
            else:
                kind = type(getattr(pipeline, part))
                network = kind.from_pretrained(weights, subfolder=part, dtype=own, use_safetensors=True)
                family.replace_part(pipeline, part, network)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, UnpicklingError) as error:
            reason = reason_of(error)
            raise UserError(f"{weights} cannot be read as weights of {settings.path}: {reason}") from None
        family.write_pipeline(pipeline.to(dtype or own), folder, target)
