"""The kernels' variants for ahead-of-time compilation."""

from collections.abc import Iterator

from pcpo_kernels.ops.guidance.triton import guidance_backward_kernel, guidance_forward_kernel
from pcpo_kernels.variant import LATENTS, Variant, build


def variants() -> Iterator[Variant]:
    """Guidance forward, and backward to both halves, by the dtype of the halves and of the result."""
    scale = {"scale": "fp32"}
    for dtype, result in (("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp16", "fp32"), ("fp32", "fp32")):
        name = dtype if result == dtype else f"{dtype}-{result}"
        halves = {"reference": dtype, "output": dtype}
        gradients = {"reference_gradient": dtype, "output_gradient": dtype}
        yield build(guidance_forward_kernel, name, halves, {"result": result}, scale, LATENTS)
        yield build(guidance_backward_kernel, name, {"incoming": result}, gradients, scale, LATENTS)
