"""What the tests of the model families share: a family's miniature, its policy, and diffusers' own pipeline."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from tiny_pipeline import CHANNELS, HEIGHT, TOKENS, WIDTH, tiny_config
from tiny_pipelines import EMBEDDED_RUN, FLOW_RUN, NEGATIVE, SD3_RUN, SD_RUN
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, ProcessorMixin, Qwen2TokenizerFast

from pcpo_fast.policies.families import family_of, load_policy

CPU = torch.device("cpu")
LORA = ("model.finetune=lora", "model.lora.rank=4", "model.lora.alpha=8")
LATENTS = (4, HEIGHT // 2, WIDTH // 2)
PACKED = (TOKENS, CHANNELS)
FLUX2 = ("klein", "flux2_dev")
KEPT = 12
"""Tokens per prompt, of the families in which a setting says how many are read."""


class TextProcessor(ProcessorMixin):
    """A processor of transformers as it treats text; those that also take images need torchvision."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, chat_template=tokenizer.chat_template)


class Kind(NamedTuple):
    """What differs from family to family in how diffusers and the tests call it.

    Attributes:
        pipeline: diffusers' class.
        run: settings that sample and train it with guidance 3 and, where there is one, a negative prompt.
        latents: shape of one image's.
        part: that is trained.
        guided: whether there is classifier-free guidance; elsewhere the scale is embedded.
        cuts: whether ``model.max_sequence_length`` says how many tokens are read.
        readers: of prompts, as warnings call them.
    """

    pipeline: str
    run: tuple[str, ...]
    latents: tuple[int, ...]
    part: str = "transformer"
    cuts: bool = True
    readers: tuple[str, ...] = ("CLIP reads",)
    guided: bool = True


KINDS = {
    "flux": Kind(
        "FluxPipeline",
        SD3_RUN,
        PACKED,
        readers=("T5 reads (model.max_sequence_length)", "CLIP reads for its one summary vector"),
    ),
    "flux3": Kind(
        "Flux3ModularPipeline",
        SD3_RUN,
        PACKED,
        readers=("Qwen3-VL reads within its chat template (model.max_sequence_length)",),
    ),
    "klein": Kind(
        "Flux2KleinPipeline",
        SD3_RUN,
        PACKED,
        readers=("Qwen3 reads within its chat template (model.max_sequence_length)",),
    ),
    "flux2_dev": Kind(
        "Flux2Pipeline",
        EMBEDDED_RUN,
        PACKED,
        readers=("Mistral reads within its chat template (model.max_sequence_length)",),
        guided=False,
    ),
    "krea2": Kind(
        "Krea2Pipeline", SD3_RUN, PACKED, readers=("Qwen3-VL reads within its template (model.max_sequence_length)",)
    ),
    "qwen_image": Kind("QwenImagePipeline", SD3_RUN, PACKED, readers=("Qwen2.5-VL reads (model.max_sequence_length)",)),
    "sd": Kind("StableDiffusionPipeline", SD_RUN, LATENTS, "unet", False),
    "sd_v": Kind("StableDiffusionPipeline", SD_RUN, LATENTS, "unet", False),
    "sd3": Kind(
        "StableDiffusion3Pipeline", SD3_RUN, LATENTS, readers=("T5 reads (model.max_sequence_length)", "CLIP reads")
    ),
    "z_image": Kind(
        "ZImagePipeline",
        SD3_RUN,
        LATENTS,
        readers=("Qwen3 reads within its chat template (model.max_sequence_length)",),
    ),
}
FIXTURES = {"flux": "pipeline_folder"} | {name: f"{name}_folder" for name in KINDS if name != "flux"}
"""The fixture with a family's miniature."""


class Call(NamedTuple):
    """What a network is asked and answers."""

    latents: Any
    time: Tensor
    states: Any
    output: Any


