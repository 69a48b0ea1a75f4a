"""Reads a checkpoint's training state per parameter, for any number of ranks and ZeRO stage that wrote it.

DeepSpeed's shards are flat vectors. With ZeRO 1 and 2 the parameters of a group are concatenated, and the vector is
split evenly over the ranks; each shard records which parameters its piece holds, and where. With ZeRO 3 every parameter
is split separately, into pieces of ``ceil(n / ranks)`` of its n elements, the last one padded.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


class UnknownLayoutError(ValueError):
    """The state's layout cannot be resharded."""


class SavedState:
    """Full weights and moments from the shards of all ranks.

    Args:
        shards: ``optimizer_state_dict`` of every rank's optimizer file, by rank.
        sizes: number of elements of each trained parameter, by name, in model order.
        averages: the moving average of the weights, by rank, in flat vectors sharded like the weights; None if none.

    Attributes:
        moments: names of the optimizer's state tensors with the weights' shape; none before the first step.
        step: the optimizer's step count; None before the first step.

    Raises:
        UnknownLayoutError: another optimizer than AdamW wrote it, or a parameter is missing.
    """

    def __init__(
        self,
        shards: Sequence[Mapping[str, Any]],
        sizes: Mapping[str, int],
        averages: Sequence[Sequence[Tensor]] | None = None,
    ) -> None:
        self.sizes = dict(sizes)
        self._by_parameter = "fp32_flat_groups" in shards[0]
        self._pieces = [_flat_vectors(shard) for shard in shards]
        found = [vectors.keys() for vectors, _ in self._pieces]
        self.moments = tuple(name for name in MOMENTS if all(name in keys for keys in found))
        self.step: Tensor | None = self._pieces[0][1]
        if self.moments not in ((), MOMENTS) or (self.step is None) != (not self.moments):
            raise UnknownLayoutError("its optimizer state is not AdamW's")
        if averages is not None:
            self._take_averages(averages)
        self._places: dict[str, list[tuple[int, int, int, int]]] = {}
        if self._by_parameter:
            self._place_by_parameter(len(shards))
        else:
            self._place_by_group(shards)
        missing = [name for name, size in self.sizes.items() if self._length(name) < size]
        if missing:
            raise UnknownLayoutError(f"it does not hold all of {missing[0]}")

    def full(self, name: str, what: str = "weights") -> Tensor:
        """A parameter's full ``weights``, ``average`` or one of its :attr:`moments`, flat, in the shards' dtype."""
        pieces = [
            self._pieces[rank][0][what][group].narrow(0, start, count)
            for rank, group, start, count in self._places[name]
        ]
        return torch.cat(pieces)[: self.sizes[name]]

    def _take_averages(self, averages: Sequence[Sequence[Tensor]]) -> None:
        if len(averages) != len(self._pieces):
            raise UnknownLayoutError("only some of its ranks have a moving average")
        for (vectors, _), average in zip(self._pieces, averages, strict=True):
            lengths, weights = [len(part) for part in average], [len(part) for part in vectors["weights"]]
            if len(lengths) != len(weights) or any(a < w for a, w in zip(lengths, weights, strict=True)):
                raise UnknownLayoutError("its moving average does not have one value for each weight")
            vectors["average"] = list(average)

    def _length(self, name: str) -> int:
        return sum(count for *_, count in self._places.get(name, []))

    def _place_by_group(self, shards: Sequence[Mapping[str, Any]]) -> None:
        for rank, shard in enumerate(shards):
            for group, addresses in enumerate(shard["param_slice_mappings"]):
                for name, address in addresses.items():
                    self._places.setdefault(name, []).append((rank, group, int(address.start), int(address.numel)))

    def _place_by_parameter(self, ranks: int) -> None:
        """A rank's flat groups hold its pieces in parameter order; no piece crosses the end of a group."""
        lengths = [len(vector) for vector in self._pieces[0][0]["weights"]]
        group, start = 0, 0
        for name, size in self.sizes.items():
            count = -(-size // ranks)
            while group < len(lengths) and start + count > lengths[group]:
                if start != lengths[group]:
                    raise UnknownLayoutError(f"{name} is not at the expected offset")
                group, start = group + 1, 0
            if group == len(lengths):
                raise UnknownLayoutError(f"it does not hold all of {name}")
            self._places[name] = [(rank, group, start, count) for rank in range(ranks)]
            start += count


def _flat_vectors(shard: Mapping[str, Any]) -> tuple[dict[str, list[Tensor]], Tensor | None]:
    """A shard's flat vectors (``weights`` and moments, each a list over groups), and its step count."""
    try:
        if "fp32_flat_groups" in shard:
            weights, base = list(shard["fp32_flat_groups"]), shard["optimizer_state_dict"]
        else:
            weights, base = list(shard["single_partition_of_fp32_groups"]), shard["base_optimizer_state"]
        states = [base["state"][index] for index in sorted(base["state"])]
    except (KeyError, TypeError, IndexError) as error:
        raise UnknownLayoutError(f"its shards have no {error}") from None
    vectors = {"weights": weights}
    if not states:
        return vectors, None
    if len(states) != len(weights):
        raise UnknownLayoutError("only some of its weights have moments")
    for name in MOMENTS:
        moments = [state.get(name) for state in states]
        if any(not torch.is_tensor(m) or len(m) < len(w) for m, w in zip(moments, weights, strict=True)):
            raise UnknownLayoutError("its optimizer's moments do not have one value for each weight")
        vectors[name] = moments
    step = states[0].get("step")
    return vectors, step if step is None or torch.is_tensor(step) else torch.tensor(float(step))
