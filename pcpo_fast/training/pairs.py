"""The (image, step) pairs of an update that are run: those whose loss can have a gradient."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pcpo_fast.distributed.collectives import gather_objects
from pcpo_fast.rollout.epoch_plan import EpochPlan


@dataclass(frozen=True)
class Pairs:
    """The pairs that this rank runs in an optimizer step, in the order of the plan; all [K], on the CPU.

    Attributes:
        rows, steps: int64, position in the rollout and step.
        taught: bool, whether the loss can have a gradient. The other pairs only fill the last micro-batches.
    """

    rows: Tensor
    steps: Tensor
    taught: Tensor


def pairs_to_run(plan: EpochPlan, silent: Tensor, micro_batch: int) -> list[Pairs]:
    """The pairs of each optimizer step, packed into as few full micro-batches as the busiest rank needs.

    All ranks run the same number of micro-batches, because forward and backward are collective with ZeRO; at least one,
    because the optimizer's moments also move the weights without a gradient. All ranks must call it.

    Args:
        plan: this rank's share of the epoch.
        silent: bool [n, N] on the CPU, by position in the rollout and step: the gradient is known to be exactly 0.
        micro_batch: pairs per micro-batch; divides the pairs of an optimizer step.
    """
    updates, per_update, count = plan.steps.shape
    rows = torch.arange(updates * per_update).repeat_interleave(count).reshape(updates, -1)
    steps = plan.steps.flatten(1)
    taught = ~silent[rows, steps]
    needed = (-(-taught.sum(dim=1) // micro_batch)).clamp(min=1).tolist()
    batches = [max(of_ranks) for of_ranks in zip(*gather_objects(needed), strict=True)]
    # Stable sort: taught pairs first, each group in the order of the plan.
    order = [row.argsort(descending=True, stable=True) for row in taught]
    kept = [row[: n * micro_batch].sort().values for row, n in zip(order, batches, strict=True)]
    return [Pairs(rows[u, chosen], steps[u, chosen], taught[u, chosen]) for u, chosen in enumerate(kept)]
