"""Whole pipelines with trained weights in them."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError

from pcpo_fast.config import ModelConfig
from pcpo_fast.errors import UserError, reason_of
from pcpo_fast.policies.loading import find_family
from pcpo_fast.policies.pipeline_policy import DTYPES
from pcpo_fast.policies.quiet import quiet_libraries


def save_pipeline(settings: ModelConfig, weights: Path, target: Path) -> None:
    """Write the pipeline of ``settings.path`` with the trained weights: LoRA merged in, or the network replaced.

    Args:
        settings: the run's ``model`` section.
        weights: what the policy's ``save_weights`` wrote.
        target: folder of the new pipeline.

    Raises:
        UserError: the model that the run trained is no longer there, or the weights cannot be read as weights of it;
            nothing but safetensors is read.
    """
    folder, family = find_family(settings)
    part, dtype = family.trained_part, DTYPES[settings.dtype]
    with quiet_libraries():
        pipeline = family.load_pipeline(folder, dtype=dtype)
        try:
            _put_in(pipeline, weights, None if settings.finetune == "lora" else part, dtype)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, UnpicklingError) as error:
            reason = reason_of(error)
            raise UserError(f"{weights} cannot be read as weights of {settings.path}: {reason}") from None
        pipeline.save_pretrained(target)


def _put_in(pipeline: Any, weights: Path, part: str | None, dtype: Any) -> None:
    """Replace a part of a pipeline, or merge LoRA weights where there is no part."""
    if part is None:
        pipeline.load_lora_weights(weights, weight_name="pytorch_lora_weights.safetensors", use_safetensors=True)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    else:
        network = type(getattr(pipeline, part)).from_pretrained(
            weights, subfolder=part, dtype=dtype, use_safetensors=True
        )
        pipeline.register_modules(**{part: network})
