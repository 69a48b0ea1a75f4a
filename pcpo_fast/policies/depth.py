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


DOUBLE_AND_SINGLE = {
    "double": ("num_layers", "transformer_blocks"),
    "single": ("num_single_layers", "single_transformer_blocks"),
}
"""The blocks of FLUX's networks, for :func:`listed_blocks`."""


def listed_blocks(config: Mapping[str, Any], lists: Mapping[str, tuple[str, ...]]) -> Depth:
    """The depth of a network whose blocks lie in lists.

    Args:
        config: of the network.
        lists: for each kind of block, the configuration's key for the length of its lists, and their names.
    """
    keys = [key for key, *_ in lists.values()]
    return Depth(
        tuple(config[key] for key in keys),
        configure=lambda counts: dict(zip(keys, counts, strict=True)),
        blocks=lambda network, counts: {
            kind: [block for name in names for block in network.get_submodule(name)]
            for kind, (_, *names) in lists.items()
        },
    )
