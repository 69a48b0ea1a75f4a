"""A network's depth, for the planner, which measures shallow networks: blocks of one kind cost the same."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Depth:
    """Number of blocks of each kind, in forward order; no kinds if all blocks differ.

    Attributes:
        counts: number of blocks of each kind.
        configure: changes to the network's configuration for other numbers of blocks.
        blocks: the blocks of each kind of a network with given numbers.
    """

    counts: tuple[int, ...] = ()
    configure: Callable[[tuple[int, ...]], dict[str, Any]] = lambda counts: {}
    blocks: Callable[[Any, tuple[int, ...]], dict[str, list[nn.Module]]] = lambda network, counts: {}


def double_and_single_blocks(config: Mapping[str, Any]) -> Depth:
    """The depth of FLUX's networks: double blocks, then single ones."""
    return Depth(
        (config["num_layers"], config["num_single_layers"]),
        configure=lambda counts: {"num_layers": counts[0], "num_single_layers": counts[1]},
        blocks=lambda network, counts: {
            "double": list(network.transformer_blocks),
            "single": list(network.single_transformer_blocks),
        },
    )
