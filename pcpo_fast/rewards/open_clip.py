"""OpenCLIP's ViT-H-14 as transformers' CLIP: the same network with other names.

OpenCLIP stores queries, keys and values of a layer in one matrix, and projections transposed. Widths and depths are
read from the checkpoint; the width of an attention head (80 in the image tower, 64 in the text tower) and the exact
GELU are given by the architecture.
"""

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from pcpo_fast.errors import UserError
from pcpo_fast.rewards.checkpoints import depth_of, module_of, shape_of

_IMAGE_HEAD, _TEXT_HEAD = 80, 64
_NAMES = (
    (r"^vision_model\.", "visual."),
    (r"^text_model\.", ""),
    (r"embeddings\.class_embedding", "class_embedding"),
    (r"embeddings\.patch_embedding", "conv1"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"embeddings\.token_embedding", "token_embedding"),
    (r"encoder\.layers", "transformer.resblocks"),
    (r"pre_layrnorm", "ln_pre"),
    (r"post_layernorm", "ln_post"),
    (r"final_layer_norm", "ln_final"),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"self_attn\.[qkv]_proj\.", "attn.in_proj_"),
    (r"self_attn", "attn"),
    (r"^visual_projection\.weight", "visual.proj"),
    (r"^text_projection\.weight", "text_projection"),
)
"""Maps transformers' names to OpenCLIP's."""


def clip_from_open_clip(weights: Mapping[str, Tensor], where: str) -> Any:
    """A ``CLIPModel`` on the CPU with the weights of an OpenCLIP ViT-H-14.

    Args:
        weights: the weights by OpenCLIP's names.
        where: prefix of error messages: "reward x: FILE".

    Raises:
        UserError: a weight is missing, unknown or of the wrong shape.
    """
    from transformers import CLIPModel

    what = f"{where} is not an OpenCLIP ViT-H-14"
    config = _config(weights, what)
    return module_of(lambda: CLIPModel(config), weights, what, _NAMES, _change)


def _change(name: str, tensor: Tensor) -> Tensor:
    if part := re.search(r"self_attn\.([qkv])_proj", name):
        return tensor.chunk(3)["qkv".index(part[1])]
    return tensor.T.contiguous() if name.endswith("_projection.weight") else tensor


def _config(weights: Mapping[str, Tensor], what: str) -> Any:
    from transformers import CLIPConfig

    shape = partial(shape_of, weights, what=what)
    width, _, patch, _ = shape("visual.conv1.weight", 4)
    words, text_width = shape("token_embedding.weight", 2)
    positions, _ = shape("visual.positional_embedding", 2)
    length, _ = shape("positional_embedding", 2)
    _, embedding = shape("text_projection", 2)
    image_inner, _ = shape("visual.transformer.resblocks.0.mlp.c_fc.weight", 2)
    text_inner, _ = shape("transformer.resblocks.0.mlp.c_fc.weight", 2)
    for tower, have, head in (("visual", width, _IMAGE_HEAD), ("token", text_width, _TEXT_HEAD)):
        if have % head:
            raise UserError(f"{what}: its {tower} width {have} is not a multiple of {head}")
    return CLIPConfig(
        vision_config={
            "hidden_size": width,
            "intermediate_size": image_inner,
            "num_hidden_layers": depth_of(weights, "visual.transformer.resblocks"),
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
            "num_hidden_layers": depth_of(weights, "transformer.resblocks"),
            "num_attention_heads": text_width // _TEXT_HEAD,
            "max_position_embeddings": length,
            "hidden_act": "gelu",
            "projection_dim": embedding,
            # The end token is the last of the vocabulary; OpenCLIP searches for the largest token id.
            "eos_token_id": words - 1,
            "bos_token_id": words - 2,
        },
        projection_dim=embedding,
    )
