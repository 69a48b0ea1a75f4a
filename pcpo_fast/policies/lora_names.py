"""Names of a network's layers in LoRA files: diffusers' names and those of the model's original release.

kohya's sd-scripts, ComfyUI and the WebUIs use the original names for FLUX.1 and SD3, where the query, key and value
projections are rows of one weight. Each model family has its own table.
"""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

_BLOCK = re.compile(r"([\w.]+?)\.(\d+)\.")

_PREFIXES = re.compile(
    r"((base_model\.model|model|module|diffusion_model|transformer|unet)\.|lora_(unet|transformer)_|lycoris_)*"
)
TEXT_ENCODER = re.compile(
    r"(base_model\.model\.)?(lora_(te|clip)\d?_|text_encoders?(_\d)?\.|text_model\.|cond_stage_model\.)"
)
"""Prefixes of text encoder layers."""

_UNET_WORDS = re.compile(
    r"(?:down|up|transformer)_blocks|mid_block|to_(?:[qkv]|out)|proj_(?:in|out)|time_embedding|time_emb_proj|linear_\d"
    r"|[a-z0-9]+"
)


JOINT_ATTENTION = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
"""Linear layers of diffusers' joint attention over image and text tokens, as in the blocks of FLUX and SD3."""

BlockNames = Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]]
"""For each list of blocks in diffusers' network: its name in the original release and, for each weight of a block,
the diffusers layers that make up its rows, in order."""


def release_weights(blocks: BlockNames, rest: Mapping[str, str], layers: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Map weights of a transformer's original release to the diffusers layers that make up their rows, in order.

    Args:
        blocks: names within the repeated blocks.
        rest: layers outside the blocks, by their original names.
        layers: the network's layers, by their diffusers names.

    Returns:
        Original weights (names without ``.weight``) that contain at least one of the layers.
    """
    found: dict[str, tuple[str, ...]] = {original: (layer,) for original, layer in rest.items()}
    for stem, number in dict.fromkeys(match.groups() for layer in layers if (match := _BLOCK.match(layer))):
        name, parts = blocks.get(stem, (stem, {}))
        for original, ends in parts.items():
            found[f"{name}.{number}.{original}"] = tuple(f"{stem}.{number}.{end}" for end in ends)
    return {original: ends for original, ends in found.items() if not set(layers).isdisjoint(ends)}


def shares(original: str, count: int) -> tuple[int, ...]:
    """Relative numbers of rows of the layers that make up a weight of the original release."""
    return (1, 1, 1, 4) if original.endswith("linear1") else (1,) * count


def halves_swapped(original: str, up: Tensor, down: Tensor) -> bool:
    """Whether shift and scale are swapped between the release and diffusers, as in the final modulation."""
    return original.endswith("adaLN_modulation.1") and up.shape[0] == 2 * down.shape[1]


def flat(name: str) -> str:
    """A layer's name without prefix, dots and processors, which all programs that write LoRA files share."""
    bare = name[_PREFIXES.match(name).end() :]  # type: ignore[union-attr]
    return bare.replace(".processor.", ".").replace(".", "_")


def spellings(
    originals: Mapping[str, tuple[str, ...]], layers: Sequence[str]
) -> dict[str, tuple[str, tuple[str, ...]]]:
    """All flat names that LoRA files may use for a network's linear layers.

    Args:
        originals: weights of the original release, and the layers that make up their rows.
        layers: the network's layers, by their diffusers names.

    Returns:
        For each flat name: the name in the original release ("" for a diffusers name), and its layers in order.
    """
    found = {flat(original): (original, ends) for original, ends in originals.items()}
    for layer in layers:
        found[flat(layer)] = found[flat(layer.removesuffix(".0"))] = ("", (layer,))
    return found


def unet_layer(name: str) -> str:
    """Convert kohya's name of a UNet layer, with underscores for dots, to diffusers' name."""
    return ".".join(_UNET_WORDS.findall(name))


def kohya_name(original: str) -> str:
    """kohya's name of a layer."""
    return "lora_unet_" + original.replace(".", "_")
