"""The times that diffusers' pipelines of flow models run through."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from pcpo_fast.method.schedules import FlowSchedule
from pcpo_fast.policies.part_checks import about


def scheduler_times(
    config: Mapping[str, Any], steps: int, mu: float | None = None, sigmas: Sequence[float] | None = None
) -> FlowSchedule:
    """The grid of a pipeline's scheduler.

    Args:
        config: of the scheduler.
        steps: of the sampler.
        mu: the logarithm of the shift, for a scheduler whose shift is not always the same.
        sigmas: times before the shift, as the pipeline rounds them; None: evenly spaced from 1 to 1 / steps.

    Raises:
        UserError: the configuration makes no grid.
    """
    with about("scheduler/scheduler_config.json"):
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps) if sigmas is None else sigmas, mu=mu)
    return FlowSchedule(scheduler.sigmas.double())


def shifted_schedule(
    config: Mapping[str, Any], cells: int, steps: int, sigmas: Sequence[float] | None = None
) -> FlowSchedule:
    """The grid of a pipeline's scheduler for an image of so many cells (static or resolution-dependent shift).

    Arguments and errors as for :func:`scheduler_times`.
    """
    with about("scheduler/scheduler_config.json"):
        mu = calculate_shift(
            cells,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
    return scheduler_times(config, steps, mu, sigmas)
