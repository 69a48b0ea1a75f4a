"""OpenCLIP's ViT-H-14 as transformers' CLIP: the same network under other names.

OpenCLIP keeps queries, keys and values of a layer in one matrix and projections as matrices to multiply from the right.
Widths and depths are read from the checkpoint; the width of an attention head is the architecture's (80 in the image
tower, 64 in the text tower), as is the exact GELU.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pcpo_fast.errors import UserError
from pcpo_fast.rewards.checkpoints import Source, check_names, fill

_IMAGE_HEAD, _TEXT_HEAD = 80, 64
_OUTER = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_TOWERS = {"visual.transformer": "vision_model.encoder", "transformer": "text_model.encoder"}
_LAYER = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
_LAYER["attn.out_proj"] = "self_attn.out_proj"


def clip_from_open_clip(weights: Mapping[str, Tensor], where: str) -> Any:
    """A ``CLIPModel`` on the CPU with the weights of an OpenCLIP ViT-H-14.

    Args:
        weights: by OpenCLIP's names.
        where: "reward x: FILE", for messages.

    Raises:
        UserError: a weight is missing, unknown or of the wrong shape.
    """
    from transformers import CLIPModel

    what = f"{where} is not an OpenCLIP ViT-H-14"
    layers = {tower: _depth(weights, tower) for tower in _TOWERS}
    sources = _sources(layers)
    check_names(weights, {source.name for source in sources.values()}, (), what)
    config = _config(weights, layers, what)
    with torch.device("meta"):
        model = CLIPModel(config)
    fill(model, weights, sources, what)
    return model


def _depth(weights: Mapping[str, Tensor], tower: str) -> int:
    pattern = re.compile(re.escape(tower) + r"\.resblocks\.(\d+)\.")
    found = [int(match[1]) for match in map(pattern.match, weights) if match]
    return max(found, default=0) + 1


def _sources(layers: Mapping[str, int]) -> dict[str, Source]:
    """For each weight of transformers' CLIP, where it is in OpenCLIP's."""
    sources = {ours: Source(theirs) for theirs, ours in _OUTER.items()}
    sources |= {ours: Source(theirs, _transposed) for theirs, ours in _PROJECTIONS.items()}
    for theirs, ours in _TOWERS.items():
        for layer in range(layers[theirs]):
            block, place = f"{theirs}.resblocks.{layer}", f"{ours}.layers.{layer}"
            for kind in ("weight", "bias"):
                for old, new in _LAYER.items():
                    sources[f"{place}.{new}.{kind}"] = Source(f"{block}.{old}.{kind}")
                for part, name in enumerate("qkv"):
                    fused = f"{block}.attn.in_proj_{kind}"
                    sources[f"{place}.self_attn.{name}_proj.{kind}"] = Source(fused, _Third(part))
    return sources


class _Third:
    """One of the three matrices that OpenCLIP keeps as one."""

    def __init__(self, part: int) -> None:
        self.part = part

    def __call__(self, fused: Tensor) -> Tensor:
        return fused.chunk(3)[self.part]


def _transposed(matrix: Tensor) -> Tensor:
    return matrix.T.contiguous()


def _config(weights: Mapping[str, Tensor], layers: Mapping[str, int], what: str) -> Any:
    from transformers import CLIPConfig

    def shape(name: str, dimensions: int) -> list[int]:
        found = list(weights[name].shape)
        if len(found) != dimensions:
            raise UserError(f"{what}: {name} has the shape {found}, not {dimensions} dimensions")
        return found

    width, _, patch, _ = shape("visual.conv1.weight", 4)
    words, text_width = shape("token_embedding.weight", 2)
    positions, _ = shape("visual.positional_embedding", 2)
    length, _ = shape("positional_embedding", 2)
    _, embedding = shape("text_projection", 2)
    image_inner, _ = shape("visual.transformer.resblocks.0.mlp.c_fc.weight", 2)
    text_inner, _ = shape("transformer.resblocks.0.mlp.c_fc.weight", 2)
    for tower, have, head in (("visual.conv1.weight", width, _IMAGE_HEAD), ("token", text_width, _TEXT_HEAD)):
        if have % head:
            raise UserError(f"{what}: its {tower.split('.')[0]} width {have} is no multiple of {head}")
    return CLIPConfig(
        vision_config={
            "hidden_size": width,
            "intermediate_size": image_inner,
            "num_hidden_layers": layers["visual.transformer"],
            "num_attention_heads": width // _IMAGE_HEAD,
            "image_size": math.isqrt(positions - 1) * patch,
            "patch_size": patch,
            "hidden_act": "gelu",
            "projection_dim": embedding,
        },
        text_config={
            "vocab_size": words,
            "hidden_size": text_width,
            "intermediate_size": text_inner,
            "num_hidden_layers": layers["transformer"],
            "num_attention_heads": text_width // _TEXT_HEAD,
            "max_position_embeddings": length,
            "hidden_act": "gelu",
            "projection_dim": embedding,
            # The end of the text is the vocabulary's last word; OpenCLIP looks for the largest number.
            "eos_token_id": words - 1,
            "bos_token_id": words - 2,
        },
        projection_dim=embedding,
    )
