"""Qwen-Image as a policy: packed latents, captions with a mask, guidance rescaled to the conditional half's norm."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar

import torch
from diffusers import QwenImagePipeline
from torch import Tensor

from pcpo_fast.config.schema import ModelConfig
from pcpo_fast.errors import UserError
from pcpo_fast.method.schedules import FlowSchedule
from pcpo_fast.policies.base import Conditioning, PolicyOutput
from pcpo_fast.policies.embedding_cache import Encoded
from pcpo_fast.policies.flow_grids import shifted_schedule
from pcpo_fast.policies.lora_names import JOINT_ATTENTION
from pcpo_fast.policies.part_checks import check_rotary_axes
from pcpo_fast.policies.pipeline_policy import Fit, with_masks
from pcpo_fast.policies.qwen_vae import QwenVaePolicy
from pcpo_fast.policies.speed import run_block

_OTHER_MODELS = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
"""Settings of networks that edit images, make layers or take a guidance scale."""


class QwenImagePolicy(QwenVaePolicy):
    """Qwen-Image and Qwen-Image-2512: any :class:`diffusers.QwenImagePipeline`."""

    family: ClassVar[str] = "qwen_image"
    pipeline_class: ClassVar[Any] = QwenImagePipeline
    lora_targets: ClassVar[tuple[str, ...]] = (
        *JOINT_ATTENTION,
        *(f"{stream}_mlp.net.{layer}" for stream in ("img", "txt") for layer in ("0.proj", "2")),
    )
    block_lists: ClassVar[Mapping[str, tuple[str, ...]]] = {"double": ("num_layers", "transformer_blocks")}
    fits: ClassVar[tuple[Fit, ...]] = (
        ("joint_attention_dim", 1, "text_encoder", "hidden_size"),
        ("in_channels", 4, "vae", "z_dim"),
    )
    masks_prompts: ClassVar[bool] = True
    caption_width: ClassVar[str | None] = "joint_attention_dim"
    linear_guidance: ClassVar[bool] = False

    def __init__(self, network: Any, *others: Any, **places: Any) -> None:
        """As :class:`QwenVaePolicy`; the network gets a forward that never waits for the device."""
        super().__init__(network, *others, **places)
        network.pos_embed([self._grid], max_txt_seq_len=1, device=network.proj_out.weight.device)  # makes its tables
        network.forward = MethodType(forward_batch, network)

    @classmethod
    def check_network(cls, file: Path, config: Mapping[str, Any]) -> None:
        """The axes of the rotary embeddings make up a head, and the network makes an image of a caption alone."""
        check_rotary_axes(file, config, (16, 56, 56))
        for name in _OTHER_MODELS:
            if config.get(name):
                raise UserError(
                    f"model.path: {file} says {name} {config[name]}, so it is not a text-to-image Qwen-Image"
                )

    @classmethod
    def check_settings(cls, folder: Path, settings: ModelConfig) -> None:
        """The pipeline ignores scales below 1."""
        super().check_settings(folder, settings)
        if settings.cfg_scale < 1:
            raise UserError(
                f"model.cfg_scale: {settings.cfg_scale:g} is below 1, where Qwen-Image has no guidance: set it to 1"
            )

    @classmethod
    def call_options(cls, settings: ModelConfig) -> dict[str, Any]:
        """Classifier-free guidance under another name, off without a negative prompt."""
        options = {"height": settings.height, "width": settings.width, "true_cfg_scale": settings.cfg_scale}
        return options if settings.cfg_scale == 1 else options | {"negative_prompt": settings.negative_prompt}

    @classmethod
    def release_weights(cls, layers: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """The original release has diffusers' names."""
        return {layer: (layer,) for layer in layers}

    @property
    def _grid(self) -> tuple[int, int, int]:
        return 1, self.rows, self.columns

    def encode_with(self, pipeline: Any, prompts: list[str], device: torch.device) -> Encoded:
        """Qwen2.5-VL's last states for each prompt in the pipeline's template, without what precedes it and padding."""
        # Without its head: nobody reads the logits, which are gigabytes for a batch of prompts.
        pipeline.text_encoder = getattr(pipeline.text_encoder, "model", pipeline.text_encoder)
        states, mask = pipeline.encode_prompt(
            prompts, device=device, max_sequence_length=self.settings.max_sequence_length
        )
        lengths = [states.shape[1]] * len(prompts) if mask is None else mask.sum(dim=1).tolist()
        return with_masks([row[:length] for row, length in zip(states, lengths, strict=True)])

    def readers(self, pipeline: Any) -> list[tuple[Any, int, str]]:
        """Qwen2.5-VL; what the template puts before a prompt does not count."""
        limit = self.settings.max_sequence_length
        return [(pipeline.tokenizer, limit, "Qwen2.5-VL reads (model.max_sequence_length)")]

    def run_network(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity for a batch whose rows may be at different times."""
        velocity: Tensor = self.forward_module(
            hidden_states=latents,
            timestep=times,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_hidden_states_mask=conditioning["prompt_mask"] > 0,
            grid=self._grid,
        )[0]
        return velocity

    def combine(self, halves: PolicyOutput) -> Tensor:
        """The output after guidance, with the norm of the conditional half in every token, as the pipeline has it."""
        combined = super().combine(halves)
        if halves.unconditional is None:
            return combined
        norm = halves.conditional.to(combined.dtype).norm(dim=-1, keepdim=True)
        return combined * (norm / combined.norm(dim=-1, keepdim=True))

    def schedule(self, steps: int) -> FlowSchedule:
        """The grid of the pipeline's scheduler for this image size."""
        return shifted_schedule(self.scheduler.config, self.rows * self.columns, steps)


def forward_batch(
    network: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor,
    grid: tuple[int, int, int],
) -> tuple[Tensor]:
    """The forward of diffusers' network, without the captions' lengths, which it copies to the device and never reads.

    Args:
        network: a :class:`diffusers.QwenImageTransformer2DModel`.
        hidden_states: packed latents [B, tokens, channels].
        timestep: [B], 1 noise to 0 image.
        encoder_hidden_states: captions [B, L, width].
        encoder_hidden_states_mask: bool [B, L], true where a caption is.
        grid: frames, rows and columns of the tokens.

    Returns:
        The velocity, [B, tokens, channels].
    """
    image = network.img_in(hidden_states)
    caption = network.txt_in(network.txt_norm(encoder_hidden_states))
    modulation = network.time_text_embed(timestep.to(image.dtype), image)
    places = network.pos_embed([grid], max_txt_seq_len=caption.shape[1], device=image.device)
    for block in network.transformer_blocks:
        caption, image = run_block(network, block, image, caption, encoder_hidden_states_mask, modulation, places)
    return (network.proj_out(network.norm_out(image, modulation)),)
