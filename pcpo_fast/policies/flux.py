"""FLUX as a policy: packed latents, embedded guidance, CLIP and T5 conditioning."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline
from torch import Tensor

from pcpo_fast.config.schema import ModelConfig
from pcpo_fast.method.schedules import FlowSchedule
from pcpo_fast.policies.base import Conditioning
from pcpo_fast.policies.depth import DOUBLE_AND_SINGLE
from pcpo_fast.policies.flow_grids import shifted_schedule
from pcpo_fast.policies.lora_names import JOINT_ATTENTION, BlockNames
from pcpo_fast.policies.part_checks import check_rotary_axes
from pcpo_fast.policies.pipeline_policy import Fit, PipelinePolicy

# The layers of diffusers' network that are the rows of each weight of the original release, as in diffusers'
# convert_flux_transformer_checkpoint_to_diffusers.
_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_REST = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
_BLOCKS: BlockNames = {
    "transformer_blocks": ("double_blocks", _DOUBLE),
    "single_transformer_blocks": ("single_blocks", _SINGLE),
}


class FluxPolicy(PipelinePolicy):
    """FLUX.1-dev, FLUX.1-schnell, or any other :class:`diffusers.FluxPipeline`.

    Latents are packed: [B, tokens, channels] with one token per 2 x 2 latent pixels, as the transformer takes them.
    """

    family: ClassVar[str] = "flux"
    pipeline_class: ClassVar[Any] = FluxPipeline
    encoder_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    unused_parts: ClassVar[tuple[str, ...]] = ("image_encoder", "feature_extractor")
    accelerated: ClassVar[tuple[str, ...]] = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    packs_latents: ClassVar[bool] = True
    lora_targets: ClassVar[tuple[str, ...]] = (
        *JOINT_ATTENTION,
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )

    fits: ClassVar[tuple[Fit, ...]] = (
        ("joint_attention_dim", 1, "text_encoder_2", "d_model"),
        ("pooled_projection_dim", 1, "text_encoder", "hidden_size"),
        ("in_channels", 4, "vae", "latent_channels"),
    )
    block_lists: ClassVar[Mapping[str, tuple[str, ...]]] = DOUBLE_AND_SINGLE
    release_names: ClassVar[tuple[BlockNames, Mapping[str, str]]] = (_BLOCKS, _REST)

    @classmethod
    def check_network(cls, file: Path, config: Mapping[str, Any]) -> None:
        """The axes of the rotary embeddings make up a head."""
        check_rotary_axes(file, config, (16, 56, 56))

    @classmethod
    def call_options(cls, settings: ModelConfig) -> dict[str, Any]:
        """The scale of the embedded guidance, and classifier-free guidance under another name."""
        options = super().call_options(settings) | {"guidance_scale": settings.guidance}
        if settings.cfg_scale != 1:  # off without a negative prompt
            options |= {"true_cfg_scale": settings.cfg_scale, "negative_prompt": settings.negative_prompt}
        return options

    def encode_with(self, pipeline: Any, prompts: list[str], device: torch.device) -> Conditioning:
        """T5 states and pooled CLIP state of each prompt."""
        states, pooled, _ = pipeline.encode_prompt(
            prompts, prompt_2=prompts, device=device, max_sequence_length=self.settings.max_sequence_length
        )
        return {"prompt_embeds": states, "pooled_prompt_embeds": pooled}

    def conditioning_shapes(self, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        """T5's states and CLIP's pooled state."""
        config = self.network.config
        return {
            "prompt_embeds": (self.settings.max_sequence_length, config["joint_attention_dim"]),
            "pooled_prompt_embeds": (config["pooled_projection_dim"],),
        }

    def readers(self, pipeline: Any) -> list[tuple[Any, int, str]]:
        """T5 for the words, CLIP for one vector."""
        clip = pipeline.tokenizer
        return [
            (pipeline.tokenizer_2, self.settings.max_sequence_length, "T5 reads (model.max_sequence_length)"),
            (clip, clip.model_max_length, "CLIP reads for its one summary vector"),
        ]

    def run_network(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity for a batch whose rows may be at different times."""
        device, states = latents.device, conditioning["prompt_embeds"]
        guidance = None
        if self.network.config["guidance_embeds"]:
            guidance = torch.full((latents.shape[0],), self.settings.guidance, device=device, dtype=torch.float32)
        velocity: Tensor = self.forward_module(
            hidden_states=latents,
            encoder_hidden_states=states,
            pooled_projections=conditioning["pooled_prompt_embeds"],
            timestep=times,
            img_ids=self._image_ids(device, latents.dtype),
            txt_ids=torch.zeros(states.shape[1], 3, device=device, dtype=latents.dtype),
            guidance=guidance,
            return_dict=False,
        )[0]
        return velocity

    def _image_ids(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        row = torch.arange(self.rows, device=device).repeat_interleave(self.columns)
        column = torch.arange(self.columns, device=device).repeat(self.rows)
        return torch.stack((torch.zeros_like(row), row, column), dim=1).to(dtype)

    def schedule(self, steps: int) -> FlowSchedule:
        """The grid of the pipeline's scheduler for this image size (static or resolution-dependent shift)."""
        return shifted_schedule(self.scheduler.config, self.rows * self.columns, steps)
