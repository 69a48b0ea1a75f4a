"""The kernel variants that a trainer launches, as signatures for ahead-of-time compilation."""

# mypy: disallow-any-generics=False

from collections.abc import Iterator

from pcpo_kernels.ops.adaptive_norm.variants import block_variants
from pcpo_kernels.ops.guidance.triton import guidance_backward_kernel, guidance_forward_kernel
from pcpo_kernels.ops.noise.triton import philox_normal_kernel
from pcpo_kernels.ops.policy_loss.triton import (
    BACKWARD_POINTERS,
    FORWARD_POINTERS,
    policy_loss_backward_kernel,
    policy_loss_forward_kernel,
)
from pcpo_kernels.ops.sample_step.triton import ROW_POINTERS, sample_step_kernel
from pcpo_kernels.variant import SIZES, Variant, build

FLUX = 128 * 128 * 16  # elements of a row of FLUX latents at 1024 x 1024
DEMO = 512  # of the tiny pipeline that the demonstration trains
LONG = 1 << 21  # a row so long that a program takes several blocks
NOISE_POINTERS = {
    "key": {"seed": "i64", "offset": "i64"},
    "endpoints": {"noise": "fp32", "next_latents": "fp32", "a": "fp32", "b": "fp32", "std": "fp32"},
    "tensor": {"noise": "fp32"},
}


def _types(names: list[str], **others: str) -> dict[str, str]:
    return {name: others.get(name, "fp32") for name in names}


def policy_loss_variants(dtype: str, noise: str, extras: str = "", *, elements: int = FLUX) -> tuple[Variant, Variant]:
    """Forward and backward of one kind of call; either objective and reduction.

    Args:
        dtype: of the output, and of what goes with it: old and reference outputs and the unconditional half.
        noise: "key", "endpoints", "tensor", or "detached": endpoints without an old output.
        extras: "kl", "cfg", "kl-cfg" or nothing. With classifier-free guidance the old and the reference output are
            float32, as :func:`pcpo_kernels.guidance` makes them for a log-ratio of exactly 0 on-policy.
        elements: of a row.
    """
    detached = noise == "detached"
    given = NOISE_POINTERS["endpoints" if detached else noise]
    combined = "fp32" if "cfg" in extras else dtype
    bulk = {"output": dtype}
    if not detached:
        bulk["old_output"] = combined
    bulk |= {name: kind for name, kind in given.items() if name in ("noise", "next_latents")}
    if "kl" in extras:
        bulk["reference"] = combined
    if "cfg" in extras:
        bulk["unconditional"] = dtype
    small = {name: kind for name, kind in given.items() if name not in ("noise", "next_latents")}
    if "cfg" in extras:
        small["guidance_scale"] = "fp32"
    name = "-".join(
        part for part in (dtype, noise, extras, *(["row" + str(elements)] if elements != FLUX else [])) if part
    )

    forward_rows = small | _types([p for p in FORWARD_POINTERS if p not in BACKWARD_POINTERS[:6]])
    forward_rows |= {"counters": "i32", "clipped_out": "i1"}
    if "kl" not in extras:
        del forward_rows["kl"]
    # On-policy, the forward reads the output for the distance to the reference alone.
    read = bulk
    if detached:
        read = {n: k for n, k in bulk.items() if "kl" in extras and n not in ("noise", "next_latents")}
    dead = {n: k for n, k in bulk.items() if n not in read}
    forward = build(policy_loss_forward_kernel, name, bulk, {}, forward_rows, elements, CLIP_RANGE=1e-4, FINISH=128)
    unread = forward.constants["BLOCK"] * sum(SIZES[kind] for kind in dead.values())
    forward = forward._replace(loaded_bytes=forward.loaded_bytes - unread)
    written = {"gradient": dtype} | ({"unconditional_gradient": dtype} if "cfg" in extras else {})
    backward = build(
        policy_loss_backward_kernel,
        name,
        bulk,
        written,
        small | {"statistics": "fp32", "grad_loss": "fp32"},
        elements,
    )
    return forward, backward


def sample_step_variant(dtype: str, noise: str, latents: str = "fp32") -> Variant:
    """A sampler step with given, made or no noise."""
    rows = _types([name for name in ROW_POINTERS if name not in ("seed", "offset")], counters="i32")
    loaded = {"latents": latents, "output": dtype}
    if noise == "key":
        rows |= NOISE_POINTERS["key"]
    elif noise == "tensor":
        loaded["noise"] = "fp32"
    else:
        del rows["partial_sums"], rows["counters"]
    name = f"{dtype}-{noise}" + ("" if latents == "fp32" else f"-{latents}")
    return build(sample_step_kernel, name, loaded, {"next_latents": latents}, rows, FLUX, MEAN=True, FINISH=128)


def guidance_variants(dtype: str, result: str) -> tuple[Variant, Variant]:
    """Guidance forward, and backward to both halves."""
    name = dtype if result == dtype else f"{dtype}-{result}"
    halves = {"reference": dtype, "output": dtype}
    gradients = {"reference_gradient": dtype, "output_gradient": dtype}
    scale = {"scale": "fp32"}
    return (
        build(guidance_forward_kernel, name, halves, {"result": result}, scale, FLUX),
        build(guidance_backward_kernel, name, {"incoming": result}, gradients, scale, FLUX),
    )


def all_variants() -> Iterator[Variant]:
    """Every variant that a trainer launches (bf16 or fp32 models), and some of other callers."""
    for noise in ("key", "endpoints", "detached"):
        for dtype in ("bf16", "fp32"):
            for extras in ("", "kl", "cfg", "kl-cfg"):
                yield from policy_loss_variants(dtype, noise, extras)
        for extras in ("", "kl-cfg"):
            yield from policy_loss_variants("fp32", noise, extras, elements=DEMO)
        yield from policy_loss_variants("fp16", noise)
    yield from policy_loss_variants("fp16", "endpoints", "kl-cfg")
    yield from policy_loss_variants("bf16", "tensor")
    yield from policy_loss_variants("bf16", "endpoints", elements=LONG)
    for dtype in ("bf16", "fp16", "fp32"):
        for noise in ("key", "none"):
            yield sample_step_variant(dtype, noise)
    yield sample_step_variant("bf16", "tensor")
    yield sample_step_variant("bf16", "key", latents="bf16")
    for dtype, result in (("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp16", "fp32"), ("fp32", "fp32")):
        yield from guidance_variants(dtype, result)
    yield build(philox_normal_kernel, "fp32", {}, {"result": "fp32"}, NOISE_POINTERS["key"], FLUX)
    yield from block_variants()
