"""The kernels' variants for ahead-of-time compilation."""

# mypy: disallow-any-generics=False

from collections.abc import Iterator

from pcpo_kernels.ops.noise.variants import KEY
from pcpo_kernels.ops.policy_loss.triton import (
    BACKWARD_ROWS,
    FORWARD_ROWS,
    policy_loss_backward_kernel,
    policy_loss_forward_kernel,
)
from pcpo_kernels.variant import LATENTS, SIZES, Variant, build

DEMO = 512  # elements of a row of the tiny pipeline that the demonstration trains
LONG = 1 << 21  # a row for which a program processes several blocks
NOISE_POINTERS = {
    "key": KEY,
    "endpoints": {"noise": "fp32", "next_latents": "fp32", "a": "fp32", "b": "fp32", "std": "fp32"},
    "tensor": {"noise": "fp32"},
}


def policy_loss_variants(
    dtype: str, noise: str, extras: str = "", *, elements: int = LATENTS
) -> tuple[Variant, Variant]:
    """Forward and backward of one kind of call; each serves all clip ranges, objectives and reductions.

    Args:
        dtype: dtype of the output, the old and reference outputs and the unconditional half.
        noise: "key", "endpoints", "tensor", or "detached" (endpoints without an old output).
        extras: "kl", "cfg", "kl-cfg" or "". With classifier-free guidance the old and the reference output are float32,
            as computed by :func:`pcpo_kernels.guidance` for a log-ratio of exactly 0 on-policy.
        elements: elements per row.
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
        part for part in (dtype, noise, extras, *(["row" + str(elements)] if elements != LATENTS else [])) if part
    )

    forward_rows = small | dict.fromkeys(FORWARD_ROWS, "fp32") | {"counters": "i32", "clipped_out": "i1"}
    if "kl" not in extras:
        del forward_rows["kl"]
    # Without an old output, the forward reads the output only for its distance to the reference.
    read = bulk
    if detached:
        read = {n: k for n, k in bulk.items() if "kl" in extras and n not in ("noise", "next_latents")}
    dead = {n: k for n, k in bulk.items() if n not in read}
    forward = build(policy_loss_forward_kernel, name, bulk, {}, forward_rows, elements, FINISH=128)
    unread = forward.constants["BLOCK"] * sum(SIZES[kind] for kind in dead.values())
    forward = forward._replace(loaded_bytes=forward.loaded_bytes - unread)
    written = {"gradient": dtype} | ({"unconditional_gradient": dtype} if "cfg" in extras else {})
    backward = build(
        policy_loss_backward_kernel,
        name,
        bulk,
        written,
        small | dict.fromkeys(BACKWARD_ROWS, "fp32"),
        elements,
    )
    return forward, backward


def variants() -> Iterator[Variant]:
    """The variants launched by the trainer (bf16 or fp32 models), and some for other callers."""
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
