"""The arguments of the norm and rotation of heads as one tuple, as both backends take them."""

from typing import NamedTuple

from torch import Tensor


class Heads(NamedTuple):
    """The arguments of :func:`pcpo_kernels.norm_rope`, which says what each of them is."""

    x: Tensor
    weight: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    second: Tensor | None
    second_weight: Tensor | None
    eps: float
