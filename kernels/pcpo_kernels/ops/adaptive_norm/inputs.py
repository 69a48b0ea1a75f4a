"""The arguments of the three public functions as one tuple, shared by both backends."""

from typing import NamedTuple

from torch import Tensor


class Tokens(NamedTuple):
    """Tokens [B, S, C] and modulation [B, C]: a gated residual if there is a branch, a norm if there is a shift."""

    source: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None
    shift: Tensor | None = None
    scale: Tensor | None = None
    eps: float = 0.0
