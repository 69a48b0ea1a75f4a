"""The arguments of norm and rotation of heads as one tuple, shared by both backends."""

from typing import NamedTuple

from torch import Tensor


class Heads(NamedTuple):
    """The arguments of :func:`pcpo_kernels.norm_rope`, documented there."""

    x: Tensor
    weight: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    second: Tensor | None
    second_weight: Tensor | None
    eps: float
