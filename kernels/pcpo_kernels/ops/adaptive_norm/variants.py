"""The kernels' variants for ahead-of-time compilation, at the widths of FLUX, FLUX.2-dev and Stable Diffusion 3."""

from collections.abc import Iterator

from pcpo_kernels.ops.adaptive_norm.triton import (
    BOTH,
    FORWARD_TOKENS,
    NORM,
    RESIDUAL,
    adaptive_norm_backward_kernel,
    adaptive_norm_forward_kernel,
)
from pcpo_kernels.sums import SUM_COLUMNS, SUM_ROWS, token_sums_kernel
from pcpo_kernels.tuning import default_plan
from pcpo_kernels.variant import SIZES, Variant, build

FLUX, KLEIN, DEV, SD3 = 3072, 4096, 6144, 1536  # channels; FLUX.2-klein's smaller model has FLUX's
BACKWARD_TOKENS = 16  # of a program, at 1024 x 1024


def adaptive_norm_forward(dtype: str, kind: str, channels: int = FLUX) -> Variant:
    """The three public functions: a modulated norm, a gated residual, or both."""
    loaded = {"source": dtype}
    stored: dict[str, str] = {}
    rows: dict[str, str] = {}
    if kind in (RESIDUAL, BOTH):
        loaded |= {"branch": dtype, "gate": dtype}
        stored["hidden"] = dtype
    if kind in (NORM, BOTH):
        loaded |= {"shift": dtype, "scale": dtype}
        stored["normed"] = dtype
        rows = {"mean": "fp32", "rstd": "fp32"}
    name = f"{dtype}-{kind}" + ("" if channels == FLUX else f"-{channels}")
    return _build(
        f"forward-{kind}",
        adaptive_norm_forward_kernel,
        name,
        loaded,
        stored,
        rows,
        channels,
        EPS=1e-6,
        TOKENS=FORWARD_TOKENS,
    )


def adaptive_norm_backward(dtype: str, kind: str, *, frozen: bool, channels: int = FLUX) -> Variant:
    """The backward; frozen: no gradient for the modulation, as in LoRA training."""
    loaded: dict[str, str] = {}
    stored: dict[str, str] = {}
    rows: dict[str, str] = {}
    slots = dict.fromkeys(("SHIFT", "SCALE", "GATE"), -1)
    wanted: list[str] = []
    if kind in (NORM, BOTH):
        loaded |= {"grad_normed": dtype, "hidden": dtype, "scale": dtype}
        stored["grad_source"] = dtype
        rows = {"mean": "fp32", "rstd": "fp32"}
        wanted += ["SHIFT", "SCALE"]
    if kind in (RESIDUAL, BOTH):
        loaded |= {"grad_hidden": dtype, "gate": dtype}
        stored["grad_branch"] = dtype
        wanted.append("GATE")
    if not frozen:
        slots |= {name: slot for slot, name in enumerate(wanted)}
        stored["partials"] = "fp32"
        if "GATE" in wanted:
            loaded["branch"] = dtype
    name = f"{dtype}-{kind}" + ("-frozen" if frozen else "") + ("" if channels == FLUX else f"-{channels}")
    launched = f"backward-{kind}" + ("-frozen" if frozen else "")
    variant = _build(
        launched, adaptive_norm_backward_kernel, name, loaded, stored, rows, channels, TOKENS=BACKWARD_TOKENS, **slots
    )
    more = 0 if frozen else 4 * (len(wanted) - 1) * variant.block
    return variant._replace(stored_bytes=variant.stored_bytes + more)


def _build(
    launched: str,
    function: object,
    name: str,
    loaded: dict[str, str],
    stored: dict[str, str],
    rows: dict[str, str],
    channels: int,
    **constants: float,
) -> Variant:
    plan = default_plan(launched, channels, SIZES[name[:4]])
    constants |= {"STAGES": plan.STAGES, "CHANNELS": channels, "PARTS": plan.PARTS, "BLOCK": plan.BLOCK}
    return build(function, name, loaded, stored, rows, channels, warps=plan.warps, **constants)


def token_sums(dtype: str) -> Variant:
    """The kernel that adds partial sums; its few stores are narrow."""
    tile = {"ROWS": SUM_ROWS, "COLUMNS": SUM_COLUMNS, "BLOCK": SUM_ROWS * SUM_COLUMNS}
    variant = build(token_sums_kernel, dtype, {"partials": "fp32"}, {"result": dtype}, {}, FLUX, warps=4, **tile)
    return variant._replace(stored_bytes=0)


def variants() -> Iterator[Variant]:
    """The variants launched when FLUX, FLUX.2 or Stable Diffusion 3 is trained, in bf16 and fp32."""
    for kind in (NORM, RESIDUAL, BOTH):
        yield adaptive_norm_forward("bf16", kind)
        for frozen in (True, False):
            yield adaptive_norm_backward("bf16", kind, frozen=frozen)
    yield adaptive_norm_forward("bf16", BOTH, SD3)
    yield adaptive_norm_backward("bf16", BOTH, frozen=False, channels=SD3)
    yield adaptive_norm_forward("bf16", BOTH, KLEIN)
    yield adaptive_norm_backward("bf16", BOTH, frozen=True, channels=KLEIN)
    yield adaptive_norm_forward("bf16", BOTH, DEV)
    for frozen in (True, False):
        yield adaptive_norm_backward("bf16", BOTH, frozen=frozen, channels=DEV)
    yield adaptive_norm_backward("bf16", NORM, frozen=False, channels=DEV)  # whose threads have the most to hold
    yield adaptive_norm_forward("fp32", BOTH)
    yield adaptive_norm_backward("fp32", BOTH, frozen=False)
    for dtype in ("bf16", "fp32"):
        yield token_sums(dtype)
