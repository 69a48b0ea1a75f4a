"""Forwards of diffusers' transformer blocks and norms that use the fused ops for the elementwise operations.

Each has the signature and the result of the method that it replaces (diffusers 0.42). Layers with weights are called as
modules, so that LoRA and hooks (ZeRO-3, offloading) keep working.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pcpo_kernels.ops.adaptive_norm import gated_residual, gated_residual_norm, modulated_norm
from pcpo_kernels.ops.swiglu import swiglu

LARGEST_HALF = 65504.0


def _clip_half(hidden: Tensor) -> Tensor:
    """Clip fp16 to its finite range, as diffusers does."""
    return hidden.clip(-LARGEST_HALF, LARGEST_HALF) if hidden.dtype == torch.float16 else hidden


def ada_layer_norm_zero(
    self: Any,
    x: Tensor,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    hidden_dtype: torch.dtype | None = None,
    emb: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """``AdaLayerNormZero``: the normalized tokens, and the modulation for the rest of the block."""
    if self.emb is not None:
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.linear(self.silu(emb)).chunk(6, dim=1)
    return modulated_norm(x, shift, scale, self.norm.eps), gate, shift_mlp, scale_mlp, gate_mlp


def ada_layer_norm_zero_single(self: Any, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``AdaLayerNormZeroSingle``."""
    shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
    return modulated_norm(x, shift, scale, self.norm.eps), gate


