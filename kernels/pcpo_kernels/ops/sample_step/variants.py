"""The kernel's variants for ahead-of-time compilation."""

from collections.abc import Iterator

from pcpo_kernels.ops.noise.variants import KEY
from pcpo_kernels.ops.sample_step.triton import sample_step_kernel
from pcpo_kernels.variant import LATENTS, Variant, build


def sample_step_variant(dtype: str, noise: str, latents: str = "fp32") -> Variant:
    """A sampler step with noise from a tensor or a key, or without noise; serves both reductions."""
    rows = dict.fromkeys(("a", "b", "std", "log_prob"), "fp32")
    loaded = {"latents": latents, "output": dtype}
    if noise != "none":
        rows |= {"partial_sums": "fp32", "counters": "i32"}
    if noise == "key":
        rows |= KEY
    elif noise == "tensor":
        loaded["noise"] = "fp32"
    name = f"{dtype}-{noise}" + ("" if latents == "fp32" else f"-{latents}")
    return build(sample_step_kernel, name, loaded, {"next_latents": latents}, rows, LATENTS, FINISH=128)


def variants() -> Iterator[Variant]:
    """The variants launched in a rollout, and some for other callers."""
    for dtype in ("bf16", "fp16", "fp32"):
        for noise in ("key", "none"):
            yield sample_step_variant(dtype, noise)
    yield sample_step_variant("bf16", "tensor")
    yield sample_step_variant("bf16", "key", latents="bf16")
