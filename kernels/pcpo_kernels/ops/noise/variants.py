"""The kernel's variant for ahead-of-time compilation."""

from collections.abc import Iterator

from pcpo_kernels.ops.noise.triton import philox_normal_kernel
from pcpo_kernels.variant import LATENTS, Variant, build

KEY = {"seed": "i64", "offset": "i64"}  # the pointers of a NoiseKey


def variants() -> Iterator[Variant]:
    """Noise as a tensor."""
    yield build(philox_normal_kernel, "fp32", {}, {"result": "fp32"}, KEY, LATENTS)
