"""Attention processors for FLUX, FLUX.2 and Stable Diffusion 3 that fuse norm, rotation and concatenation of heads."""

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pcpo_kernels.ops.rotary import norm_rope


def head_norm(
    self: Any,
    x: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    following: tuple[Any, Tensor] | None = None,
    before: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    """Forward of the heads' RMS norm, fused with rotation and with a second sequence that another module normalizes.

    The second module is called inside the call of the first, so that hooks which gather a module's weight only during
    its call (ZeRO-3) have gathered both weights.

    Args:
        x: [B, S, H, D].
        cos, sin: [S, D] of the concatenated sequence.
        following: the other module, and the tokens that come after ``x``.
        before: the tokens that come before ``x`` and their weight, passed from the first module to the second.
    """
    if following is not None:
        module, tokens = following
        joined: Tensor = module(tokens, cos, sin, before=(x, self.weight))
        return joined
    if before is not None:
        return norm_rope(before[0], before[1], cos, sin, self.eps, second=x, second_weight=self.weight)
    return norm_rope(x, self.weight, cos, sin, self.eps)


class FluxProcessor:
    """Replaces ``FluxAttnProcessor`` and ``Flux2AttnProcessor``; keeps the original and its attention backend."""

    def __init__(self, original: Any) -> None:
        self.original = original
        self._attention_backend = original._attention_backend
        self._parallel_config = original._parallel_config

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        query, key, value = _heads(
            attn.to_qkv(hidden_states).chunk(3, dim=-1)
            if attn.fused_projections
            else (attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)),
            attn.head_dim,
        )
        rope = _tables(image_rotary_emb, query)
        if encoder_hidden_states is None:
            query, key = attn.norm_q(query, *rope), attn.norm_k(key, *rope)
        else:
            text_query, text_key, text_value = _heads(
                attn.to_added_qkv(encoder_hidden_states).chunk(3, dim=-1)
                if attn.fused_projections
                else (
                    attn.add_q_proj(encoder_hidden_states),
                    attn.add_k_proj(encoder_hidden_states),
                    attn.add_v_proj(encoder_hidden_states),
                ),
                attn.head_dim,
            )
            query = attn.norm_added_q(text_query, *rope, following=(attn.norm_q, query))
            key = attn.norm_added_k(text_key, *rope, following=(attn.norm_k, key))
            value = torch.cat((text_value, value), dim=1)
        result = self._attend(query, key, value, attention_mask)
        if encoder_hidden_states is None:
            return result
        text, image = result.tensor_split([encoder_hidden_states.shape[1]], dim=1)
        image = attn.to_out[1](attn.to_out[0](image.contiguous()))
        return image, attn.to_add_out(text.contiguous())

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attention over [B, S, H, D] by the chosen backend, as [B, S, H D]."""
        attend = sys.modules[type(self.original).__module__].dispatch_attention_fn
        result: Tensor = attend(
            query,
            key,
            value,
            attn_mask=mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return result.flatten(2, 3).to(query.dtype)


class Flux2SingleProcessor(FluxProcessor):
    """Replaces ``Flux2ParallelSelfAttnProcessor``, whose first and last layers are those of the MLP as well."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        inner = attn.inner_dim
        mlp = attn.mlp_hidden_dim * attn.mlp_mult_factor
        # One split, whose gradient is joined in one pass.
        *parts, hidden = attn.to_qkv_mlp_proj(hidden_states).split([inner, inner, inner, mlp], dim=-1)
        query, key, value = _heads(tuple(parts), attn.head_dim)
        rope = _tables(image_rotary_emb, query)
        result = self._attend(attn.norm_q(query, *rope), attn.norm_k(key, *rope), value, attention_mask)
        return attn.to_out(torch.cat((result, attn.mlp_act_fn(hidden)), dim=-1))


class JointProcessor:
    """Replaces ``JointAttnProcessor2_0``; keeps the original."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        query, key, value = (layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v))
        size = key.shape[-1] // attn.heads
        query, key, value = _heads((query, key, value), size)
        if encoder_hidden_states is None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        else:
            layers = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
            text_query, text_key, text_value = _heads(tuple(layer(encoder_hidden_states) for layer in layers), size)
            query = attn.norm_q(query, following=(attn.norm_added_q, text_query))
            key = attn.norm_k(key, following=(attn.norm_added_k, text_key))
            value = torch.cat((value, text_value), dim=1)
        query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
        result = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2, 3)
        if encoder_hidden_states is None:
            return attn.to_out[1](attn.to_out[0](result))
        image, text = result.tensor_split([hidden_states.shape[1]], dim=1)
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[1](attn.to_out[0](image)), text


def _heads(parts: tuple[Tensor, ...], size: int) -> list[Tensor]:
    """[B, S, H D] to [B, S, H, D], as views."""
    return [part.unflatten(-1, (-1, size)) for part in parts]


def _tables(rope: tuple[Tensor, Tensor] | None, like: Tensor) -> tuple[Tensor, ...]:
    """Cosines and sines where the heads are; empty without a rotation."""
    return () if rope is None else tuple(table.to(like.device) for table in rope)
