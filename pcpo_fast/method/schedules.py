"""A model's training schedule, from which sampler tables are built."""

from dataclasses import dataclass

from torch import Tensor

from pcpo_fast.method.transitions import PredictionType


@dataclass(frozen=True, eq=False)
class FlowSchedule:
    """Schedule of a flow model, which predicts a velocity.

    Attributes:
        times: the grid of the pipeline's own scheduler, float64 [N + 1], from 1 (or slightly less) down to 0.
    """

    times: Tensor


@dataclass(frozen=True, eq=False)
class DiffusionSchedule:
    """Schedule of a diffusion model.

    Attributes:
        alphas_cumprod: cumulative alphas of training, float64 [T].
        timesteps: timesteps of the pipeline's DDIM scheduler, int64 [N], decreasing.
        prediction: what the network predicts.
    """

    alphas_cumprod: Tensor
    timesteps: Tensor
    prediction: PredictionType = "epsilon"


Schedule = FlowSchedule | DiffusionSchedule
