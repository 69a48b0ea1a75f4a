"""Stable Diffusion 3 and 3.5 as policies: velocity, classifier-free guidance, two CLIPs and T5."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor

from pcpo_fast.method.schedules import FlowSchedule
from pcpo_fast.policies.base import Conditioning
from pcpo_fast.policies.depth import Depth
from pcpo_fast.policies.lora_names import JOINT_ATTENTION, BlockNames
from pcpo_fast.policies.part_checks import about
from pcpo_fast.policies.pipeline_files import part_classes
from pcpo_fast.policies.pipeline_policy import Fit, PipelinePolicy

# The layers of diffusers' network that are the rows of each weight of the original release, as in diffusers'
# convert_sd3_transformer_checkpoint_to_diffusers.
_JOINT = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}
_REST = {
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
_BLOCKS: BlockNames = {"transformer_blocks": ("joint_blocks", _JOINT)}


class StableDiffusion3Policy(PipelinePolicy):
    """SD3-medium, SD3.5-medium, SD3.5-large, or any other :class:`diffusers.StableDiffusion3Pipeline`.

    Latents are the VAE's, [B, C, h, w]; the transformer patches them itself.
    """

    family: ClassVar[str] = "stable_diffusion_3"
    pipeline_class: ClassVar[Any] = StableDiffusion3Pipeline
    encoder_parts: ClassVar[tuple[str, ...]] = (
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "tokenizer",
        "tokenizer_2",
        "tokenizer_3",
    )
    optional_parts: ClassVar[tuple[str, ...]] = ("text_encoder_3", "tokenizer_3")
    unused_parts: ClassVar[tuple[str, ...]] = ("image_encoder", "feature_extractor")
    repeated_blocks: ClassVar[tuple[str, ...]] = ("JointTransformerBlock",)  # diffusers names none
    accelerated: ClassVar[tuple[str, ...]] = ("JointTransformerBlock",)
    lora_targets: ClassVar[tuple[str, ...]] = JOINT_ATTENTION
    kohya_in_diffusers: ClassVar[bool] = False
    fits: ClassVar[tuple[Fit, ...]] = (
        ("joint_attention_dim", 1, "text_encoder_3", "d_model"),
        ("in_channels", 1, "vae", "latent_channels"),
    )
    dispatches_attention: ClassVar[bool] = False
    release_names: ClassVar[tuple[BlockNames, Mapping[str, str]]] = (_BLOCKS, _REST)

    def __init__(self, network: Any, *others: Any, **places: Any) -> None:
        """As :class:`PipelinePolicy`.

        Raises:
            UserError: VAE and network cannot take the image size, or the image has more places than the network knows.
        """
        super().__init__(network, *others, **places)
        limit = network.config["pos_embed_max_size"]
        if limit is not None:
            self.check_places(limit, limit)

    @classmethod
    def depth(cls, config: Mapping[str, Any]) -> Depth:
        """Blocks with a second attention (SD3.5-medium), then plain ones."""
        dual, total = tuple(config.get("dual_attention_layers") or ()), config["num_layers"]
        if dual != tuple(range(len(dual))) or len(dual) >= total:
            return Depth()

        def blocks(network: Any, counts: tuple[int, ...]) -> dict[str, list[Any]]:
            found = list(network.transformer_blocks)
            return {"dual": found[: counts[0]], "plain": found[counts[0] :]}

        return Depth(
            (len(dual), total - len(dual)),
            configure=lambda counts: {"num_layers": sum(counts), "dual_attention_layers": list(range(counts[0]))},
            blocks=blocks,
        )

    def encode_with(self, pipeline: Any, prompts: list[str], device: torch.device) -> Conditioning:
        """States of both CLIPs and of T5 in one sequence, and the CLIPs' pooled states."""
        if pipeline.text_encoder_3 is None:
            pipeline.transformer = self.network  # asked for the width of the zeros that stand for T5
        states, _, pooled, _ = pipeline.encode_prompt(
            prompts,
            prompt_2=prompts,
            prompt_3=prompts,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.settings.max_sequence_length,
        )
        return {"prompt_embeds": states, "pooled_prompt_embeds": pooled}

    def conditioning_shapes(self, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        """The states of CLIP and, with zeros for a pipeline without it, of T5 in one sequence; the pooled states."""
        config = self.network.config
        return {
            "prompt_embeds": (clip_tokens + self.settings.max_sequence_length, config["joint_attention_dim"]),
            "pooled_prompt_embeds": (config["pooled_projection_dim"],),
        }

    def readers(self, pipeline: Any) -> list[tuple[Any, int, str]]:
        """T5, where the pipeline has it, reads more words than CLIP."""
        clip, found = pipeline.tokenizer, []
        if self.folder is not None and part_classes(self.folder)["text_encoder_3"] is not None:
            found = [(pipeline.tokenizer_3, self.settings.max_sequence_length, "T5 reads (model.max_sequence_length)")]
        return [*found, (clip, clip.model_max_length, "CLIP reads")]

    def run_network(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity for a batch whose rows may be at different times."""
        velocity: Tensor = self.forward_module(
            hidden_states=latents,
            timestep=times * self.scheduler.config["num_train_timesteps"],
            encoder_hidden_states=conditioning["prompt_embeds"],
            pooled_projections=conditioning["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
        return velocity

    def schedule(self, steps: int) -> FlowSchedule:
        """The grid of the pipeline's scheduler for this image size (static or resolution-dependent shift)."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config)
        get, mu = scheduler.config.get, None
        with about("scheduler/scheduler_config.json"):
            if get("use_dynamic_shifting"):
                mu = calculate_shift(
                    self.rows * self.columns,
                    get("base_image_seq_len", 256),
                    get("max_image_seq_len", 4096),
                    get("base_shift", 0.5),
                    get("max_shift", 1.16),
                )
            scheduler.set_timesteps(steps, mu=mu)
        return FlowSchedule(scheduler.sigmas.double())
