"""Krea 2 as a policy: packed latents, states of many layers of Qwen3-VL, which the network itself fuses."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import Krea2Pipeline
from torch import Tensor
from transformers import Qwen2TokenizerFast

from pcpo_fast.config.schema import ModelConfig
from pcpo_fast.errors import UserError
from pcpo_fast.files.content import INDEX
from pcpo_fast.method.schedules import FlowSchedule
from pcpo_fast.policies.base import Conditioning
from pcpo_fast.policies.embedding_cache import Encoded
from pcpo_fast.policies.flow_grids import scheduler_times, shifted_schedule
from pcpo_fast.policies.lora_names import BlockNames
from pcpo_fast.policies.part_checks import check_encoder_depth, check_rotary_axes
from pcpo_fast.policies.pipeline_policy import Fit, check_distillation, is_distilled, with_masks
from pcpo_fast.policies.qwen_vae import QwenVaePolicy
from pcpo_fast.policies.weight_files import read_json

# The names of the original release, as in diffusers' convert_krea2_transformer_checkpoint_to_diffusers.
_BLOCK = {
    "attn.wq": ("attn.to_q",),
    "attn.wk": ("attn.to_k",),
    "attn.wv": ("attn.to_v",),
    "attn.wo": ("attn.to_out.0",),
    "attn.gate": ("attn.to_gate",),
    "mlp.gate": ("ff.gate",),
    "mlp.up": ("ff.up",),
    "mlp.down": ("ff.down",),
}
_BLOCKS: BlockNames = {"transformer_blocks": ("blocks", _BLOCK)} | {
    f"text_fusion.{name}": (f"txtfusion.{name}", _BLOCK) for name in ("layerwise_blocks", "refiner_blocks")
}
_REST = {
    "first": "img_in",
    "tmlp.0": "time_embed.linear_1",
    "tmlp.2": "time_embed.linear_2",
    "tproj.1": "time_mod_proj",
    "txtmlp.1": "txt_in.linear_1",
    "txtmlp.3": "txt_in.linear_2",
    "txtfusion.projector": "text_fusion.projector",
    "last.linear": "final_layer.linear",
}
PUBLISHED_LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)
"""The layers of the text encoder that are read if the index names none."""
TOKENS_AFTER = 5
"""What the pipeline's template has after a prompt."""


class Krea2Policy(QwenVaePolicy):
    """Krea 2 Raw and Turbo: any :class:`diffusers.Krea2Pipeline`."""

    family: ClassVar[str] = "krea2"
    pipeline_class: ClassVar[Any] = Krea2Pipeline
    lora_targets: ClassVar[tuple[str, ...]] = tuple(layer for (layer,) in _BLOCK.values())
    kohya_in_diffusers: ClassVar[bool] = False
    other_kinds: ClassVar[dict[str, Any]] = {"tokenizer": Qwen2TokenizerFast}  # the pipeline would take any
    # Those that fuse the caption's states before the others are few, and stay.
    block_lists: ClassVar[Mapping[str, tuple[str, ...]]] = {"single": ("num_layers", "transformer_blocks")}
    release_names: ClassVar[tuple[BlockNames, Mapping[str, str]]] = (_BLOCKS, _REST)
    fits: ClassVar[tuple[Fit, ...]] = (
        ("text_hidden_dim", 1, "text_encoder", "hidden_size"),
        ("in_channels", 4, "vae", "z_dim"),
    )
    masks_prompts: ClassVar[bool] = True
    guidance_offset: ClassVar[float] = 1.0

    @classmethod
    def check_network(cls, file: Path, config: Mapping[str, Any]) -> None:
        """The axes of the rotary embeddings make up a head, and the text encoder has the layers that are read."""
        check_rotary_axes(file, config, (32, 48, 48))
        index = file.parent.parent / INDEX
        said = read_json(index)
        layers, count = said.get("text_encoder_select_layers") or PUBLISHED_LAYERS, config.get("num_text_layers", 12)
        if len(layers) != count:
            raise UserError(
                f"model.path: {index} says text_encoder_select_layers {list(layers)}, but {file} has num_text_layers "
                f"{count}: they must be as many"
            )
        check_encoder_depth(index.parent / "text_encoder", sorted(layers), f" (text_encoder_select_layers in {index})")
        if said.get("patch_size", 2) != 2:
            raise UserError(f"model.path: {index} says patch_size {said['patch_size']}, which must be 2")

    @classmethod
    def check_settings(cls, folder: Path, settings: ModelConfig) -> None:
        """Turbo has no classifier-free guidance, and a word about training it is due."""
        super().check_settings(folder, settings)
        check_distillation(folder, settings)

    def encode_with(self, pipeline: Any, prompts: list[str], device: torch.device) -> Encoded:
        """States [tokens, layers, width] for each prompt in the pipeline's template, without what precedes it and
        padding, which the template has in the middle: captions have no order for the network.
        """
        states, mask = pipeline.encode_prompt(
            prompts, device=device, max_sequence_length=self.settings.max_sequence_length
        )
        return with_masks([row[kept] for row, kept in zip(states, mask, strict=True)])

    def conditioning_shapes(self, clip_tokens: int) -> dict[str, tuple[int, ...]]:
        """The longest prompt that is not cut, with the states of all layers, and its mask."""
        config, tokens = self.network.config, self.settings.max_sequence_length
        return {
            "prompt_embeds": (tokens, config["num_text_layers"], config["text_hidden_dim"]),
            "prompt_mask": (tokens,),
        }

    def readers(self, pipeline: Any) -> list[tuple[Any, int, str]]:
        """Qwen3-VL, which reads what the template has after a prompt as well."""
        limit = self.settings.max_sequence_length - TOKENS_AFTER
        return [(pipeline.tokenizer, limit, "Qwen3-VL reads within its template (model.max_sequence_length)")]

    def run_network(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity for a batch whose rows may be at different times."""
        device, states = latents.device, conditioning["prompt_embeds"]
        rows, columns = torch.arange(self.rows, device=device), torch.arange(self.columns, device=device)
        image = torch.cartesian_prod(torch.zeros_like(rows[:1]), rows, columns)
        velocity: Tensor = self.forward_module(
            hidden_states=latents,
            encoder_hidden_states=states,
            timestep=times.to(latents.dtype),  # with the rounding of the pipeline
            position_ids=torch.cat((image.new_zeros(states.shape[1], 3), image)),
            encoder_attention_mask=conditioning["prompt_mask"] > 0,
            return_dict=False,
        )[0]
        return velocity

    def schedule(self, steps: int) -> FlowSchedule:
        """The grid of the pipeline's scheduler for this image size; Turbo's is the same for all sizes."""
        if self.folder is not None and is_distilled(self.folder):
            return scheduler_times(self.scheduler.config, steps, 1.15)
        return shifted_schedule(self.scheduler.config, self.rows * self.columns, steps)
