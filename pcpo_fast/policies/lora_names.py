"""What the layers of a network are called in LoRA files: by diffusers, and as in the model's original release.

kohya's sd-scripts, ComfyUI and the WebUIs take the names of FLUX.1 and SD3 from the original releases, where the
projections of an attention are rows of one weight. Which layer is which stands in diffusers' conversions of whole
checkpoints, such as ``convert_flux_transformer_checkpoint_to_diffusers``.
"""

import re
from collections.abc import Iterable, Iterator

from torch import Tensor

_FLUX_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_FLUX_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_FLUX_REST = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
_SD3_JOINT = {
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
_SD3_REST = {
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
_TRANSFORMERS: dict[str, tuple[dict[str, tuple[str, dict[str, tuple[str, ...]]]], dict[str, str]]] = {
    "FluxTransformer2DModel": (
        {
            "transformer_blocks": ("double_blocks", _FLUX_DOUBLE),
            "single_transformer_blocks": ("single_blocks", _FLUX_SINGLE),
        },
        _FLUX_REST,
    ),
    "SD3Transformer2DModel": ({"transformer_blocks": ("joint_blocks", _SD3_JOINT)}, _SD3_REST),
}
_BLOCK = re.compile(r"(\w+)\.(\d+)\.")

_PREFIXES = re.compile(
    r"((base_model\.model|model|module|diffusion_model|transformer|unet)\.|lora_(unet|transformer)_|lycoris_)*"
)
TEXT_ENCODER = re.compile(
    r"(base_model\.model\.)?(lora_(te|clip)\d?_|text_encoders?(_\d)?\.|text_model\.|cond_stage_model\.)"
)
"""How the name of a text encoder's layer begins."""

_UNET_WORDS = re.compile(
    r"(?:down|up|transformer)_blocks|mid_block|to_(?:[qkv]|out)|proj_(?:in|out)|time_embedding|time_emb_proj|linear_\d"
    r"|[a-z0-9]+"
)


def original_layers(network: str, layers: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Weights of the original release, and the layers of diffusers' network that are their rows, in order.

    Args:
        network: diffusers' class.
        layers: of the network, by its names.

    Returns:
        What has at least one of the layers; names without ``.weight``. A UNet's have one layer each.
    """
    layers = list(layers)
    if network not in _TRANSFORMERS:
        return {original: (layer,) for layer, original in _unet_originals(layers)}
    blocks, rest = _TRANSFORMERS[network]
    found: dict[str, tuple[str, ...]] = {original: (layer,) for original, layer in rest.items()}
    for stem, number in dict.fromkeys(match.groups() for layer in layers if (match := _BLOCK.match(layer))):
        name, parts = blocks.get(stem, (stem, {}))
        for original, ends in parts.items():
            found[f"{name}.{number}.{original}"] = tuple(f"{stem}.{number}.{end}" for end in ends)
    there = set(layers)
    return {original: ends for original, ends in found.items() if there.intersection(ends)}


def _unet_originals(layers: list[str]) -> Iterator[tuple[str, str]]:
    """The linear layers of an SD 1.x or 2.x UNet by their names in CompVis' code."""
    counted = (re.match(r"down_blocks\.\d+\.\w+\.(\d+)\.", layer) for layer in layers)
    depth = 1 + max((int(match[1]) for match in counted if match), default=1)
    for layer in layers:
        name = layer.replace("time_emb_proj", "emb_layers.1")
        if match := re.match(r"time_embedding\.linear_(\d)$", name):
            yield layer, f"time_embed.{2 * int(match[1]) - 2}"
        elif match := re.match(r"down_blocks\.(\d+)\.(attentions|resnets)\.(\d+)\.(.+)", name):
            number = 1 + int(match[1]) * (depth + 1) + int(match[3])
            yield layer, f"input_blocks.{number}.{int(match[2] == 'attentions')}.{match[4]}"
        elif match := re.match(r"up_blocks\.(\d+)\.(attentions|resnets)\.(\d+)\.(.+)", name):
            number = int(match[1]) * (depth + 1) + int(match[3])
            yield layer, f"output_blocks.{number}.{int(match[2] == 'attentions')}.{match[4]}"
        elif match := re.match(r"mid_block\.(attentions|resnets)\.(\d+)\.(.+)", name):
            yield layer, f"middle_block.{1 if match[1] == 'attentions' else 2 * int(match[2])}.{match[3]}"


def shares(original: str, count: int) -> tuple[int, ...]:
    """Rows of the layers that make up a weight of the original release, relative to each other."""
    return (1, 1, 1, 4) if original.endswith("linear1") else (1,) * count


def halves_swapped(original: str, up: Tensor, down: Tensor) -> bool:
    """Whether the release has shift before scale where diffusers has scale before shift: in each last modulation."""
    return original.endswith("adaLN_modulation.1") and up.shape[0] == 2 * down.shape[1]


def flat(name: str) -> str:
    """A layer's name without prefix, dots and processors: what all writers' names of it have in common."""
    bare = name[_PREFIXES.match(name).end() :]  # type: ignore[union-attr]
    return bare.replace(".processor.", ".").replace(".", "_")


def spellings(network: str, layers: Iterable[str]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Every flat name under which a file may have some of a network's linear layers.

    Returns:
        For each the name in the original release ("" where it is diffusers'), and the layers that are its rows.
    """
    layers = list(layers)
    found = {flat(original): (original, ends) for original, ends in original_layers(network, layers).items()}
    for layer in layers:
        found[flat(layer)] = found[flat(layer.removesuffix(".0"))] = ("", (layer,))
    return found


def unet_layer(name: str) -> str:
    """diffusers' name of a UNet's layer from kohya's, in which the dots are underscores."""
    return ".".join(_UNET_WORDS.findall(name))


def kohya_name(original: str) -> str:
    """What kohya calls a layer."""
    return "lora_unet_" + original.replace(".", "_")
