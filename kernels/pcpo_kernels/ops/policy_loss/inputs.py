"""The arguments of the policy loss as one tuple, as both backends take them."""

from typing import NamedTuple

from torch import Tensor

from pcpo_kernels.types import Endpoints, NoiseKey, Objective, Reduction


class LossInputs(NamedTuple):
    """The arguments of :func:`pcpo_kernels.policy_loss`, which says what each of them is."""

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
