"""Base class of policies for diffusers' modular pipelines, whose folders have a ``modular_model_index.json``."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers

from pcpo_fast.config.schema import ModelConfig
from pcpo_fast.policies.pipeline_files import part_classes
from pcpo_fast.policies.pipeline_policy import PipelinePolicy


class ModularPolicy(PipelinePolicy):
    """A policy built from the parts of a modular pipeline, a :class:`diffusers.ModularPipeline`.

    Folders are those that its ``save_pretrained`` writes. Parts that the pipeline's blocks configure themselves, such
    as the scheduler, need not be there.
    """

    @classmethod
    def _blocks(cls) -> Any:
        """The blocks that the pipeline's class names, whatever the index says."""
        return getattr(diffusers, cls.pipeline_class.default_blocks_name)()

    @classmethod
    def call_options(cls, settings: ModelConfig) -> dict[str, Any]:
        """Guidance is one of the pipeline's parts."""
        return {}

    @classmethod
    def part_kinds(cls) -> dict[str, Any]:
        """The class of each part, as the pipeline's blocks expect it."""
        return {spec.name: spec.type_hint for spec in cls._blocks().expected_components} | cls.other_kinds

    @classmethod
    def default_scheduler(cls) -> tuple[str, dict[str, Any]] | None:
        """The scheduler as the pipeline's blocks configure it."""
        spec = next(spec for spec in cls._blocks().expected_components if spec.name == "scheduler")
        return spec.type_hint.__name__, dict(spec.config)

    @classmethod
    def _assemble(cls, folder: Path, parts: Mapping[str, Any]) -> Any:
        """As in the base class. The parts are set as they are: the index goes on saying how diffusers loads them."""
        blocks, named = cls._blocks(), part_classes(folder)
        pipeline = cls.pipeline_class(blocks, str(folder), local_files_only=True)
        for spec in blocks.expected_components:
            if spec.name in parts:
                setattr(pipeline, spec.name, parts[spec.name])
            elif spec.default_creation_method == "from_config" and named.get(spec.name):
                own = pipeline.get_component_spec(spec.name).load(local_files_only=True)
                setattr(pipeline, spec.name, own)
        return pipeline

    @classmethod
    def replace_part(cls, pipeline: Any, name: str, part: Any) -> None:
        """Put another network into a pipeline."""
        setattr(pipeline, name, part)

    @classmethod
    def write_pipeline(cls, pipeline: Any, folder: Path, target: Path) -> None:
        """As in the base class. Tokenizers are copied: the files of a processor are more than its tokenizer's."""
        copied = [name for name in cls.encoder_parts if name.startswith("tokenizer")]
        for name in copied:
            setattr(pipeline, name, None)
        pipeline.save_pretrained(str(target), overwrite_modular_index=True)
        for name in copied:
            shutil.copytree(folder / name, target / name)
