"""GPUs by name: memory, and the rate of dense bf16 products with sums in float32, from data sheets."""

import re
from typing import NamedTuple

from pcpo_fast.errors import UserError


class Card(NamedTuple):
    """One GPU: memory in 1e9 bytes, rate in 1e12 operations per second."""

    memory_gb: float
    peak_tflops: float


CARDS = {
    "3090": Card(24, 71),
    "4090": Card(24, 165),
    "5090": Card(32, 209),
    "L40S": Card(48, 362),
    "A100": Card(80, 312),
    "H100": Card(80, 989),
    "H200": Card(141, 989),
    "B200": Card(180, 2250),
}
"""NVIDIA's GA102, Ada and RTX Blackwell white papers; data sheets of L40S, A100 80GB, H100 SXM, H200 and HGX B200."""


MFU = 0.35
"""Share of the peak rate that a run is assumed to reach where nobody says another. One step on an H200 reached 0.53,
with compiled blocks (docs/performance.md)."""


def find_card(name: str) -> Card:
    """A card by its name, in any case.

    Raises:
        UserError: there is none of this name.
    """
    if name.upper() not in CARDS:
        from pcpo_fast.config.messages import did_you_mean  # loads what --help can do without

        raise UserError(
            f"--gpu: must be one of {', '.join(CARDS)}, got {name!r}{did_you_mean(name.upper(), CARDS)} "
            "(another GPU: --gpu-memory and --peak-tflops)"
        )
    return CARDS[name.upper()]


def card_of(device_name: str) -> Card | None:
    """The card that CUDA calls by this name; None for one that is not listed, or for a slower or faster relative."""
    for name, card in CARDS.items():
        if re.search(rf"\b{name}\b(?!.*\b(Ti|D|PCIe|NVL|Laptop)\b)", device_name):
            return card
    return None
