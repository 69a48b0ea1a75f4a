"""What FLUX.2's models share: packed latents behind the VAE's batch norm, states of three layers of a text encoder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor

from pcpo_fast.errors import UserError
from pcpo_fast.method.schedules import FlowSchedule, Schedule
from pcpo_fast.policies.base import Conditioning
from pcpo_fast.policies.depth import Depth, double_and_single_blocks
from pcpo_fast.policies.lora_names import JOINT_ATTENTION, BlockNames, release_weights
from pcpo_fast.policies.part_checks import about, check_rotary_axes
from pcpo_fast.policies.pipeline_policy import Fit, PipelinePolicy, unpacked, without_batch_norm
from pcpo_fast.policies.weight_files import read_json

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
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
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


class Flux2Policy(PipelinePolicy):
    """A model of FLUX.2; subclasses name the pipeline and read prompts as it does.

    Latents are packed: [B, tokens, channels] with one token per 2 x 2 latent pixels, as the transformer takes them.

    Attributes:
        layers: of the text encoder, whose states the network reads side by side.
    """

    layers: ClassVar[tuple[int, int, int]]
    trained_part: ClassVar[str] = "transformer"
    encoder_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    cell: ClassVar[int] = 2
    schedule_kind: ClassVar[type[Schedule]] = FlowSchedule
    accelerated: ClassVar[tuple[str, ...]] = ("Flux2TransformerBlock", "Flux2SingleTransformerBlock")
    lora_targets: ClassVar[tuple[str, ...]] = (
        *JOINT_ATTENTION,
        "ff.linear_in",
        "ff.linear_out",
        "ff_context.linear_in",
        "ff_context.linear_out",
        "attn.to_qkv_mlp_proj",  # of the single blocks, as the next
        "attn.to_out",
    )
    caption_width: ClassVar[str | None] = "joint_attention_dim"
    fits: ClassVar[tuple[Fit, ...]] = (
        ("joint_attention_dim", 3, "text_encoder", "hidden_size"),
        ("in_channels", 4, "vae", "latent_channels"),
    )

    @classmethod
    def check_network(cls, file: Path, config: Mapping[str, Any]) -> None:
        """The axes of the rotary embeddings make up a head, and the text encoder has the layers that are read."""
        check_rotary_axes(file, config, (32, 32, 32, 32))
        encoder = file.parent.parent / "text_encoder" / "config.json"
        said = read_json(encoder)
        layers = said.get("text_config", said).get("num_hidden_layers")
        if isinstance(layers, int) and layers < cls.layers[-1]:
            raise UserError(
                f"model.path: {encoder} says num_hidden_layers {layers}; the states of layers "
                f"{', '.join(map(str, cls.layers[:-1]))} and {cls.layers[-1]} are read, so it must be at least "
                f"{cls.layers[-1]}"
            )

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
        """States of three of the text encoder's layers, side by side, for each prompt in the chat template.

        Raises:
            UserError: the tokenizer has no chat template.
        """
        self.readers(pipeline)
        # Without its head: nobody reads the logits, which are gigabytes for a batch of prompts.
        pipeline.text_encoder = getattr(pipeline.text_encoder, "model", pipeline.text_encoder)
        states, _ = pipeline.encode_prompt(
            prompts, device=device, max_sequence_length=self.settings.max_sequence_length
        )
        return {"prompt_embeds": states}

    def guidance(self, latents: Tensor) -> Tensor | None:
        """Embedded guidance scale of each row, for a network that has one."""
        return None

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
            guidance=self.guidance(latents),
            return_dict=False,
        )[0]
        return velocity

    def to_pixels(self, latents: Tensor) -> Tensor:
        """The latents without the VAE's batch norm, unpacked."""
        return unpacked(without_batch_norm(self.vae, latents), self.rows, self.columns)

    def schedule(self, steps: int) -> FlowSchedule:
        """The grid of the pipeline's scheduler for this image size, shifted by the pipeline's fit to both."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config)
        with about("scheduler/scheduler_config.json"):
            mu = compute_empirical_mu(self.rows * self.columns, steps)
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        return FlowSchedule(scheduler.sigmas.double())
