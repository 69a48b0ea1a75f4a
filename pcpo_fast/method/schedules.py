"""What a model says of the times it was trained on: the ground on which a sampler's table is built."""

from dataclasses import dataclass

from torch import Tensor

from pcpo_fast.method.transitions import PredictionType


@dataclass(frozen=True, eq=False)
class FlowSchedule:
    """A flow model, which predicts a velocity.

    Attributes:
        times: the grid of the pipeline's own scheduler, float64 [N + 1], from 1 (or near) down to 0.
    """

    times: Tensor


@dataclass(frozen=True, eq=False)
class DiffusionSchedule:
    """A diffusion model.

    Attributes:
        alphas_cumprod: of the training noise, float64 [T].
        timesteps: those of the pipeline's DDIM scheduler, int64 [N], decreasing.
        prediction: what the network's output means.
    """

    alphas_cumprod: Tensor
    timesteps: Tensor
    prediction: PredictionType = "epsilon"


Schedule = FlowSchedule | DiffusionSchedule
