"""A moving average of the trained weights, of the shard that a rank holds: averaging needs no communication."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pcpo_fast.engine.optimizers import CHUNK


class Ema:
    """Exponential moving average of some tensors that an optimiser changes in place.

    The average of update n is ``d e + (1 - d) w`` with ``d = min(decay, n / (n + 9))``: while there are few updates the
    start would otherwise be all of it (the usual warm-up, as in TensorFlow and diffusers, counted from 1).

    Args:
        shards: what this rank holds of the weights, float32 (a master copy) or bf16.
        decay: of one update, in 0..1 (1 excluded).

    Attributes:
        updates: how many the average has seen.
        average: float32, one for each shard, on its device.
    """

    def __init__(self, shards: Sequence[Tensor], decay: float) -> None:
        self.shards, self.decay, self.updates = list(shards), decay, 0
        self.average = [shard.detach().to(torch.float32, copy=True) for shard in self.shards]
        self._kept: list[Tensor | None] | None = None

    @torch.no_grad()
    def update(self) -> None:
        """Take the shards' present values into the average."""
        self.updates += 1
        weight = 1 - min(self.decay, self.updates / (self.updates + 9))
        for shard, average in zip(self.shards, self.average, strict=True):
            if shard.dtype == torch.float32:
                average.lerp_(shard.to(average.device), weight)
                continue
            for mine, theirs in zip(shard.view(-1).split(CHUNK), average.view(-1).split(CHUNK), strict=True):
                theirs.lerp_(mine.float(), weight)

    @torch.no_grad()
    def put_in(self) -> None:
        """Give the shards the average's values, until :meth:`take_out`; float32 shards are kept where the average was.

        Raises:
            ValueError: they have them already.
        """
        if self._kept is not None:
            raise ValueError("the average is in place already")
        self._kept = []
        for shard, average in zip(self.shards, self.average, strict=True):
            if shard.dtype == torch.float32:
                self._kept.append(None)
                _exchange(shard, average)
            else:
                self._kept.append(shard.detach().clone())
                shard.copy_(average)

    @torch.no_grad()
    def take_out(self) -> None:
        """Give the shards back exactly what they had.

        Raises:
            ValueError: the average is not in place.
        """
        if self._kept is None:
            raise ValueError("the average is not in place")
        for shard, average, kept in zip(self.shards, self.average, self._kept, strict=True):
            if kept is None:
                _exchange(shard, average)
            else:
                shard.copy_(kept)
        self._kept = None

    def state_dict(self) -> dict[str, Any]:
        """The average on the CPU, and how many updates it has seen; the tensors are copies."""
        return {"updates": self.updates, "average": [average.to("cpu", copy=True) for average in self.average]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned.

        Raises:
            ValueError: it is of other shards.
        """
        shapes = [tuple(average.shape) for average in self.average]
        given = [tuple(average.shape) for average in state["average"]]
        if shapes != given:
            raise ValueError(f"the moving average is of shards of shapes {given}, this rank's are {shapes}")
        self.updates = int(state["updates"])
        for mine, theirs in zip(self.average, state["average"], strict=True):
            mine.copy_(theirs)


def _exchange(one: Tensor, other: Tensor) -> None:
    """Exchange the values of two float32 tensors, a part at a time: a third copy would not always fit."""
    for a, b in zip(one.view(-1).split(CHUNK), other.view(-1).split(CHUNK), strict=True):
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)
