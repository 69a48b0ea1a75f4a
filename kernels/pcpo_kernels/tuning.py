"""How the norms' kernels cut their work: as measured on this GPU where that was done, by a rule elsewhere."""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch
import triton

TABLE = Path(__file__).with_name("tuned.json")
"""Measured plans by the GPU's name, then by launch; written by ``benchmarks/tune_norms.py``."""
IMAGES = {"forward-norm": 1, "forward-residual": 2, "forward-residual-norm": 2}
IMAGES |= {"backward-norm-frozen": 2, "backward-residual-frozen": 1, "backward-residual-norm-frozen": 3}
"""What a launch reads of each token, of the launches that keep no sums."""
MOST_SHARED = 48 << 10
"""Bytes of tokens on their way to a program: four programs of 48 KiB fit on a multiprocessor of an H100."""


class NormPlan(NamedTuple):
    """How a kernel takes its tokens, one after the other.

    Attributes:
        STAGES: 1: each token is waited for; 3: the next two are on their way to shared memory.
        PARTS: blocks of a token's channels.
        BLOCK: channels of a block, a power of 2; ``PARTS * BLOCK`` are no fewer than the channels.
        warps: of a program.
    """

    STAGES: int
    PARTS: int
    BLOCK: int
    warps: int


@functools.cache
def norm_plan(launched: str, channels: int, size: int, device: torch.device) -> NormPlan:
    """The plan of a launch on a device.

    It depends on nothing else, so an image's results have the same bits in a batch of any size.

    Args:
        launched: direction and kind, such as ``forward-norm`` or ``backward-residual-norm-frozen``.
        channels: of a token.
        size: bytes of an element.
        device: of the tensors.
    """
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    measured = json.loads(TABLE.read_text(encoding="utf-8")).get(card, {}).get(f"{launched}-{channels}x{size}")
    return default_plan(launched, channels, size) if measured is None else NormPlan(*measured)


def default_plan(launched: str, channels: int, size: int) -> NormPlan:
    """Where nothing was measured.

    The next tokens are on their way where they fit into shared memory, and then 24 channels per thread are taken where
    three quarters of a power of 2 are enough, as for FLUX's 3072 channels: no lane is idle, and 12 warps fit on a
    multiprocessor. A launch that keeps sums for shift, scale or gate needs its registers for them: 16 channels per
    thread, 8 with three sums.
    """
    whole = triton.next_power_of_2(channels)
    images = IMAGES.get(launched)

    def fit(channels: int) -> bool:
        return images is not None and 2 * images * channels * size <= MOST_SHARED

    if whole >= 128 and channels <= 3 * whole // 4 and fit(3 * whole // 4):
        return NormPlan(3, 3, whole // 4, max(1, whole // 1024))
    most = 16 if launched == "backward-residual-norm" or whole > 4096 else 8
    return NormPlan(3 if fit(whole) else 1, 1, whole, min(most, max(1, whole // 256)))
