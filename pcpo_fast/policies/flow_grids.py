"""The times of pipelines whose scheduler shifts them by the number of the image's cells."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from pcpo_fast.method.schedules import FlowSchedule
from pcpo_fast.policies.part_checks import about


def shifted_schedule(
    config: Mapping[str, Any], cells: int, steps: int, sigmas: Sequence[float] | None = None, mu: float | None = None
) -> FlowSchedule:
    """The grid of a pipeline's scheduler for an image size (static or resolution-dependent shift).

    Args:
        config: of the scheduler.
        cells: tokens of the image.
        steps: of the sampler.
        sigmas: times before the shift, as the pipeline rounds them; None: evenly spaced from 1 to 1 / steps.
        mu: the shift, as its logarithm; None: by the number of cells.

    Raises:
        UserError: the configuration makes no grid.
    """
    with about("scheduler/scheduler_config.json"):
        if mu is None:
            mu = calculate_shift(
                cells,
                config.get("base_image_seq_len", 256),
                config.get("max_image_seq_len", 4096),
                config.get("base_shift", 0.5),
                config.get("max_shift", 1.15),
            )
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps) if sigmas is None else sigmas, mu=mu)
    return FlowSchedule(scheduler.sigmas.double())
