"""Costs of a deep network from shallow ones: blocks of one kind cost the same, so a cost is linear in their numbers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from pcpo_fast.planning.tracing import Cost

FEW = 2
"""Blocks of each kind in the shallowest network: the first may save less than the others, the last differ from them."""


@dataclass(frozen=True)
class Depth:
    """How often each kind of block stands in a network, in the order of the forward.

    Attributes:
        counts: number of blocks of each kind.
        configure: the changes to the network's configuration that make other numbers of blocks.
        blocks: the blocks of each kind of a network with given numbers.
    """

    counts: tuple[int, ...]
    configure: Callable[[tuple[int, ...]], dict[str, Any]]
    blocks: Callable[[nn.Module, tuple[int, ...]], dict[str, list[nn.Module]]]


def depth_of(name: str, config: Mapping[str, Any]) -> Depth:
    """The depth of a network by its diffusers class; one whose blocks all differ (a UNet) has no counts."""
    if name == "FluxTransformer2DModel":
        counts = (config["num_layers"], config["num_single_layers"])
        return Depth(counts, _flux_config, _flux_blocks)
    if name == "SD3Transformer2DModel":
        dual = tuple(config.get("dual_attention_layers") or ())
        total = config["num_layers"]
        if dual == tuple(range(len(dual))) and len(dual) < total:
            return Depth((len(dual), total - len(dual)), _sd3_config, _sd3_blocks)
    return Depth((), lambda counts: {}, lambda network, counts: {})


def from_shallow(depth: Depth, measure: Callable[[tuple[int, ...]], Cost]) -> Cost:
    """The cost at ``depth.counts``, of costs measured with few blocks of each kind and with one more of each."""
    base = tuple(min(count, FEW) for count in depth.counts)
    start = total = measure(base)
    for kind, (count, few) in enumerate(zip(depth.counts, base, strict=True)):
        if count > few:
            deeper = measure(tuple(n + (place == kind) for place, n in enumerate(base)))
            slope = deeper.combine(start, 1, -1)
            total = total.combine(slope, 1, count - few)
    return total


def _flux_config(counts: tuple[int, ...]) -> dict[str, Any]:
    return {"num_layers": counts[0], "num_single_layers": counts[1]}


def _flux_blocks(network: nn.Module, counts: tuple[int, ...]) -> dict[str, list[nn.Module]]:
    parts: Any = network
    return {"double": list(parts.transformer_blocks), "single": list(parts.single_transformer_blocks)}


def _sd3_config(counts: tuple[int, ...]) -> dict[str, Any]:
    return {"num_layers": sum(counts), "dual_attention_layers": list(range(counts[0]))}


def _sd3_blocks(network: nn.Module, counts: tuple[int, ...]) -> dict[str, list[nn.Module]]:
    parts: Any = network
    blocks = list(parts.transformer_blocks)
    return {"dual": blocks[: counts[0]], "plain": blocks[counts[0] :]}
