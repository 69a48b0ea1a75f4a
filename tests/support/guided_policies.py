"""What the tests of the guided families share: a family's miniature, its policy, and diffusers' own pipeline."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusion3Pipeline, StableDiffusionPipeline
from tiny_pipeline import HEIGHT, WIDTH, tiny_config
from tiny_pipelines import NEGATIVE, SD3_RUN, SD_RUN
from torch import Tensor

from pcpo_fast.policies.families import load_policy

CPU = torch.device("cpu")
LORA = ("model.finetune=lora", "model.lora.rank=4", "model.lora.alpha=8")
LATENTS = (4, HEIGHT // 2, WIDTH // 2)


@dataclass(frozen=True)
class Family:
    """A family under test.

    Attributes:
        name: "sd", "sd_v" or "sd3".
        folder: of its miniature.
    """

    name: str
    folder: Path

    @property
    def is_sd3(self) -> bool:
        return self.name == "sd3"

    @property
    def part(self) -> str:
        return "transformer" if self.is_sd3 else "unet"

    @property
    def run(self) -> tuple[str, ...]:
        """Settings that sample and train it with guidance 3 and a negative prompt."""
        return SD3_RUN if self.is_sd3 else SD_RUN

    def config(self, *overrides: str) -> Any:
        return tiny_config(self.folder, *self.run, *overrides)

    def policy(self, *overrides: str) -> Any:
        return load_policy(self.config(*overrides), CPU)

    def pipeline(self, folder: Path | None = None) -> Any:
        """diffusers' pipeline of a folder, with the scheduler whose grid the policy runs."""
        kind: Any = StableDiffusion3Pipeline if self.is_sd3 else StableDiffusionPipeline
        pipeline = kind.from_pretrained(folder or self.folder)
        if not self.is_sd3:
            pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def images(self, pipeline: Any, latents: Tensor, prompts: list[str], scale: float, **options: Any) -> Tensor:
        """What diffusers makes of latents in four steps without noise."""
        settings: dict[str, Any] = {"num_inference_steps": 4, "output_type": "pt"} | options
        if self.is_sd3:
            settings["max_sequence_length"] = 12
        if scale != 1:
            settings.setdefault("negative_prompt", [NEGATIVE] * len(prompts))
        with torch.no_grad():
            return pipeline(
                prompts, height=HEIGHT, width=WIDTH, latents=latents, guidance_scale=scale, **settings
            ).images


def random_latents(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, *LATENTS, generator=torch.Generator().manual_seed(seed))


def randomize_adapters(policy: Any) -> None:
    """LoRA starts as the identity; make it do something."""
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.module.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def trained_state(policy: Any) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in policy.module.named_parameters() if value.requires_grad}