def sd35_ada_layer_norm_zero_x(self: Any, hidden_states: Tensor, emb: Tensor | None = None) -> tuple[Tensor, ...]:
    """``SD35AdaLayerNormZeroX``: two modulations of one norm, which is computed twice instead of being stored."""
    rows = self.linear(self.silu(emb)).chunk(9, dim=1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, shift2, scale2, gate2 = rows
    first, second = (modulated_norm(hidden_states, *pair, self.norm.eps) for pair in ((shift, scale), (shift2, scale2)))
    return first, gate, shift_mlp, scale_mlp, gate_mlp, second, gate2


def flux_double_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """``FluxTransformerBlock``: text and image with separate weights."""
    normed, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(hidden_states, emb=temb)
    text_normed, text_gate, text_shift, text_scale, text_gate_mlp = self.norm1_context(encoder_hidden_states, emb=temb)
    image, text, *adapter = self.attn(
        hidden_states=normed,
        encoder_hidden_states=text_normed,
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    hidden_states = _with_mlp(hidden_states, image, gate, shift_mlp, scale_mlp, gate_mlp, self.norm2, self.ff)
    for output in adapter:  # of an IP adapter
        hidden_states = hidden_states + output
    encoder_hidden_states = _with_mlp(
        encoder_hidden_states,
        text,
        text_gate,
        text_shift,
        text_scale,
        text_gate_mlp,
        self.norm2_context,
        self.ff_context,
    )
    return _clip_half(encoder_hidden_states), hidden_states


def flux_single_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """``FluxSingleTransformerBlock``: text and image as one sequence."""
    text_tokens = encoder_hidden_states.shape[1]
    residual = torch.cat((encoder_hidden_states, hidden_states), dim=1)
    normed, gate = self.norm(residual, emb=temb)
    mlp = self.act_mlp(self.proj_mlp(normed))
    attention = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    branch = self.proj_out(torch.cat((attention, mlp), dim=2))
    hidden_states = _clip_half(gated_residual(residual, branch, gate))
    return hidden_states[:, :text_tokens], hidden_states[:, text_tokens:]


def flux2_swiglu(self: Any, x: Tensor) -> Tensor:
    """``Flux2SwiGLU``."""
    return swiglu(x)


def flux2_double_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb_mod_img: Tensor,
    temb_mod_txt: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Any:
    """``Flux2TransformerBlock``: text and image with separate weights, and a modulation that all blocks share."""
    if not _per_image(hidden_states, temb_mod_img, temb_mod_txt):
        return type(self).forward(
            self,
            hidden_states,
            encoder_hidden_states,
            temb_mod_img,
            temb_mod_txt,
            image_rotary_emb,
            joint_attention_kwargs,
        )
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = temb_mod_img.chunk(6, dim=1)
    text_shift, text_scale, text_gate, text_shift_mlp, text_scale_mlp, text_gate_mlp = temb_mod_txt.chunk(6, dim=1)
    image, text = self.attn(
        hidden_states=modulated_norm(hidden_states, shift, scale, self.norm1.eps),
        encoder_hidden_states=modulated_norm(encoder_hidden_states, text_shift, text_scale, self.norm1_context.eps),
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    hidden_states = _with_mlp(hidden_states, image, gate, shift_mlp, scale_mlp, gate_mlp, self.norm2, self.ff)
    encoder_hidden_states = _with_mlp(
        encoder_hidden_states,
        text,
        text_gate,
        text_shift_mlp,
        text_scale_mlp,
        text_gate_mlp,
        self.norm2_context,
        self.ff_context,
    )
    return _clip_half(encoder_hidden_states), hidden_states


def flux2_single_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    temb_mod: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    split_hidden_states: bool = False,
    text_seq_len: int | None = None,
) -> Any:
    """``Flux2SingleTransformerBlock``: attention and MLP side by side over text and image as one sequence."""
    if not _per_image(hidden_states, temb_mod):
        return type(self).forward(
            self,
            hidden_states,
            encoder_hidden_states,
            temb_mod,
            image_rotary_emb,
            joint_attention_kwargs,
            split_hidden_states,
            text_seq_len,
        )
    if encoder_hidden_states is not None:
        text_seq_len = encoder_hidden_states.shape[1]
        hidden_states = torch.cat((encoder_hidden_states, hidden_states), dim=1)
    shift, scale, gate = temb_mod.chunk(3, dim=1)
    branch = self.attn(
        hidden_states=modulated_norm(hidden_states, shift, scale, self.norm.eps),
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    hidden_states = _clip_half(gated_residual(hidden_states, branch, gate))
    return (hidden_states[:, :text_seq_len], hidden_states[:, text_seq_len:]) if split_hidden_states else hidden_states


def _per_image(tokens: Tensor, *modulations: Tensor) -> bool:
    """Whether there is a row of modulation per image. With reference images there is one per token."""
    return all(rows.dim() == 2 and len(rows) == len(tokens) for rows in modulations)


def joint_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor | None, Tensor]:
    """``JointTransformerBlock`` of Stable Diffusion 3 and 3.5; the last block drops the text."""
    named = joint_attention_kwargs or {}
    normed, gate, shift_mlp, scale_mlp, gate_mlp, *dual = self.norm1(hidden_states, emb=temb)
    if self.context_pre_only:
        text_normed = self.norm1_context(encoder_hidden_states, temb)
    else:
        text_normed, text_gate, text_shift, text_scale, text_gate_mlp = self.norm1_context(
            encoder_hidden_states, emb=temb
        )
    branch, text = self.attn(hidden_states=normed, encoder_hidden_states=text_normed, **named)
    if self.use_dual_attention:
        normed2, gate2 = dual
        hidden_states = gated_residual(hidden_states, branch, gate)
        branch, gate = self.attn2(hidden_states=normed2, **named), gate2
    mlp = partial(_feed_forward, self, self.ff)
    hidden_states = _with_mlp(hidden_states, branch, gate, shift_mlp, scale_mlp, gate_mlp, self.norm2, mlp)
    if self.context_pre_only:
        return None, hidden_states
    mlp = partial(_feed_forward, self, self.ff_context)
    encoder_hidden_states = _with_mlp(
        encoder_hidden_states, text, text_gate, text_shift, text_scale, text_gate_mlp, self.norm2_context, mlp
    )
    return encoder_hidden_states, hidden_states


def _with_mlp(
    tokens: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    gate_mlp: Tensor,
    norm: Any,
    mlp: Callable[[Tensor], Tensor],
) -> Tensor:
    """A stream's tokens after its gated attention ``branch`` and its gated MLP, the second half of a double block."""
    tokens, normed = gated_residual_norm(tokens, branch, gate, shift, scale, norm.eps)
    return gated_residual(tokens, mlp(normed), gate_mlp)


def _feed_forward(block: Any, layer: Any, normed: Tensor) -> Tensor:
    """The feed-forward layer, in chunks if the block is set up for that."""
    if block._chunk_size is None:
        result: Tensor = layer(normed)
    else:
        chunked = sys.modules[type(block).__module__]._chunked_feed_forward
        result = chunked(layer, normed, block._chunk_dim, block._chunk_size)
    return result
