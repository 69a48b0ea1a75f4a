"""FLUX.2-klein as a policy: prompts in Qwen3's chat template, and the word about distilled models."""

from pathlib import Path
from typing import Any, ClassVar

from diffusers import Flux2KleinPipeline

from pcpo_fast.config.schema import ModelConfig
from pcpo_fast.policies.flux2 import Flux2Policy
from pcpo_fast.policies.pipeline_policy import check_distillation


class Flux2KleinPolicy(Flux2Policy):
    """FLUX.2-klein 4B and 9B, base or distilled: any :class:`diffusers.Flux2KleinPipeline`."""

    family: ClassVar[str] = "flux2_klein"
    pipeline_class: ClassVar[Any] = Flux2KleinPipeline
    layers: ClassVar[tuple[int, ...]] = (9, 18, 27)

    @classmethod
    def check_settings(cls, folder: Path, settings: ModelConfig) -> None:
        """A distilled klein has no classifier-free guidance, and a word about training it is due."""
        super().check_settings(folder, settings)
        check_distillation(folder, settings)

    @classmethod
    def call_options(cls, settings: ModelConfig) -> dict[str, Any]:
        """The pipeline's negative prompt is empty; it takes the embeddings of another one, and no text."""
        return super().call_options(settings.model_copy(update={"negative_prompt": ""}))

    def readers(self, pipeline: Any) -> list[tuple[Any, int, str]]:
        """Qwen3, which reads the chat template around a prompt as well."""
        return [self.within_template(pipeline.tokenizer, "Qwen3", enable_thinking=False)]
