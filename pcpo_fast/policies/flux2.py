"""What FLUX.2's models share: double and single blocks, states of three layers of a text encoder."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor

from pcpo_fast.method.schedules import FlowSchedule
from pcpo_fast.policies.base import Conditioning
from pcpo_fast.policies.depth import DOUBLE_AND_SINGLE
from pcpo_fast.policies.flow_grids import scheduler_times
from pcpo_fast.policies.flux2_vae import Flux2VaePolicy
from pcpo_fast.policies.lora_names import JOINT_ATTENTION, BlockNames
from pcpo_fast.policies.pipeline_policy import Fit

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


class Flux2Policy(Flux2VaePolicy):
    """A model of FLUX.2; subclasses name the pipeline and read prompts as it does."""

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
    fits: ClassVar[tuple[Fit, ...]] = (
        ("joint_attention_dim", 3, "text_encoder", "hidden_size"),
        ("in_channels", 4, "vae", "latent_channels"),
    )
    block_lists: ClassVar[Mapping[str, tuple[str, ...]]] = DOUBLE_AND_SINGLE
    release_names: ClassVar[tuple[BlockNames, Mapping[str, str]]] = (_BLOCKS, _REST)

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
        states = conditioning["prompt_embeds"]
        velocity: Tensor = self.forward_module(
            hidden_states=latents,
            encoder_hidden_states=states,
            timestep=times,
            guidance=self.guidance(latents),
            return_dict=False,
            **self.places(states),
        )[0]
        return velocity

    def schedule(self, steps: int) -> FlowSchedule:
        """The grid of the pipeline's scheduler for this image size, shifted by the pipeline's fit to both."""
        return scheduler_times(self.scheduler.config, steps, compute_empirical_mu(self.rows * self.columns, steps))