@dataclass(frozen=True)
class Family:
    """A family under test.

    Attributes:
        name: of :data:`KINDS`.
        folder: of its miniature.
    """

    name: str
    folder: Path

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    @property
    def part(self) -> str:
        return self.kind.part

    @property
    def is_flow(self) -> bool:
        return self.part == "transformer"

    @property
    def run(self) -> tuple[str, ...]:
        return self.kind.run

    @property
    def trained(self) -> list[tuple[str, str]]:
        """Keys and values of what samples and trains it, with guidance where that can be trained."""
        settings = self.run if family_of(self.kind.pipeline).linear_guidance else FLOW_RUN
        return [(key, value) for key, _, value in (setting.partition("=") for setting in settings)]

    @property
    def unguided(self) -> str:
        """The setting that makes the guidance 1."""
        return "model.cfg_scale=1.0" if self.kind.guided else "model.guidance=1.0"

    def config(self, *overrides: str) -> Any:
        return tiny_config(self.folder, *self.run, *overrides)

    def policy(self, *overrides: str) -> Any:
        return load_policy(self.config(*overrides), CPU)

    def latents(self, rows: int, seed: int = 0) -> Tensor:
        return random_latents(rows, seed, self.kind.latents)

    def pipeline(self, folder: Path | None = None) -> Any:
        """diffusers' pipeline of a folder, with the scheduler whose grid the policy runs."""
        if self.name == "flux3":
            return flux3_pipeline(folder or self.folder)
        folder, given = folder or self.folder, {"tokenizer": None} if self.name == "flux2_dev" else {}
        pipeline = getattr(diffusers, self.kind.pipeline).from_pretrained(folder, **given)
        if given:
            pipeline.tokenizer = TextProcessor(PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"))
        if not self.is_flow:
            pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def images(self, pipeline: Any, latents: Tensor, prompts: list[str], scale: float, **options: Any) -> Tensor:
        """What diffusers makes of latents in four steps without noise."""
        settings: dict[str, Any] = {"num_inference_steps": 4, "output_type": "pt"} | options
        if self.kind.cuts:
            settings.setdefault("max_sequence_length", KEPT)
        if self.name == "flux3":  # takes one prompt at a time
            latents = latents.transpose(1, 2).reshape(len(latents), 1, CHANNELS, HEIGHT // 4, WIDTH // 4)
            negatives = settings.pop("negative_prompt", [NEGATIVE] * len(prompts))
            pipeline.guider = diffusers.ClassifierFreeGuidance(guidance_scale=scale)
            settings |= {"height": HEIGHT, "width": WIDTH, "output": "images"}
            return torch.cat(
                [
                    pipeline(prompt=one, negative_prompt=negative if scale != 1 else None, latents=row, **settings)
                    for one, negative, row in zip(prompts, negatives, latents, strict=True)
                ]
            )
        key = "cfg_scale" if self.kind.guided else "guidance"
        model = self.config(f"model.{key}={scale}").model
        settings = family_of(self.kind.pipeline).call_options(model) | settings  # as a model card calls it
        if self.name in FLUX2:  # unpacked latents
            latents = latents.transpose(1, 2).reshape(len(latents), CHANNELS, HEIGHT // 4, WIDTH // 4)
        if self.name == "klein":
            # Its call takes the embeddings of another negative prompt than the empty one.
            negative = settings.pop("negative_prompt", [NEGATIVE] * len(prompts))
            if scale != 1:
                settings["negative_prompt_embeds"] = self.encoded(pipeline, negative)["prompt_embeds"]
        elif isinstance(settings.get("negative_prompt"), str):
            settings["negative_prompt"] = [settings["negative_prompt"]] * len(prompts)
        with torch.no_grad():
            return pipeline(prompt=prompts, latents=latents, **settings).images

    def halves(self, calls: list["Call"]) -> list["Call"]:
        """What diffusers' pipeline asks of its network in each step: the unconditional half, then the other."""
        if self.name == "z_image":  # lists of images and prompts, the conditional half first, and time the other way
            return [
                Call(
                    torch.stack(call.latents).squeeze(2),
                    call.time,
                    pad_sequence([*call.states[half:], *call.states[:half]], True),
                    -torch.stack([*call.output[half:], *call.output[:half]]).squeeze(2),
                )
                for call in calls
                for half in [len(call.states) // 2]
            ]
        if self.name == "flux3":  # a call for each half of each prompt, the conditional half first
            steps = len(calls) // 4
            return [
                Call(*(torch.cat([getattr(call, field) for call in four]) for field in Call._fields))
                for step in range(steps)
                for first in [2 * step]
                for second in [2 * (steps + step)]
                for four in [[calls[number] for number in (first + 1, second + 1, first, second)]]
            ]
        if len(calls) == 8:  # the conditional half first, and the other in a call of its own
            return [
                Call(
                    one.latents,
                    one.time,
                    pad_sequence([*two.states, *one.states], True),
                    torch.cat((two.output, one.output)),
                )
                for one, two in zip(calls[::2], calls[1::2], strict=True)
            ]
        return calls

    def guided(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        """diffusers' classifier-free guidance."""
        both = unconditional + scale * (conditional - unconditional)
        if self.name == "qwen_image":
            both = both * (conditional.norm(dim=-1, keepdim=True) / both.norm(dim=-1, keepdim=True))
        return both

    @torch.no_grad()
    def encoded(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        """What diffusers' pipeline makes of prompts, by the names of a policy's conditioning."""
        if self.name == "flux3":
            encode = diffusers.modular_pipelines.flux3.encoders.Flux3TextEncoderStep._get_qwen3_vl_prompt_embeds
            parts = pipeline.text_encoder, pipeline.tokenizer
            states = torch.cat([encode(*parts, prompt, max_sequence_length=KEPT) for prompt in prompts])
            return {"prompt_embeds": states, "prompt_mask": states.new_ones(states.shape[:2])}
        if self.name in FLUX2:
            return {"prompt_embeds": pipeline.encode_prompt(prompts, max_sequence_length=KEPT)[0]}
        if self.name == "z_image":
            rows, _ = pipeline.encode_prompt([*prompts], do_classifier_free_guidance=False, max_sequence_length=KEPT)
            masks = [row.new_ones(len(row)) for row in rows]
            return {"prompt_embeds": pad_sequence(rows, True), "prompt_mask": pad_sequence(masks, True)}
        if self.name == "krea2":
            rows = [
                row[kept] for row, kept in zip(*pipeline.encode_prompt(prompts, max_sequence_length=KEPT), strict=True)
            ]
            masks = [row.new_ones(len(row)) for row in rows]
            return {"prompt_embeds": pad_sequence(rows, True), "prompt_mask": pad_sequence(masks, True)}
        if self.name == "qwen_image":
            states, mask = pipeline.encode_prompt(prompts, max_sequence_length=KEPT)
            mask = states.new_ones(states.shape[:2]) if mask is None else mask.to(states.dtype)
            return {"prompt_embeds": states, "prompt_mask": mask}
        if self.name == "flux":
            states, pooled, _ = pipeline.encode_prompt(prompts, None, max_sequence_length=KEPT)
        elif self.name == "sd3":
            states, _, pooled, _ = pipeline.encode_prompt(
                prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=KEPT
            )
        else:
            return {"prompt_embeds": pipeline.encode_prompt(prompts, CPU, 1, False)[0]}
        return {"prompt_embeds": states, "pooled_prompt_embeds": pooled}

    @torch.no_grad()
    def decoded(self, pipeline: Any, latents: Tensor) -> Tensor:
        """diffusers' images of clean latents, in the words of the end of each pipeline's call."""
        vae = pipeline.vae
        if self.name == "flux3":
            return flux3_decoded(pipeline, latents)
        if self.name in FLUX2:
            ids = pipeline._prepare_latent_ids(torch.empty(len(latents), 1, HEIGHT // 4, WIDTH // 4))
            pixels = pipeline._unpack_latents_with_ids(latents, ids)
            mean, variance = (value.view(1, -1, 1, 1) for value in (vae.bn.running_mean, vae.bn.running_var))
            pixels = pipeline._unpatchify_latents(pixels * torch.sqrt(variance + vae.config.batch_norm_eps) + mean)
        elif self.name in ("krea2", "qwen_image"):
            mean, std = (
                torch.tensor(value).view(1, -1, 1, 1, 1) for value in (vae.config.latents_mean, vae.config.latents_std)
            )
            factor = () if self.name == "krea2" else (pipeline.vae_scale_factor,)
            pixels = pipeline._unpack_latents(latents, HEIGHT, WIDTH, *factor) * std + mean
            images: Tensor = vae.decode(pixels, return_dict=False)[0][:, :, 0]
            return pipeline.image_processor.postprocess(images, output_type="pt")
        else:
            if self.name == "flux":
                latents = pipeline._unpack_latents(latents, HEIGHT, WIDTH, pipeline.vae_scale_factor)
            pixels = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)
        images = pipeline.image_processor.postprocess(vae.decode(pixels, return_dict=False)[0], output_type="pt")
        return images


def flux3_pipeline(folder: Path) -> Any:
    """diffusers' modular pipeline of a folder; prompts are read as they are."""
    blocks: Any = diffusers.Flux3AutoBlocks()
    blocks.sub_blocks.pop("prompt_upsampler")
    pipeline: Any = diffusers.Flux3ModularPipeline(blocks, str(folder), local_files_only=True)
    pipeline.load_components(["transformer", "vae", "text_encoder"], local_files_only=True)
    pipeline.tokenizer = TextProcessor(Qwen2TokenizerFast.from_pretrained(folder / "tokenizer"))
    for block in pipeline.blocks.sub_blocks["denoise"].sub_blocks.values():
        block.sub_blocks["denoise"].set_progress_bar_config(disable=True)
    return pipeline


def flux3_decoded(pipeline: Any, latents: Tensor) -> Tensor:
    """What the block of diffusers' modular pipeline decodes."""
    state = diffusers.modular_pipelines.PipelineState()
    state.set("latents", latents.transpose(1, 2).reshape(len(latents), CHANNELS, HEIGHT // 4, WIDTH // 4))
    state.set("output_type", "pt")
    images: Tensor = pipeline.blocks.sub_blocks["decode"](pipeline, state)[1].get("images")
    return images


def random_latents(rows: int, seed: int = 0, shape: tuple[int, ...] = LATENTS) -> Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))


def randomize_adapters(policy: Any) -> None:
    """LoRA starts as the identity; make it do something."""
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.module.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def trained_state(policy: Any) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in policy.module.named_parameters() if value.requires_grad}
