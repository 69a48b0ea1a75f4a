"""FLUX.3 as a policy: text and image apart, then together; states of eight of Qwen3-VL's layers, in windows of 80."""

from collections.abc import Mapping
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers import Flux3ModularPipeline
from diffusers.models.transformers.transformer_flux3 import Flux3AttnProcessor
from diffusers.modular_pipelines.flux3.before_denoise import Flux3PrepareLatentsStep
from diffusers.modular_pipelines.flux3.encoders import Flux3TextEncoderStep
from torch import Tensor
from torch.nn.functional import pad, silu
from transformers import Qwen2TokenizerFast

from pcpo_fast.config.schema import ModelConfig
from pcpo_fast.errors import UserError
from pcpo_fast.method.schedules import FlowSchedule
from pcpo_fast.policies.base import Conditioning
from pcpo_fast.policies.embedding_cache import Encoded
from pcpo_fast.policies.flow_grids import scheduler_times
from pcpo_fast.policies.flux2_vae import Flux2VaePolicy
from pcpo_fast.policies.lora_names import BlockNames
from pcpo_fast.policies.modular import ModularPolicy
from pcpo_fast.policies.pipeline_policy import Fit, with_masks
from pcpo_fast.policies.speed import run_block
from pcpo_fast.policies.weight_files import read_json

WINDOW = Flux3TextEncoderStep().pad_multiple
"""A prompt is padded to a multiple of this many tokens; the network sees the padding."""

# The layers of diffusers' network as the original release names them, as in diffusers'
# convert_flux3_transformer_checkpoint_to_diffusers.
_BLOCK = {
    "q_proj": ("attn.to_q",),
    "k_proj": ("attn.to_k",),
    "v_proj": ("attn.to_v",),
    "attn_out": ("attn.to_out.0",),
    "mlp_in": ("ff.linear_in",),
    "mlp_out": ("ff.linear_out",),
}
_MODES = ("image", "image_cond")
_BLOCKS: BlockNames = {
    **{f"mode_blocks.{mode}": (f"content_mode_blocks.{mode}", _BLOCK) for mode in _MODES},
    "txt_mode_blocks": ("txt_mode_blocks", _BLOCK),
    "single_transformer_blocks": ("single_blocks", _BLOCK),
}
_REST = {
    "txt_in": "context_embedder",
    "time_in.in_layer": "timestep_embedder.linear_1",
    "time_in.out_layer": "timestep_embedder.linear_2",
    "final_layer.image.adaLN_modulation.1": "norm_out.linear",
    "final_layer.image.linear": "proj_out",
    **{f"emb_in.{mode}": f"x_embedders.{mode}" for mode in _MODES},
    **{
        f"{stream}_stream_modulations.{mode}.lin": f"{stream}_stream_modulations.{mode}.linear"
        for stream in ("early", "single")
        for mode in (*_MODES, "txt")
    },
}


