"""Whole pipelines with trained weights in them."""

from pathlib import Path

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from pcpo_fast.config import ModelConfig
from pcpo_fast.policies.flux import DTYPES
from pcpo_fast.policies.locating import pipeline_folder
from pcpo_fast.policies.quiet import quiet_libraries


def save_pipeline(settings: ModelConfig, weights: Path, target: Path) -> None:
    """Write the pipeline of ``settings.path`` with the trained weights: LoRA merged in, or the transformer replaced.

    Args:
        settings: the run's ``model`` section.
        weights: what :meth:`pcpo_fast.policies.flux.FluxPolicy.save_weights` wrote.
        target: folder of the new pipeline.
    """
    folder = pipeline_folder(settings.path, settings.revision, "FluxPipeline")
    dtype = DTYPES[settings.dtype]
    with quiet_libraries():
        _save_pipeline(settings, folder, weights, target, dtype)


def _save_pipeline(settings: ModelConfig, folder: Path, weights: Path, target: Path, dtype: torch.dtype) -> None:
    if settings.finetune == "lora":
        pipeline = FluxPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
        pipeline.load_lora_weights(weights)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    else:
        transformer = FluxTransformer2DModel.from_pretrained(weights, subfolder="transformer", dtype=dtype)
        pipeline = FluxPipeline.from_pretrained(folder, transformer=transformer, dtype=dtype, local_files_only=True)
    pipeline.save_pretrained(target)
