"""The fastest settings with which a run fits."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import NamedTuple

from pcpo_fast.config.schema import Checkpointing, Config
from pcpo_fast.planning.costs import ModelCosts
from pcpo_fast.planning.host import plan_host
from pcpo_fast.planning.memory import MemoryPlan, plan_memory
from pcpo_fast.planning.states import Zero, usual_stages

GB = 1e9
"""Decimal, as GPU memory is advertised; CUDA's tools report GiB of 1.074e9 bytes."""

RESERVE, RESERVE_SHARE = 1.5e9, 0.04
"""Bytes, and share of a GPU's memory, kept free for the CUDA context, NCCL buffers and fragmentation (assumed)."""

_KINDS: tuple[Checkpointing, ...] = (False, "selective", True)
"""In order of what they recompute."""


class Machines(NamedTuple):
    """The machines that a run's GPUs are in.

    Attributes:
        nodes: how many.
        host: bytes of host memory of one; None: any amount.
    """

    nodes: int = 1
    host: float | None = None


@dataclass(frozen=True)
class Choice:
    """Candidate settings and their memory plan."""

    zero: Zero
    checkpointed: Checkpointing
    micro_batch: int
    rollout_batch: int
    memory: MemoryPlan

    def settings(self) -> list[str]:
        """The settings as command-line arguments."""
        return [
            f"deepspeed=ds_configs/{self.zero.name}.json",
            f"model.gradient_checkpointing={str(self.checkpointed).lower()}",
            f"train.micro_batch_size={self.micro_batch}",
            f"rollout.batch_size={self.rollout_batch}",
        ]


def usable(memory: float) -> float:
    """Bytes of a GPU's, or a machine's, ``memory`` that a plan may use: all but the reserve."""
    return memory - max(RESERVE, RESERVE_SHARE * memory)


def choose(
    config: Config, costs: ModelCosts, ranks: int, memory: float, pairs: int, machines: Machines | None = None
) -> Choice | None:
    """The first choice that fits, or None.

    Args:
        config: the run.
        costs: costs of its model.
        ranks: number of GPUs.
        memory: bytes of one GPU.
        pairs: (image, step) pairs per rank and update; the micro-batch size must divide it.
        machines: what the GPUs are in; None: whose host memory does not matter.
    """
    nodes, host = Machines() if machines is None else machines

    @cache
    def host_suffices(zero: Zero) -> bool:
        return host is None or plan_host(config, costs, zero, ranks, nodes).peak <= usable(host)

    choices = _choices(config, costs, ranks, pairs)
    return next((c for c in choices if c.memory.peak <= usable(memory) and host_suffices(c.zero)), None)


def least_host_memory(
    config: Config,
    costs: ModelCosts,
    ranks: int,
    memory: float,
    pairs: int,
    nodes: int,
    mapped: Collection[str] | None = None,
) -> tuple[Choice, MemoryPlan] | None:
    """Of the choices that fit GPUs with ``memory`` the one that needs the least host memory, and how much; or None.

    ``mapped`` is as for :func:`pcpo_fast.planning.host.plan_host`.
    """
    best: dict[Zero, Choice] = {}
    for choice in _choices(config, costs, ranks, pairs):
        if choice.memory.peak <= usable(memory):
            best.setdefault(choice.zero, choice)
    plans = [(choice, plan_host(config, costs, zero, ranks, nodes, mapped)) for zero, choice in best.items()]
    return min(plans, key=lambda pair: pair[1].peak, default=None)


def least_memory(config: Config, costs: ModelCosts, ranks: int, pairs: int) -> Choice:
    """The choice that needs the least memory."""
    return min(_choices(config, costs, ranks, pairs), key=lambda choice: choice.memory.peak)


def _choices(config: Config, costs: ModelCosts, ranks: int, pairs: int) -> Iterator[Choice]:
    """All choices in order of preference: no offloading, unpartitioned weights, little recomputation, large batches.

    With offloaded parameters large batches are preferred to avoiding recomputation, because gathering the weights from
    host memory for every forward costs more than recomputing a forward, unless the batch is large.
    """
    own = config.train.pairs_at_once
    sizes = [size for size in sorted({1, 2, 3, 4, 6, 8, own}, reverse=True) if pairs % size == 0]
    model = config.model
    stages = [
        (zero, again)
        for again in _KINDS
        for zero in usual_stages(
            config.model_copy(update={"model": model.model_copy(update={"gradient_checkpointing": again})})
        ).values()
    ]
    for (zero, again), size in sorted(product(stages, sizes), key=_preference):
        if config.optimizer.weights == "stochastic_rounding" and zero.stage == 1:
            continue  # the engine replaces stage 1 with stage 2
        own_batch = config.rollout.images_at_once
        for rollout_batch in (own_batch >> halvings for halvings in range(own_batch.bit_length())):
            memory = plan_memory(
                config,
                costs,
                zero,
                ranks,
                checkpointed=float(bool(again)),
                recomputing=again,
                micro_batch=size,
                rollout_batch=rollout_batch,
            )
            yield Choice(zero, again, size, rollout_batch, memory)
            if memory.worst != "rollout":
                break  # a smaller rollout batch would not help


def _preference(choice: tuple[tuple[Zero, Checkpointing], int]) -> tuple[float, ...]:
    (zero, kind), size = choice
    again = _KINDS.index(kind)
    batches_first = (-size, again) if zero.offload_parameters else (again, zero.stage, -size)
    return (zero.offload_optimizer, zero.stage == 3, *batches_first)
