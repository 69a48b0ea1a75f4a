"""The least that must be recomputed in the backward for a run to fit."""

import os
from itertools import product
from typing import NamedTuple

import torch

from pcpo_fast.config.schema import Checkpointing, Config
from pcpo_fast.planning.advice import usable
from pcpo_fast.planning.costs import ModelCosts
from pcpo_fast.planning.memory import plan_memory
from pcpo_fast.planning.models import find_architecture
from pcpo_fast.planning.states import Zero


class Recomputing(NamedTuple):
    """A share of recomputed blocks and the resulting memory plan.

    Attributes:
        share: share of the blocks, 0 to 1.
        peak: planned peak in bytes.
        memory: the device's memory in bytes.
        fits: whether the peak is within the usable part of the memory.
        kind: what of these blocks is recomputed: everything, or selectively.
    """

    share: float
    peak: float
    memory: float
    fits: bool
    kind: Checkpointing = True

    def __str__(self) -> str:
        amount = f"{self.peak / 1e9:.1f} of {self.memory / 1e9:.1f} GB"
        how = "selectively recomputed" if self.kind == "selective" else "recomputed"
        what = f"{self.share:.0%} of the blocks are {how} in the backward"
        if self.fits:
            return f"{what}: planned peak {amount}"
        return f"{what}, but the planned peak is still {amount}: `pcpo-fast plan` shows what would fit"


def least_recomputing(config: Config, ranks: int, memory: float, costs: ModelCosts | None = None) -> Recomputing:
    """The smallest share of recomputed blocks, in steps of 1/16, with which the run fits.

    A run that recomputes selectively recomputes whole blocks where that is not enough.

    Args:
        config: the run.
        ranks: number of processes, each with its own device.
        memory: bytes of one device.
        costs: costs of the run's model; None: trace it.
    """
    costs = ModelCosts(find_architecture(config.model), config.model) if costs is None else costs
    zero = Zero.of(config)
    kinds: tuple[Checkpointing, ...] = (
        ("selective", True) if config.model.gradient_checkpointing == "selective" else (True,)
    )
    for kind, sixteenths in product(kinds, range(17)):
        share = sixteenths / 16
        peak = plan_memory(config, costs, zero, ranks, checkpointed=share, recomputing=kind).peak
        if peak <= usable(memory):
            return Recomputing(share, peak, memory, True, kind)
    return Recomputing(1.0, peak, memory, False)


def device_memory(device: torch.device, ranks_here: int) -> float:
    """Bytes available to one rank: its GPU's memory, or its share of the machine's."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / ranks_here
