"""FLUX.3 as a policy: text and image apart, then together; states of eight of Qwen3-VL's layers, in windows of 80."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux3ModularPipeline
from diffusers.models.transformers.transformer_flux3 import Flux3AttnProcessor
from diffusers.modular_pipelines.flux3.before_denoise import Flux3PrepareLatentsStep
from diffusers.modular_pipelines.flux3.encoders import Flux3TextEncoderStep
from torch import Tensor
from torch.nn.functional import pad, silu
from transformers import Qwen2TokenizerFast

from pcpo_fast.config.schema import ModelConfig
from pcpo_fast.errors import UserError
from pcpo_fast.method.schedules import FlowSchedule, Schedule
from pcpo_fast.policies.base import Conditioning
from pcpo_fast.policies.depth import Depth
from pcpo_fast.policies.embedding_cache import Encoded
from pcpo_fast.policies.lora_names import BlockNames, release_weights
from pcpo_fast.policies.modular import ModularPolicy
from pcpo_fast.policies.part_checks import about, check_rotary_axes
from pcpo_fast.policies.pipeline_policy import Fit, unpacked, with_masks, without_batch_norm
from pcpo_fast.policies.speed import run_block
from pcpo_fast.policies.truncation import template_tokens
from pcpo_fast.policies.weight_files import read_json

WINDOW = Flux3TextEncoderStep().pad_multiple
"""A prompt is padded to a multiple of this many tokens; the network sees the padding."""
LAST_STATES = 32
"""The last of the text encoder's layers whose states the network reads (4, 8, ... 32)."""
PLACE_SCALE = Flux3PrepareLatentsStep().image_rope_scale
"""Distance of neighbouring image tokens in the rotary embeddings."""

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


