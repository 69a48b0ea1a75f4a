"""Batch sizes of a comparison's runs: checked before the first one starts, and alike in all variants."""

import math
from collections.abc import Sequence
from dataclasses import replace

from pcpo_fast.comparison.variants import PlannedRun
from pcpo_fast.config.schema import AUTO
from pcpo_fast.errors import UserError
from pcpo_fast.rollout.epoch_plan import check_sizes


def check_run_sizes(runs: Sequence[PlannedRun]) -> None:
    """Refuse sizes that do not divide, as every run would on its own.

    Raises:
        UserError: names the variant.
    """
    for run in {run.variant: run for run in runs}.values():
        try:
            check_sizes(run.config, 1)
        except UserError as error:
            raise UserError(f"variant {run.variant}: {error}") from None


def with_common_sizes(runs: Sequence[PlannedRun], memory: float | None) -> list[PlannedRun]:
    """The runs with the same sizes wherever these are ``auto``: what suits each alone could differ between variants.

    Where only the model knows the trained steps, a run resolves its sizes on its own.

    Args:
        runs: each of one process.
        memory: bytes of its GPU; None: on a CPU.
    """
    from pcpo_fast.planning.sizes import fitted, is_auto, with_sizes

    configs = [run.config for run in {run.variant: run for run in runs if is_auto(run.config)}.values()]
    pairs = [count for config in configs if (count := check_sizes(config, 1)) is not None]
    if not configs or len(pairs) < len(configs):
        return list(runs)
    alone = [fitted(config, count, 1, memory) for config, count in zip(configs, pairs, strict=True)]
    own = [
        (config.train.pairs_at_once, count)
        for config, count, asked in zip(alone, pairs, configs, strict=True)
        if asked.train.micro_batch_size == AUTO
    ]
    least, common = min((size for size, _ in own), default=1), math.gcd(*(count for _, count in own))
    micro = next(size for size in range(least, 0, -1) if common % size == 0)
    batch = min(config.rollout.images_at_once for config in alone)
    found = []
    for run in runs:
        sizes = [f"train.micro_batch_size={micro}"] if run.config.train.micro_batch_size == AUTO else []
        sizes += [f"rollout.batch_size={batch}"] if run.config.rollout.batch_size == AUTO else []
        found.append(replace(run, config=with_sizes(run.config, micro, batch), overrides=(*run.overrides, *sizes)))
    return found
