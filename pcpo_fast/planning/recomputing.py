"""How many blocks have to be recomputed in the backward for a run to fit, and what a share of them saves."""

import os
from typing import NamedTuple

import torch

from pcpo_fast.config.schema import Config
from pcpo_fast.planning.advice import usable
from pcpo_fast.planning.costs import ModelCosts
from pcpo_fast.planning.memory import plan_memory
from pcpo_fast.planning.models import find_architecture
from pcpo_fast.planning.states import Zero


class Recomputing(NamedTuple):
    """A share of the blocks and what the plan says of it.

    Attributes:
        share: of the blocks, 0 to 1.
        peak: bytes at the peak of the run with it.
        memory: bytes that the device has.
        fits: the peak is within what a plan may use of the memory.
    """

    share: float
    peak: float
    memory: float
    fits: bool

    def __str__(self) -> str:
        amount = f"{self.peak / 1e9:.1f} of {self.memory / 1e9:.1f} GB"
        what = f"{self.share:.0%} of the blocks are recomputed in the backward"
        if self.fits:
            return f"{what}: the plan is {amount} at the peak"
        return f"{what}, and yet the plan is {amount} at the peak: `pcpo-fast plan` says what would fit"


def least_recomputing(config: Config, ranks: int, memory: float, costs: ModelCosts | None = None) -> Recomputing:
    """The smallest share of blocks, in steps of one of sixteen, whose recomputation makes the run fit.

    Args:
        config: the run.
        ranks: number of processes, each with a device of its own.
        memory: bytes of one device.
        costs: of the run's model, None to count them.
    """
    costs = ModelCosts(find_architecture(config.model), config.model) if costs is None else costs
    zero = Zero.of(config)
    for sixteenths in range(17):
        share = sixteenths / 16
        peak = plan_memory(config, costs, zero, ranks, checkpointed=share).peak
        if peak <= usable(memory):
            return Recomputing(share, peak, memory, True)
    return Recomputing(1.0, peak, memory, False)


def device_memory(device: torch.device, ranks_here: int) -> float:
    """Bytes that one rank may count on: those of its GPU, or its part of the machine's memory."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / ranks_here
