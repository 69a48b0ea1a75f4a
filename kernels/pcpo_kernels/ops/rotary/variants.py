"""The kernels' variants with the heads of FLUX and of Stable Diffusion 3, for ahead-of-time compilation."""

from collections.abc import Iterator

from pcpo_kernels.ops.rotary.triton import norm_rope_backward_kernel, norm_rope_forward_kernel, tile_for
from pcpo_kernels.variant import Variant, build

HEADS, HEAD, SD3_HEAD = 24, 128, 64  # number of heads (both models), and elements per head
BACKWARD_TOKENS = 16  # of a program, at 1024 x 1024


def norm_rope_forward(dtype: str, *, rope: bool = True) -> Variant:
    """Queries or keys of FLUX; without rotation, of Stable Diffusion 3."""
    rows = {"weight": dtype} | ({"cos": "fp32", "sin": "fp32"} if rope else {})
    return _build_heads(norm_rope_forward_kernel, dtype, {"x": dtype}, {"result": dtype}, rows, rope)


def norm_rope_backward(dtype: str, *, frozen: bool, rope: bool = True) -> Variant:
    """The backward; frozen: no gradient for the weight."""
    rows = {"weight": dtype} | ({"cos": "fp32", "sin": "fp32"} if rope else {})
    name = dtype + ("-frozen" if frozen else "")
    rows |= {} if frozen else {"partials": "fp32"}
    bulk = {"incoming": dtype, "x": dtype}
    return _build_heads(norm_rope_backward_kernel, name, bulk, {"gradient": dtype}, rows, rope, TOKENS=BACKWARD_TOKENS)


def _build_heads(
    function: object,
    name: str,
    loaded: dict[str, str],
    stored: dict[str, str],
    rows: dict[str, str],
    rope: bool,
    **constants: float,
) -> Variant:
    (heads, size), warps = tile_for(HEADS, HEAD if rope else SD3_HEAD)
    tile = {"HEADS": heads, "SIZE": size, "BLOCK": heads * size}
    name += "" if rope else "-norope"
    return build(function, name, loaded, stored, rows, HEADS * HEAD, warps=warps, EPS=1e-6, **tile, **constants)


def variants() -> Iterator[Variant]:
    """The variants launched when FLUX or Stable Diffusion 3 is trained, in bf16 and fp32."""
    for rope in (True, False):
        yield norm_rope_forward("bf16", rope=rope)
        yield norm_rope_backward("bf16", frozen=True, rope=rope)
    yield norm_rope_backward("bf16", frozen=False)
    yield norm_rope_forward("fp32")
    yield norm_rope_backward("fp32", frozen=False)
