"""The kernels' variants at the width of FLUX.2-klein, for ahead-of-time compilation."""

from collections.abc import Iterator

from pcpo_kernels.ops.swiglu.triton import swiglu_backward_kernel, swiglu_forward_kernel
from pcpo_kernels.variant import Variant, build

KLEIN = 9216  # channels of each half; others are compiled to the same code


def variants() -> Iterator[Variant]:
    """Forward and backward in bf16 and fp32; both halves move through one pointer."""
    for dtype in ("bf16", "fp32"):
        forward = build(swiglu_forward_kernel, dtype, {"x": dtype}, {"result": dtype}, {}, KLEIN)
        yield forward._replace(loaded_bytes=2 * forward.loaded_bytes)
        loaded = {"incoming": dtype, "x": dtype}
        backward = build(swiglu_backward_kernel, dtype, loaded, {"gradient": dtype}, {}, KLEIN)
        more = backward.stored_bytes
        yield backward._replace(loaded_bytes=backward.loaded_bytes + more, stored_bytes=2 * more)
