"""FLUX.2-klein as a policy: packed latents behind the VAE's batch norm, states of three layers of Qwen3."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor

from pcpo_fast.config.schema import ModelConfig
from pcpo_fast.errors import UserError
from pcpo_fast.files.content import INDEX
from pcpo_fast.method.schedules import FlowSchedule, Schedule
from pcpo_fast.policies.base import Conditioning
from pcpo_fast.policies.depth import Depth, double_and_single_blocks
from pcpo_fast.policies.lora_names import JOINT_ATTENTION, BlockNames, release_weights
from pcpo_fast.policies.part_checks import about, check_rotary_axes
from pcpo_fast.policies.pipeline_policy import Fit, PipelinePolicy, unpacked, warn_of_distillation
from pcpo_fast.policies.truncation import template_tokens
from pcpo_fast.policies.weight_files import read_json

LAST_STATES = 27
"""The last of the text encoder's layers whose states the network reads (9, 18 and 27)."""

# The layers of diffusers' network that are the rows of each weight of the original release, as in diffusers'
# convert_flux2_transformer_checkpoint_to_diffusers.
_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
_SINGLE = {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)}
_REST = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
_BLOCKS: BlockNames = {
    "transformer_blocks": ("double_blocks", _DOUBLE),
    "single_transformer_blocks": ("single_blocks", _SINGLE),
}


class Flux2KleinPolicy(PipelinePolicy):
    """FLUX.2-klein 4B and 9B, base or distilled: any :class:`diffusers.Flux2KleinPipeline`.

    Latents are packed: [B, tokens, channels] with one token per 2 x 2 latent pixels, as the transformer takes them.
    """

    family: ClassVar[str] = "flux2_klein"
    pipeline_class: ClassVar[Any] = Flux2KleinPipeline
    trained_part: ClassVar[str] = "transformer"
    encoder_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    cell: ClassVar[int] = 2
    schedule_kind: ClassVar[type[Schedule]] = FlowSchedule
    lora_targets: ClassVar[tuple[str, ...]] = (
        *JOINT_ATTENTION,
        "ff.linear_in",
        "ff.linear_out",
        "ff_context.linear_in",
        "ff_context.linear_out",
        "attn.to_qkv_mlp_proj",  # of the single blocks, as the next
        "attn.to_out",
    )
    fits: ClassVar[tuple[Fit, ...]] = (
        ("joint_attention_dim", 3, "text_encoder", "hidden_size"),
        ("in_channels", 4, "vae", "latent_channels"),
    )

    @classmethod
    def check_network(cls, file: Path, config: Mapping[str, Any]) -> None:
        """The axes of the rotary embeddings make up a head, and the text encoder has the layers that are read."""
        check_rotary_axes(file, config, (32, 32, 32, 32))
        encoder = file.parent.parent / "text_encoder" / "config.json"
        layers = read_json(encoder).get("num_hidden_layers")
        if isinstance(layers, int) and layers < LAST_STATES:
            raise UserError(
                f"model.path: {encoder} says num_hidden_layers {layers}; the states of layers 9, 18 and {LAST_STATES} "
                "are read, so it must be at least 27"
            )

    @classmethod
    def check_settings(cls, folder: Path, settings: ModelConfig) -> None:
        """A distilled klein has no classifier-free guidance, and a word about training it is due."""
        super().check_settings(folder, settings)
        if not read_json(folder / INDEX).get("is_distilled"):
            return
        if settings.cfg_scale != 1:
            raise UserError(
                f"model.cfg_scale: {folder} is distilled (is_distilled in {INDEX}) and was made for images without "
                "classifier-free guidance: set it to 1, or take the base model"
            )
        warn_of_distillation(folder)

    @classmethod
    def release_weights(cls, layers: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Black Forest Labs' names."""
        return release_weights(_BLOCKS, _REST, layers)

    @classmethod
    def depth(cls, config: Mapping[str, Any]) -> Depth:
        """Double blocks, then single ones."""
        return double_and_single_blocks(config)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(tokens, channels) of one image."""
        return self.rows * self.columns, int(self.network.config["in_channels"])

    def encode_with(self, pipeline: Any, prompts: list[str], device: torch.device) -> Conditioning:
        """States of three of Qwen3's layers, side by side, for each prompt in the chat template.

        Raises:
            UserError: the tokenizer has no chat template.
        """
        template_tokens(pipeline.tokenizer, self.folder, enable_thinking=False)
        # Without its head: nobody reads the logits, which are gigabytes for a batch of prompts.
        pipeline.text_encoder = getattr(pipeline.text_encoder, "model", pipeline.text_encoder)
        states, _ = pipeline.encode_prompt(
            prompts, device=device, max_sequence_length=self.settings.max_sequence_length
        )
        return {"prompt_embeds": states}

    def conditioning_shapes(self, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        """Qwen3's states; padding has states as well."""
        return {"prompt_embeds": (self.settings.max_sequence_length, self.network.config["joint_attention_dim"])}

    def readers(self, pipeline: Any) -> list[tuple[Any, int, str]]:
        """Qwen3, which reads the chat template around a prompt as well."""
        limit = self.settings.max_sequence_length
        limit -= template_tokens(pipeline.tokenizer, self.folder, enable_thinking=False)
        return [(pipeline.tokenizer, limit, "Qwen3 reads within its chat template (model.max_sequence_length)")]

    def run_network(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity for a batch whose rows may be at different times."""
        device, states = latents.device, conditioning["prompt_embeds"]
        one, text = torch.arange(1, device=device), torch.arange(states.shape[1], device=device)
        rows, columns = torch.arange(self.rows, device=device), torch.arange(self.columns, device=device)
        velocity: Tensor = self.forward_module(
            hidden_states=latents,
            encoder_hidden_states=states,
            timestep=times,
            img_ids=torch.cartesian_prod(one, rows, columns, one),  # time, row, column, place in the text
            txt_ids=torch.cartesian_prod(one, one, one, text),
            guidance=None,
            return_dict=False,
        )[0]
        return velocity

    def to_pixels(self, latents: Tensor) -> Tensor:
        """The latents without the VAE's batch norm, unpacked."""
        norm = self.vae.bn
        std = (norm.running_var.to(latents) + self.vae.config["batch_norm_eps"]).sqrt()
        return unpacked(latents * std + norm.running_mean.to(latents), self.rows, self.columns)

    def schedule(self, steps: int) -> FlowSchedule:
        """The grid of the pipeline's scheduler for this image size, shifted by the pipeline's fit to both."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config)
        with about("scheduler/scheduler_config.json"):
            mu = compute_empirical_mu(self.rows * self.columns, steps)
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        return FlowSchedule(scheduler.sigmas.double())
