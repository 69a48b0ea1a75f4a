"""The arguments of the policy loss as one tuple, shared by both backends."""

from typing import NamedTuple

from torch import Tensor

from pcpo_kernels.types import Endpoints, NoiseKey, Objective, Reduction


class LossInputs(NamedTuple):
    """The arguments of :func:`pcpo_kernels.policy_loss`, documented there."""

    output: Tensor
    old_output: Tensor | None
    noise: Tensor | NoiseKey | Endpoints
    linear: Tensor
    quadratic: Tensor
    scale: Tensor
    advantage: Tensor
    clip_range: float
    objective: Objective
    reduction: Reduction
    reference: Tensor | None
    kl: Tensor | None
    divergence: Tensor | None
    unconditional: Tensor | None
    guidance_scale: Tensor | None
