"""Exponential moving average of the trained weights, per rank over its own shard, without communication."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pcpo_fast.engine.optimizers import CHUNK


class Ema:
    """Exponential moving average of tensors that an optimizer changes in place.

    At update n the average e becomes ``d e + (1 - d) w`` with ``d = min(decay, n / (n + 9))``. This is the warm-up of
    TensorFlow and diffusers, counted from 1; without it the initial weights would dominate the early averages.

    Args:
        shards: this rank's part of the weights, float32 (a master copy) or bf16.
        decay: per update, in [0, 1).

    Attributes:
        updates: number of updates averaged.
        average: float32, one tensor per shard, on its device.
    """

    def __init__(self, shards: Sequence[Tensor], decay: float) -> None:
        self.shards, self.decay, self.updates = list(shards), decay, 0
        self.average = [shard.detach().to(torch.float32, copy=True) for shard in self.shards]
        self._kept: list[Tensor | None] | None = None

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the shards' current values."""
        self.updates += 1
        weight = 1 - min(self.decay, self.updates / (self.updates + 9))
        for shard, average in zip(self.shards, self.average, strict=True):
            if shard.dtype == torch.float32:
                average.lerp_(shard.to(average.device), weight)
                continue
            for mine, theirs in zip(shard.view(-1).split(CHUNK), average.view(-1).split(CHUNK), strict=True):
                theirs.lerp_(mine.float(), weight)

    @torch.no_grad()
    def swap_in(self) -> None:
        """Put the averages into the shards until :meth:`swap_out`; float32 shards trade places with their averages.

        Raises:
            ValueError: the averages are already swapped in.
        """
        if self._kept is not None:
            raise ValueError("the average is already swapped in")
        self._kept = []
        for shard, average in zip(self.shards, self.average, strict=True):
            if shard.dtype == torch.float32:
                self._kept.append(None)
                _exchange(shard, average)
            else:
                self._kept.append(shard.detach().clone())
                shard.copy_(average)

    @torch.no_grad()
    def swap_out(self) -> None:
        """Restore the shards' own values, bit for bit.

        Raises:
            ValueError: the averages are not swapped in.
        """
        if self._kept is None:
            raise ValueError("the average is not swapped in")
        for shard, average, kept in zip(self.shards, self.average, self._kept, strict=True):
            if kept is None:
                _exchange(shard, average)
            else:
                shard.copy_(kept)
        self._kept = None

    def state_dict(self) -> dict[str, Any]:
        """Copies of the averages on the CPU, and the number of updates."""
        return {"updates": self.updates, "average": [average.to("cpu", copy=True) for average in self.average]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from :meth:`state_dict`.

        Raises:
            ValueError: the shards have other shapes.
        """
        shapes = [tuple(average.shape) for average in self.average]
        given = [tuple(average.shape) for average in state["average"]]
        if shapes != given:
            raise ValueError(f"the moving average has shards of shapes {given}, but this rank's are {shapes}")
        self.updates = int(state["updates"])
        for mine, theirs in zip(self.average, state["average"], strict=True):
            mine.copy_(theirs)


def _exchange(one: Tensor, other: Tensor) -> None:
    """Swap the values of two float32 tensors chunk by chunk, because a third full copy may not fit."""
    for a, b in zip(one.view(-1).split(CHUNK), other.view(-1).split(CHUNK), strict=True):
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)
