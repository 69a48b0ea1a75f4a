"""Which settings make a run fit, the fastest first; and what has to change where none does."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from pcpo_fast.config.schema import Config
from pcpo_fast.planning.costs import ModelCosts
from pcpo_fast.planning.memory import MemoryPlan, plan_memory
from pcpo_fast.planning.states import SHIPPED, Zero

RESERVE, RESERVE_SHARE = 1.5e9, 0.04
"""Kept free: CUDA's context, NCCL's buffers and what fragmentation costs; an assumption."""


@dataclass(frozen=True)
class Choice:
    """Settings that fit, and their memory."""

    zero: Zero
    checkpointed: bool
    micro_batch: int
    rollout_batch: int
    memory: MemoryPlan

    def settings(self) -> list[str]:
        """The settings as the command line takes them."""
        return [
            f"deepspeed=ds_configs/{self.zero.name}.json",
            f"model.gradient_checkpointing={str(self.checkpointed).lower()}",
            f"train.micro_batch_size={self.micro_batch}",
            f"rollout.batch_size={self.rollout_batch}",
        ]


def usable(memory: float) -> float:
    """Bytes of a GPU's ``memory`` that a plan may use."""
    return memory - max(RESERVE, RESERVE_SHARE * memory)


def choose(config: Config, costs: ModelCosts, ranks: int, memory: float, pairs: int) -> Choice | None:
    """The first choice that fits, or None.

    Args:
        config: the run.
        costs: of its model.
        ranks: number of GPUs.
        memory: bytes of one.
        pairs: (image, step) pairs that a rank trains in an update; micro-batches divide them.
    """
    return next((c for c in _choices(config, costs, ranks, pairs) if c.memory.peak <= usable(memory)), None)


def least_memory(config: Config, costs: ModelCosts, ranks: int, pairs: int) -> Choice:
    """The choice that needs the least memory."""
    return min(_choices(config, costs, ranks, pairs), key=lambda choice: choice.memory.peak)


def _choices(config: Config, costs: ModelCosts, ranks: int, pairs: int) -> Iterator[Choice]:
    """All choices, in the order of preference: nothing offloaded, weights whole, nothing recomputed, large batches.

    Gathering the weights anew for every forward costs more than recomputing one, unless the batch is large: where they
    come from host memory, large batches are preferred to not recomputing.
    """
    own = config.train.micro_batch_size
    sizes = [size for size in sorted({1, 2, 3, 4, 6, 8, own}, reverse=True) if pairs % size == 0]
    for zero, again, size in sorted(product(SHIPPED.values(), (False, True), sizes), key=_preference):
        if config.optimizer.weights == "stochastic_rounding" and zero.stage == 1:
            continue  # the engine takes stage 2 for it
        own_batch = config.rollout.batch_size
        for rollout_batch in (own_batch >> halvings for halvings in range(own_batch.bit_length())):
            memory = plan_memory(
                config, costs, zero, ranks, checkpointed=again, micro_batch=size, rollout_batch=rollout_batch
            )
            yield Choice(zero, again, size, rollout_batch, memory)
            if memory.worst != "rollout":
                break  # a smaller batch of rollouts would not help


def _preference(choice: tuple[Zero, bool, int]) -> tuple[float, ...]:
    zero, again, size = choice
    batches_first = (-size, again) if zero.offload_parameters else (again, zero.stage, -size)
    return (zero.offload_optimizer, zero.stage == 3, *batches_first)
