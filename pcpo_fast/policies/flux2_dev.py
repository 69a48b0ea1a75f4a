"""FLUX.2-dev as a policy: embedded guidance, prompts behind a system message in Mistral's chat template."""

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from torch import Tensor
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from pcpo_fast.config.schema import ModelConfig
from pcpo_fast.errors import UserError
from pcpo_fast.files.content import INDEX
from pcpo_fast.policies.flux2 import Flux2Policy
from pcpo_fast.policies.weight_files import read_json


class _TextProcessor(ProcessorMixin):
    """What Pixtral's processor does with text alone; its other half, for images, would need torchvision."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, chat_template=tokenizer.chat_template)


class Flux2DevPolicy(Flux2Policy):
    """FLUX.2-dev, or any other :class:`diffusers.Flux2Pipeline`."""

    family: ClassVar[str] = "flux2_dev"
    pipeline_class: ClassVar[Any] = Flux2Pipeline
    other_kinds: ClassVar[dict[str, Any]] = {"tokenizer": PreTrainedTokenizerFast}  # as the processor reads it
    layers: ClassVar[tuple[int, ...]] = (10, 20, 30)

    @classmethod
    def check_settings(cls, folder: Path, settings: ModelConfig) -> None:
        """There is no classifier-free guidance."""
        super().check_settings(folder, settings)
        if settings.cfg_scale != 1:
            raise UserError(
                f"model.cfg_scale: {folder} is a {cls.pipeline_class.__name__}, which has no classifier-free guidance: "
                "set it to 1; the scale of its embedded guidance is model.guidance"
            )

    @classmethod
    def call_options(cls, settings: ModelConfig) -> dict[str, Any]:
        """The scale of the embedded guidance."""
        return super().call_options(settings) | {"guidance_scale": settings.guidance}

    @classmethod
    def load_pipeline(cls, folder: Path, settings: ModelConfig, parts: Collection[str] | None = None) -> Any:
        """As for other families, with the text's half of the processor."""
        parts = cls.part_kinds().keys() if parts is None else parts
        pipeline = super().load_pipeline(folder, settings, [name for name in parts if name != "tokenizer"])
        if "tokenizer" in parts:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer", local_files_only=True)
            pipeline.tokenizer = _TextProcessor(tokenizer)
        return pipeline

    @classmethod
    def write_pipeline(cls, pipeline: Any, folder: Path, target: Path) -> None:
        """The whole processor is copied."""
        pipeline.tokenizer = None
        super().write_pipeline(pipeline, folder, target)
        shutil.copytree(folder / "tokenizer", target / "tokenizer")
        index = read_json(target / INDEX) | {"tokenizer": read_json(folder / INDEX)["tokenizer"]}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def guidance(self, latents: Tensor) -> Tensor:
        """``model.guidance`` for each row."""
        return torch.full((len(latents),), self.settings.guidance, device=latents.device, dtype=torch.float32)

    def readers(self, pipeline: Any) -> list[tuple[Any, int, str]]:
        """Mistral, which reads the system message and the chat template around a prompt as well."""
        conversation = format_input([""])[0]
        return [
            self.within_template(pipeline.tokenizer.tokenizer, "Mistral", conversation, add_generation_prompt=False)
        ]
