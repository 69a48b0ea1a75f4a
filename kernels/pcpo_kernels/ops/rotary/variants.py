"""The kernels' variants with the heads of FLUX, FLUX.2-dev and Stable Diffusion 3, for ahead-of-time compilation."""

from collections.abc import Iterator

from pcpo_kernels.ops.rotary.triton import norm_rope_backward_kernel, norm_rope_forward_kernel, tile_for
from pcpo_kernels.variant import Variant, build

HEADS, HEAD, SD3_HEAD = 24, 128, 64  # number of heads (FLUX.1, and Stable Diffusion 3), and elements per head
DEV_HEADS = 48  # of FLUX.2-dev; the 24 and 32 of FLUX.2-klein are compiled to the same code as FLUX.1's
BACKWARD_TOKENS = 16  # of a program, at 1024 x 1024


def norm_rope_forward(dtype: str, *, rope: bool = True, heads: int = HEADS) -> Variant:
    """Queries or keys of FLUX; without rotation, of Stable Diffusion 3."""
    rows = {"weight": dtype} | ({"cos": "fp32", "sin": "fp32"} if rope else {})
    return _build_heads(norm_rope_forward_kernel, dtype, {"x": dtype}, {"result": dtype}, rows, rope, heads)


def norm_rope_backward(dtype: str, *, frozen: bool, rope: bool = True, heads: int = HEADS) -> Variant:
    """The backward; frozen: no gradient for the weight."""
    rows = {"weight": dtype} | ({"cos": "fp32", "sin": "fp32"} if rope else {})
    name = dtype + ("-frozen" if frozen else "")
    rows |= {} if frozen else {"partials": "fp32"}
    bulk = {"incoming": dtype, "x": dtype}
    stored = {"gradient": dtype}
    return _build_heads(norm_rope_backward_kernel, name, bulk, stored, rows, rope, heads, TOKENS=BACKWARD_TOKENS)


def _build_heads(
    function: object,
    name: str,
    loaded: dict[str, str],
    stored: dict[str, str],
    rows: dict[str, str],
    rope: bool,
    count: int,
    **constants: float,
) -> Variant:
    (heads, size), warps = tile_for(count, HEAD if rope else SD3_HEAD, sums="partials" in rows)
    tile = {"HEADS": heads, "SIZE": size, "BLOCK": heads * size}
    name += ("" if rope else "-norope") + ("" if count == HEADS else f"-{count}")
    return build(function, name, loaded, stored, rows, count * HEAD, warps=warps, EPS=1e-6, **tile, **constants)


def variants() -> Iterator[Variant]:
    """The variants launched when FLUX, FLUX.2 or Stable Diffusion 3 is trained, in bf16 and fp32."""
    for rope in (True, False):
        yield norm_rope_forward("bf16", rope=rope)
        yield norm_rope_backward("bf16", frozen=True, rope=rope)
    yield norm_rope_backward("bf16", frozen=False)
    yield norm_rope_forward("bf16", heads=DEV_HEADS)
    for frozen in (True, False):
        yield norm_rope_backward("bf16", frozen=frozen, heads=DEV_HEADS)
    yield norm_rope_forward("fp32")
    yield norm_rope_backward("fp32", frozen=False)
