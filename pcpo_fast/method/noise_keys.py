"""Names for random numbers: a 64-bit key from the integers that say what the number is for.

The key of an image's noise holds (seed, epoch, group, image), so a rollout is the same for every batch size, rank
and device. blake2b spreads nearby integers over all keys.
"""

import hashlib
import struct
from enum import IntEnum


class Purpose(IntEnum):
    """What a key is for; part of every key, so that two uses never share a stream."""

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
    """A signed 64-bit key, fit for an int64 tensor, from a purpose and integers of less than 2^63 in magnitude."""
    packed = struct.pack(f"<{len(parts) + 1}q", purpose, *parts)
    return int(struct.unpack("<q", hashlib.blake2b(packed, digest_size=8).digest())[0])