class Flux3Policy(ModularPolicy):
    """FLUX.3: any :class:`diffusers.Flux3ModularPipeline` whose network is not distilled, without reference images.

    Latents are packed: [B, tokens, channels] with one token per 2 x 2 latent pixels, as the transformer takes them.
    Prompts are encoded as they are; diffusers' pipeline first has another model write them out, unless that step is
    removed.
    """

    family: ClassVar[str] = "flux3"
    pipeline_class: ClassVar[Any] = Flux3ModularPipeline
    trained_part: ClassVar[str] = "transformer"
    encoder_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    also_named: ClassVar[Mapping[str, tuple[str, ...]]] = {"tokenizer": ("AutoProcessor", "Qwen3VLProcessor")}
    cell: ClassVar[int] = 2
    schedule_kind: ClassVar[type[Schedule]] = FlowSchedule
    lora_targets: ClassVar[tuple[str, ...]] = tuple(layer for (layer,) in _BLOCK.values())
    idle_layers: ClassVar[tuple[str, ...]] = (".image_cond.",)
    kohya_in_diffusers: ClassVar[bool] = False
    fits: ClassVar[tuple[Fit, ...]] = (
        ("joint_attention_dim", 8, "text_encoder", "hidden_size"),
        ("in_channels", 4, "vae", "latent_channels"),
    )
    masks_prompts: ClassVar[bool] = True
    caption_width: ClassVar[str | None] = "joint_attention_dim"

    def __init__(self, network: Any, *others: Any, **places: Any) -> None:
        """As :class:`PipelinePolicy`; the network gets a forward for prompts whose windows differ."""
        super().__init__(network, *others, **places)
        network.set_attn_processor(WindowProcessor())
        network.forward = MethodType(forward_batch, network)

    @classmethod
    def part_kinds(cls) -> dict[str, Any]:
        """Of the processor only the tokenizer is needed, and loads without torchvision."""
        return super().part_kinds() | {"tokenizer": Qwen2TokenizerFast}

    @classmethod
    def check_network(cls, file: Path, config: Mapping[str, Any]) -> None:
        """The axes of the rotary embeddings make up a head, the encoder has all layers, and nothing is distilled."""
        check_rotary_axes(file, config, (32, 32, 32, 32))
        if config.get("flow_map"):
            raise UserError(
                f"model.path: {file} says flow_map true: a distilled FLUX.3 predicts jumps from one time to another, "
                "not the velocity at a time that the samplers need for adding noise: train the base model"
            )
        encoder = file.parent.parent / "text_encoder" / "config.json"
        layers = read_json(encoder).get("text_config", {}).get("num_hidden_layers")
        if isinstance(layers, int) and layers < LAST_STATES:
            raise UserError(
                f"model.path: {encoder} says num_hidden_layers {layers}; the states of every fourth layer up to "
                f"{LAST_STATES} are read, so it must be at least {LAST_STATES}"
            )

    @classmethod
    def check_settings(cls, folder: Path, settings: ModelConfig) -> None:
        """A guider in the folder must be the plain one, which pipelines have that name none."""
        super().check_settings(folder, settings)
        file = folder / "guider" / "guider_config.json"
        if settings.cfg_scale == 1 or not file.is_file():
            return
        plain = {"_class_name": "ClassifierFreeGuidance", "guidance_rescale": 0.0, "start": 0.0, "stop": 1.0}
        for name, value in plain.items():
            found = read_json(file).get(name, value)
            if found != value:
                raise UserError(
                    f"model.cfg_scale: {file} says {name} {found}, and guidance here is that of {name} {value}: set "
                    "model.cfg_scale to 1, or change the file"
                )

    @classmethod
    def release_weights(cls, layers: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Black Forest Labs' names."""
        return release_weights(_BLOCKS, _REST, layers)

    @classmethod
    def depth(cls, config: Mapping[str, Any]) -> Depth:
        """Blocks for text or image alone, then blocks for both."""
        return Depth(
            (config["num_layers"], config["num_single_layers"]),
            configure=lambda counts: {"num_layers": counts[0], "num_single_layers": counts[1]},
            blocks=lambda network, counts: {
                "mode": [*network.txt_mode_blocks, *network.mode_blocks["image"]],
                "single": list(network.single_transformer_blocks),
            },
        )

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(tokens, channels) of one image."""
        return self.rows * self.columns, int(self.network.config["in_channels"])

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
        tokenizer, limit = pipeline.tokenizer, self.settings.max_sequence_length
        template_tokens(tokenizer, self.folder)
        processor = SimpleNamespace(tokenizer=tokenizer, apply_chat_template=tokenizer.apply_chat_template)
        # Without its head, whose logits nobody reads.
        encoder = getattr(pipeline.text_encoder, "model", pipeline.text_encoder)
        encode = Flux3TextEncoderStep._get_qwen3_vl_prompt_embeds
        rows = [encode(encoder, processor, prompt, device, limit, WINDOW)[0] for prompt in prompts]
        return with_masks(rows)

    def readers(self, pipeline: Any) -> list[tuple[Any, int, str]]:
        """Qwen3-VL, which reads the chat template around a prompt as well."""
        limit = self.settings.max_sequence_length - template_tokens(pipeline.tokenizer, self.folder)
        return [(pipeline.tokenizer, limit, "Qwen3-VL reads within its chat template (model.max_sequence_length)")]

    def run_network(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity for a batch whose rows may be at different times and have prompts of different windows."""
        states = conditioning["prompt_embeds"]
        one, text, rows, columns = (
            torch.arange(count, dtype=torch.float32, device=latents.device)
            for count in (1, states.shape[1], self.rows, self.columns)
        )
        velocity: Tensor = self.forward_module(
            hidden_states=latents,
            timestep=times,
            encoder_hidden_states=states,
            encoder_hidden_states_mask=conditioning["prompt_mask"] > 0,
            img_ids=torch.cartesian_prod(one, PLACE_SCALE * rows, PLACE_SCALE * columns, one),
            txt_ids=torch.cartesian_prod(one, one, one, text),  # time, row, column, place in the text
        )[0]
        return velocity

    def to_pixels(self, latents: Tensor) -> Tensor:
        """The latents without the VAE's batch norm, unpacked."""
        return unpacked(without_batch_norm(self.vae, latents), self.rows, self.columns)

    def schedule(self, steps: int) -> FlowSchedule:
        """The grid of the pipeline's scheduler, whose shift is the same for all sizes."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config)
        with about("scheduler/scheduler_config.json"):
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
        return FlowSchedule(scheduler.sigmas.double())


class WindowProcessor(Flux3AttnProcessor):
    """diffusers' attention, with a mask that comes beside the rotary embeddings: its blocks take none."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor, Tensor | None] | None = None,
    ) -> Tensor:
        """As diffusers'; ``image_rotary_emb`` is (cosines, sines, mask)."""
        assert image_rotary_emb is not None
        *places, seen = image_rotary_emb
        states: Tensor = super().__call__(attn, hidden_states, seen, tuple(places))
        return states


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