class Flux3Policy(ModularPolicy, Flux2VaePolicy):
    """FLUX.3: any :class:`diffusers.Flux3ModularPipeline` whose network is not distilled, without reference images.

    Prompts are encoded as they are; diffusers' pipeline first has another model write them out, unless that step is
    removed.
    """

    family: ClassVar[str] = "flux3"
    pipeline_class: ClassVar[Any] = Flux3ModularPipeline
    also_named: ClassVar[Mapping[str, tuple[str, ...]]] = {"tokenizer": ("AutoProcessor", "Qwen3VLProcessor")}
    other_kinds: ClassVar[dict[str, Any]] = {"tokenizer": Qwen2TokenizerFast}  # loads without torchvision
    layers: ClassVar[tuple[int, ...]] = (4, 8, 12, 16, 20, 24, 28, 32)
    place_scale: ClassVar[float] = Flux3PrepareLatentsStep().image_rope_scale
    lora_targets: ClassVar[tuple[str, ...]] = tuple(layer for (layer,) in _BLOCK.values())
    idle_layers: ClassVar[tuple[str, ...]] = (".image_cond.",)
    kohya_in_diffusers: ClassVar[bool] = False
    fits: ClassVar[tuple[Fit, ...]] = (
        ("joint_attention_dim", 8, "text_encoder", "hidden_size"),
        ("in_channels", 4, "vae", "latent_channels"),
    )
    block_lists: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "mode": ("num_layers", "txt_mode_blocks", "mode_blocks.image"),
        "single": ("num_single_layers", "single_transformer_blocks"),
    }
    release_names: ClassVar[tuple[BlockNames, Mapping[str, str]]] = (_BLOCKS, _REST)
    masks_prompts: ClassVar[bool] = True

    def __init__(self, network: Any, *others: Any, **places: Any) -> None:
        """As :class:`PipelinePolicy`; the network gets a forward for prompts whose windows differ."""
        super().__init__(network, *others, **places)
        network.set_attn_processor(WindowProcessor())
        network.forward = MethodType(forward_batch, network)

    @classmethod
    def check_network(cls, file: Path, config: Mapping[str, Any]) -> None:
        """As for FLUX.2, and the network is not distilled."""
        super().check_network(file, config)
        if config.get("flow_map"):
            raise UserError(
                f"model.path: {file} says flow_map true: a distilled FLUX.3 predicts jumps from one time to another, "
                "not the velocity at a time that the samplers need for adding noise: train the base model"
            )

    @classmethod
    def check_settings(cls, folder: Path, settings: ModelConfig) -> None:
        """A guider in the folder must be the plain one, which pipelines have that name none."""
        super().check_settings(folder, settings)
        file = folder / "guider" / "guider_config.json"
        said = read_json(file) if settings.cfg_scale != 1 and file.is_file() else {}
        plain = {"_class_name": "ClassifierFreeGuidance", "guidance_rescale": 0.0, "start": 0.0, "stop": 1.0}
        for name, value in plain.items():
            if said.get(name, value) != value:
                raise UserError(
                    f"model.cfg_scale: {file} says {name} {said[name]}, and guidance here is that of {name} {value}: "
                    "set model.cfg_scale to 1, or change the file"
                )

    @classmethod
    def _load_part(cls, folder: Path, name: str, kind: Any, settings: ModelConfig) -> Any:
        part, template = super()._load_part(folder, name, kind, settings), folder / name / "chat_template.json"
        if name == "tokenizer" and template.is_file():  # a processor prefers it to that of its tokenizer
            part.chat_template = read_json(template).get("chat_template")
        return part

    def encode_with(self, pipeline: Any, prompts: list[str], device: torch.device) -> Encoded:
        """States of eight of Qwen3-VL's layers, side by side, for each prompt in the chat template and its window.

        Raises:
            UserError: the tokenizer has no chat template.
        """
        self.readers(pipeline)
        tokenizer, limit = pipeline.tokenizer, self.settings.max_sequence_length
        processor = SimpleNamespace(tokenizer=tokenizer, apply_chat_template=tokenizer.apply_chat_template)
        # Without its head, whose logits nobody reads.
        encoder = getattr(pipeline.text_encoder, "model", pipeline.text_encoder)
        encode = Flux3TextEncoderStep._get_qwen3_vl_prompt_embeds
        rows = [encode(encoder, processor, prompt, device, limit, WINDOW)[0] for prompt in prompts]
        return with_masks(rows)

    def readers(self, pipeline: Any) -> list[tuple[Any, int, str]]:
        """Qwen3-VL, which reads the chat template around a prompt as well."""
        return [self.within_template(pipeline.tokenizer, "Qwen3-VL")]

    def run_network(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity for a batch whose rows may be at different times and have prompts of different windows."""
        states = conditioning["prompt_embeds"]
        velocity: Tensor = self.forward_module(
            hidden_states=latents,
            timestep=times,
            encoder_hidden_states=states,
            encoder_hidden_states_mask=conditioning["prompt_mask"] > 0,
            **self.places(states),
        )[0]
        return velocity

    def schedule(self, steps: int) -> FlowSchedule:
        """The grid of the pipeline's scheduler, whose shift is the same for all sizes."""
        return scheduler_times(self.scheduler.config, steps)


class WindowProcessor(Flux3AttnProcessor):
    """diffusers' attention, with a mask that comes beside the rotary embeddings: its blocks take none."""

    def __call__(self, attn: Any, hidden_states: Tensor, _: None = None, places: Any = None) -> Any:
        """As diffusers'; ``places`` is (cosines, sines, mask)."""
        cosines, sines, seen = places
        return super().__call__(attn, hidden_states, seen, (cosines, sines))


def forward_batch(
    network: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor,
    img_ids: Tensor,
    txt_ids: Tensor,
) -> tuple[Tensor]:
    """The forward of diffusers' network, which takes prompts of one window, for prompts of any.

    Modulation is computed once per row instead of once per token: a row's tokens of a kind are at the same time.

    Args:
        network: a :class:`diffusers.Flux3Transformer2DModel`.
        hidden_states: packed latents [B, tokens, channels].
        timestep: [B], 1 noise to 0 image.
        encoder_hidden_states: captions [B, L, width].
        encoder_hidden_states_mask: bool [B, L], true within a caption's window.
        img_ids, txt_ids: places [tokens, 4] and [L, 4].

    Returns:
        The velocity, [B, tokens, channels].
    """
    dtype = hidden_states.dtype
    now, zero = (
        network.timestep_embedder(network.time_proj(times).to(dtype)).unsqueeze(1)
        for times in (timestep.to(dtype) * 1000, timestep.new_zeros(1, dtype=dtype))
    )
    early, single = (
        {"image": modulations["image"](silu(now)), "txt": modulations["txt"](silu(zero))}
        for modulations in (network.early_stream_modulations, network.single_stream_modulations)
    )
    text_places, image_places = network.pos_embed(txt_ids), network.pos_embed(img_ids)
    # No prompt has less than one window, unless all are cut.
    seen = encoder_hidden_states_mask[:, None, None] if encoder_hidden_states.shape[1] > WINDOW else None

    caption = network.context_embedder(encoder_hidden_states)
    for block in network.txt_mode_blocks:
        caption = run_block(network, block, caption, early["txt"], (*text_places, seen))
    image = network.x_embedders["image"](hidden_states)
    for block in network.mode_blocks["image"]:
        image = run_block(network, block, image, early["image"], (*image_places, None))

    places = [torch.cat(both) for both in zip(text_places, image_places, strict=True)]
    if seen is not None:
        seen = pad(seen, (0, image.shape[1]), value=True)
    for block in network.single_transformer_blocks:
        caption, image = run_block(network, block, image, caption, single["image"], single["txt"], (*places, seen))
    return (network.proj_out(network.norm_out(image, now)),)
