"""Names of a network's layers in LoRA files: those of diffusers, and those of the model's original release.

kohya's sd-scripts, ComfyUI and the WebUIs take the names of FLUX.1 and SD3 from the original releases, where the
projections of an attention are rows of one weight. Each model family has the table of its own.
"""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

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
"""Layers of diffusers' attention over image and text together, as in the blocks of FLUX and SD3."""

BlockNames = Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]]
"""By the name of a list of blocks in diffusers' network: its name in the original release, and for each weight of
a block the layers that are its rows, in order."""


def release_weights(blocks: BlockNames, rest: Mapping[str, str], layers: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Weights of a transformer's original release, and the layers of diffusers' network that are their rows, in order.

    Args:
        blocks: names within the repeated blocks.
        rest: layers outside of them, by the release's names.
        layers: of the network, by diffusers' names.

    Returns:
        The weights that have at least one of the layers; names without ``.weight``.
    """
    found: dict[str, tuple[str, ...]] = {original: (layer,) for original, layer in rest.items()}
    for stem, number in dict.fromkeys(match.groups() for layer in layers if (match := _BLOCK.match(layer))):
        name, parts = blocks.get(stem, (stem, {}))
        for original, ends in parts.items():
            found[f"{name}.{number}.{original}"] = tuple(f"{stem}.{number}.{end}" for end in ends)
    return {original: ends for original, ends in found.items() if not set(layers).isdisjoint(ends)}


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


def spellings(
    originals: Mapping[str, tuple[str, ...]], layers: Sequence[str]
) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Every flat name under which a file may have some of a network's linear layers.

    Args:
        originals: weights of the original release, and the layers that are their rows.
        layers: of the network, by diffusers' names.

    Returns:
        For each the name in the original release ("" where it is diffusers'), and the layers that are its rows.
    """
    found = {flat(original): (original, ends) for original, ends in originals.items()}
    for layer in layers:
        found[flat(layer)] = found[flat(layer.removesuffix(".0"))] = ("", (layer,))
    return found


def unet_layer(name: str) -> str:
    """diffusers' name of a UNet's layer from kohya's, in which the dots are underscores."""
    return ".".join(_UNET_WORDS.findall(name))


def kohya_name(original: str) -> str:
    """What kohya calls a layer."""
    return "lora_unet_" + original.replace(".", "_")
