"""Batch sizes that are ``auto``, resolved before a run starts: the largest that divide and fit the memory plan.

They change memory and speed, and at most the last digits of a number: an epoch has the same images and updates.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pcpo_fast.config.loading import load_config
from pcpo_fast.config.schema import AUTO, Config
from pcpo_fast.errors import UserError
from pcpo_fast.planning.advice import usable
from pcpo_fast.planning.costs import ModelCosts
from pcpo_fast.planning.memory import plan_memory
from pcpo_fast.planning.models import find_architecture
from pcpo_fast.planning.recomputing import device_memory
from pcpo_fast.planning.states import Zero

CPU_PAIRS, CPU_IMAGES = 120, 96
"""(Image, step) pairs and images at once on a CPU, where more are no faster."""


def is_auto(config: Config) -> bool:
    """Whether a size is left to be resolved."""
    return AUTO in (config.train.micro_batch_size, config.rollout.batch_size)


def with_sizes(config: Config, micro_batch: int, rollout_batch: int) -> Config:
    """The run with these in place of sizes that are ``auto``."""
    if not is_auto(config):
        return config
    train, rollout = config.train, config.rollout
    if train.micro_batch_size == AUTO:
        train = train.model_copy(update={"micro_batch_size": micro_batch})
    if rollout.batch_size == AUTO:
        rollout = rollout.model_copy(update={"batch_size": rollout_batch})
    return config.model_copy(update={"train": train, "rollout": rollout})


def fitted(config: Config, pairs: int, ranks: int, memory: float | None, costs: ModelCosts | None = None) -> Config:
    """The run with its ``auto`` sizes resolved.

    Args:
        config: the run.
        pairs: (image, step) pairs that a rank trains in an update; micro-batches divide them.
        ranks: number of processes.
        memory: bytes of one GPU; None: on a CPU.
        costs: of the run's model, None to count them where they are needed.
    """
    if not is_auto(config):
        return config
    images = config.images_per_epoch // ranks
    batches = min(2 if config.scoring.overlap else 1, images)  # one is scored while the next is sampled
    sizes = [size for size in range(pairs, 0, -1) if pairs % size == 0]
    if memory is None:
        return with_sizes(
            config, next(size for size in sizes if size <= CPU_PAIRS), min(-(-images // batches), CPU_IMAGES)
        )
    counted = ModelCosts(find_architecture(config.model), config.model) if costs is None else costs
    zero, allowed = Zero.of(config), usable(memory)

    def phase(name: str, micro_batch: int = 1, rollout_batch: int = 1) -> float:
        plan = plan_memory(config, counted, zero, ranks, micro_batch=micro_batch, rollout_batch=rollout_batch)
        return plan.phases[name]

    parts = sorted(
        {-(-images // count) for count in range(batches, images + 1)}, reverse=True
    )  # equal but for the last
    return with_sizes(
        config,
        _largest(sizes, lambda size: phase("update", micro_batch=size) <= allowed),
        _largest(parts, lambda size: phase("rollout", rollout_batch=size) <= allowed),
    )


def gpu_memory() -> float | None:
    """Bytes of this process's GPU; None where it has none."""
    return device_memory(torch.device("cuda"), 1) if torch.cuda.is_available() else None


def kept_sizes(folder: Path, pairs: int) -> tuple[int, int] | None:
    """The sizes that the run in a folder was begun with, if they still divide; None where it has none."""
    try:
        earlier = load_config(folder / "config.yaml")
    except UserError:
        return None
    micro, batch = earlier.train.micro_batch_size, earlier.rollout.batch_size
    return None if micro == AUTO or batch == AUTO or pairs % micro else (micro, batch)


def _largest(sizes: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The first of descending sizes that fits, as all after it do; the last where none does."""
    low, high = 0, len(sizes) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(sizes[middle]) else (middle + 1, high)
    return sizes[low]
