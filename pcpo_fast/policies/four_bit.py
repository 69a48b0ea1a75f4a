"""A frozen base in four bits under LoRA adapters (QLoRA; Dettmers et al., 2023), with bitsandbytes' linear layer.

The linear layers of the repeated blocks are stored as NF4: the nearest of 16 numbers times the largest magnitude of a
block of 64 consecutive weights (32 where rows do not divide into 64), kept in float32. A product dequantises its weight
for itself, in the forward and again in the backward, so rollout and update see the same weights, and gradients pass
through to the adapters.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pcpo_fast.config.schema import ModelConfig
from pcpo_fast.errors import UserError, reason_of
from pcpo_fast.policies.part_checks import check_finite
from pcpo_fast.policies.speed import linear_layers, needed

BLOCKS = (64, 32)
"""How many consecutive weights may share a scale."""


def check_base_weights(settings: ModelConfig) -> None:
    """Fail if bitsandbytes is needed and not installed, before anything is loaded.

    Raises:
        UserError: it is not installed.
    """
    if settings.base_weights == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "model.base_weights: nf4 needs bitsandbytes: run `pip install bitsandbytes`, or set model.base_weights=full"
        )


def block_of(layer: nn.Linear) -> int | None:
    """Weights of a layer that share a scale; None where no number divides its rows.

    bitsandbytes' kernels for CPUs (0.50) return wrong weights where a block goes on into the next row.
    """
    return next((size for size in BLOCKS if layer.in_features % size == 0), None)


def packed_bytes(layer: nn.Linear) -> float:
    """What a layer's weights take in four bits, with their scales."""
    return layer.weight.numel() * (0.5 + 4 / (block_of(layer) or BLOCKS[0]))


def frozen_layers(network: nn.Module, blocks: Sequence[nn.Module]) -> list[str]:
    """Names of the linear layers within some blocks of a network that can be stored in four bits, without adapters."""
    return [name for name, layer in linear_layers(network, blocks).items() if block_of(layer)]


def quantize_blocks(network: Any, blocks: Sequence[nn.Module], device: torch.device, part: Path) -> int:
    """Replace the linear layers of a network's blocks by layers in four bits, before adapters are added.

    One layer at a time, so that neither host nor device ever holds more than the network and one layer besides.

    Args:
        network: a diffusers model.
        blocks: those of it that repeat (:meth:`pcpo_fast.policies.base.Policy.compiled_blocks`).
        device: where each layer is quantised; then it returns to where the network is.
        part: folder of the weights, for messages.

    Returns:
        How many layers are in four bits.

    Raises:
        UserError: there are no such layers, a weight is not a finite number, or bitsandbytes cannot run on the device.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    names = frozen_layers(network, blocks)
    needed(network, names, "model.base_weights", "full")
    for name in names:
        layer = network.get_submodule(name)
        home, dtype = layer.weight.device, layer.weight.dtype
        check_finite(layer.to(device), part, f"{name}.")
        packed = Linear4bit(layer.in_features, layer.out_features, False, dtype, False, "nf4", device="meta")
        packed.bias = layer.bias
        weight: Any = Params4bit(
            layer.weight.detach(),
            blocksize=block_of(layer),
            compress_statistics=False,
            quant_type="nf4",
            module=packed,
        )
        try:
            packed.weight = weight.to(device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = reason_of(error)
            raise UserError(f"model.base_weights: bitsandbytes cannot quantise on {device}: {reason}") from None
        packed.register_state_dict_post_hook(_without_scales)
        network.set_submodule(name, packed.requires_grad_(False).to(home))
    network.is_loaded_in_4bit = True  # what peft goes by
    return len(names)


def _without_scales(layer: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Leave scales out of a state dict: a checkpoint leaves out frozen parameters, but not what comes with them."""
    for name in [name for name in state if name.startswith(f"{prefix}weight.")]:
        del state[name]
