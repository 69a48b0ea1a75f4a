"""Counter-based Gaussian noise: Philox4x32-10 integers and a bounded Box-Muller transform, in plain PyTorch.

The integers follow Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011): element ``n`` of the
stream with key ``seed`` is lane ``n % 4`` of the block at counter ``(n // 4, 0)``. Lanes are turned into normals in
pairs, ``(0, 1)`` and ``(2, 3)``.
"""

import math

import torch
from torch import Tensor

from pcpo_kernels.arithmetic import per_row
from pcpo_kernels.types import Endpoints, NoiseKey

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def philox_uint32(seed: Tensor, counter: Tensor) -> Tensor:
    """The four 32-bit words of each Philox4x32-10 block.

    Args:
        seed: int64 key, broadcastable with ``counter``; its low and high words are the two key words.
        counter: int64 block index; its low and high words are the first two counter words, the other two are 0.

    Returns:
        int64 tensor ``[*broadcast, 4]`` with values in ``[0, 2^32)``.
    """
    seed, counter = torch.broadcast_tensors(seed, counter)
    zero = torch.zeros_like(counter)
    return torch.stack(philox_rounds((counter & MASK, (counter >> 32) & MASK, zero, zero), seed), dim=-1)


def philox_rounds(words: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten Philox rounds over four int64 tensors holding 32-bit words, with a 64-bit key."""
    c0, c1, c2, c3 = words
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(10):
        # The 64-bit products wrap in int64, but their bits are right, so shift and mask give both halves. The low
        # halves need no mask, because they are only combined with words that are masked afterwards.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = (p1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(MASK)
        c2 = (p0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(MASK)
        c1, c3 = p1, p0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1 & MASK, c2, c3 & MASK


def normal_pairs(words: Tensor) -> Tensor:
    """Box-Muller on the last axis, in pairs ``(radius word, angle word)``.

    Of both words the upper 24 bits are used, centred in their cell: ``u = (word >> 8) 2^-24 + 2^-25``, so
    ``|z| < 5.9``. Computed in float64 and rounded once: the reference for the kernels' float32 version.

    Args:
        words: int64 ``[..., 4]`` with values in ``[0, 2^32)``.

    Returns:
        float32 ``[..., 4]``.
    """
    uniform = (words >> 8).to(torch.float64) * 2.0**-24 + 2.0**-25
    radius = torch.sqrt(-2.0 * torch.log(uniform[..., 0::2]))
    angle = (2.0 * math.pi) * uniform[..., 1::2]
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.flatten(-2).to(torch.float32)


def philox_normal(seed: Tensor, offset: Tensor, count: int) -> Tensor:
    """Plain PyTorch version of :func:`pcpo_kernels.philox_normal`."""
    rows = seed.shape[0]
    if count == 0 or rows == 0:
        return torch.zeros(rows, count, device=seed.device)
    # One extra block, because a row may start inside a block.
    blocks = torch.arange((count + 3) // 4 + 1, device=seed.device)
    words = philox_uint32(seed[:, None], (offset // 4)[:, None] + blocks)
    normals = normal_pairs(words).flatten(1)
    lanes = (offset % 4)[:, None] + torch.arange(count, device=seed.device)
    return normals.gather(1, lanes)


def resolve_noise(noise: Tensor | NoiseKey | Endpoints, old_output: Tensor) -> Tensor:
    """The step's noise as a tensor with the shape and dtype of ``old_output``, from any of its three forms."""
    if isinstance(noise, NoiseKey):
        count = math.prod(old_output.shape[1:])
        return philox_normal(noise.seed, noise.offset, count).reshape(old_output.shape).to(old_output.dtype)
    if isinstance(noise, Endpoints):
        mean = (
            per_row(noise.a, old_output) * noise.latents.to(old_output.dtype)
            + per_row(noise.b, old_output) * old_output
        )
        return (noise.next_latents.to(old_output.dtype) - mean) / per_row(noise.std, old_output)
    return noise.to(old_output.dtype)
