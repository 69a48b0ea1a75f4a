"""Whole pipelines with trained weights in them."""

from pathlib import Path

from pcpo_fast.config import ModelConfig
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
        UserError: the model that the run trained is no longer there.
    """
    folder, family = find_family(settings)
    part, dtype = family.trained_part, DTYPES[settings.dtype]
    with quiet_libraries():
        pipeline = family.load_pipeline(folder, dtype=dtype)
        if settings.finetune == "lora":
            pipeline.load_lora_weights(weights)
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()
        else:
            network = type(getattr(pipeline, part)).from_pretrained(weights, subfolder=part, dtype=dtype)
            pipeline.register_modules(**{part: network})
        pipeline.save_pretrained(target)
