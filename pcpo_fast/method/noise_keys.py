"""Keys of random streams: 64-bit keys derived from the integers that identify a use of randomness.

The key of an image's noise is derived from (seed, epoch, group, image), so a rollout is the same for every batch size,
rank and device. blake2b maps nearby integers to unrelated keys.
"""

import hashlib
import struct
from enum import IntEnum


class Purpose(IntEnum):
    """The purpose of a key. It is part of every key, so that different uses never share a stream."""

    INITIAL_NOISE = 0
    STEP_NOISE = 1
    EPOCH_PLAN = 2
    TRAINED_STEPS = 3
    EVALUATION_INITIAL_NOISE = 4
    EVALUATION_STEP_NOISE = 5
    OPTIMIZER = 6
    MODEL = 7
    WINDOW = 8
    AUDIT = 9
    AUDIT_NOISE = 10
    CONTROL = 11


def random_key(purpose: Purpose, *parts: int) -> int:
    """A signed 64-bit key (for an int64 tensor) from a purpose and integers below 2^63 in magnitude."""
    packed = struct.pack(f"<{len(parts) + 1}q", purpose, *parts)
    return int(struct.unpack("<q", hashlib.blake2b(packed, digest_size=8).digest())[0])
