"""Measure the transformer-block ops on a GPU; the JSON file is updated after each case.

    python benchmarks/block_ops.py --out benchmarks/results/my_gpu

Ours, eager PyTorch as diffusers writes the same chain, and torch.compile of that; forward, and forward and backward
with frozen modulation (LoRA) or with all gradients; at the widths and lengths of FLUX, FLUX.2 and Stable Diffusion 3.5.
`pcpo_kernels.accelerate` is worthwhile where `ours` is faster than `compiled`.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import torch
from kernel_times import Clock, measure, options, run
from pcpo_kernels import gated_residual, gated_residual_norm, modulated_norm, norm_rope, swiglu
from torch import Tensor
from torch.nn import functional

EPS = 1e-6


class Shape(NamedTuple):
    """A model's width and a sequence."""

    name: str
    images: int
    text: int
    image: int
    heads: int
    size: int

    @property
    def channels(self) -> int:
        return self.heads * self.size


SHAPES = [
    Shape(f"{name}-x{images}", images, *rest)
    for images in (4, 1, 8)
    for name, *rest in (
        ("flux_720", 512, 2025, 24, 128),
        ("flux_1024", 512, 4096, 24, 128),
        ("sd35_1024", 333, 4096, 38, 64),
        ("klein_9b_1024", 512, 4096, 32, 128),
    )
]
"""The case of our own training step comes first."""
TINY = [Shape("tiny", 2, 3, 5, 2, 8)]


def eager_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLayerNormZero of diffusers."""
    return functional.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def eager_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """The end of a block."""
    return x + gate.unsqueeze(1) * branch


def eager_residual_norm(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The middle of a block."""
    x = x + gate.unsqueeze(1) * branch
    return x, eager_norm(x, shift, scale)


def eager_heads(text: Tensor, text_weight: Tensor, image: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys of a double block: norms, joining, rotation in float32."""
    parts = ((text, text_weight), (image, weight))
    x = torch.cat([functional.rms_norm(part, part.shape[-1:], factor, EPS) for part, factor in parts], dim=1)
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((-imaginary, real), dim=-1).flatten(3)
    return (x.float() * cos[:, None] + rotated.float() * sin[:, None]).to(x.dtype)


def our_heads(text: Tensor, text_weight: Tensor, image: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same in one op."""
    return norm_rope(text, text_weight, cos, sin, EPS, second=image, second_weight=weight)


def eager_swiglu(x: Tensor) -> Tensor:
    """FLUX.2's activation."""
    half = x.shape[-1] // 2
    return functional.silu(x[..., :half]) * x[..., half:]


class Op(NamedTuple):
    """An op: ours, eager, how many leading inputs are tokens, and passes over them (forward, frozen, all gradients).

    A pass reads or writes one [B, S, C] tensor.
    """

    ours: Callable[..., Any]
    eager: Callable[..., Any]
    bulk: int
    passes: tuple[int, int, int]


OPS = {
    "modulated_norm": Op(lambda x, shift, scale: modulated_norm(x, shift, scale, EPS), eager_norm, 1, (2, 5, 5)),
    "gated_residual": Op(gated_residual, eager_residual, 2, (3, 5, 6)),
    "gated_residual_norm": Op(lambda *inputs: gated_residual_norm(*inputs, EPS), eager_residual_norm, 2, (4, 9, 10)),
    "norm_rope": Op(our_heads, eager_heads, 1, (2, 5, 5)),
    "swiglu": Op(swiglu, eager_swiglu, 1, (9, 24, 24)),
}
WIDER = 3
"""The channels of FLUX.2's MLP are so many times those of its tokens."""


def op_inputs(name: str, shape: Shape, device: torch.device) -> tuple[list[Tensor], list[int], list[int]]:
    """Inputs in bf16, and the indices of those that need a gradient: with LoRA, and in full training."""

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=torch.bfloat16)

    tokens = shape.text + shape.image
    if name == "norm_rope":
        angles = torch.rand(tokens, shape.size // 2, device=device).repeat_interleave(2, dim=1)
        text, image = (normal(shape.images, count, shape.heads, shape.size) for count in (shape.text, shape.image))
        weights = normal(2, shape.size).unbind(0)
        return [text, weights[0], image, weights[1], angles.cos(), angles.sin()], [0, 2], [0, 1, 2, 3]
    if name == "swiglu":
        return [normal(shape.images, tokens, 2 * WIDER * shape.channels)], [0], [0]
    bulk = [normal(shape.images, tokens, shape.channels) for _ in range(OPS[name].bulk)]
    rows = {"modulated_norm": 2, "gated_residual": 1, "gated_residual_norm": 3}[name]
    modulation = normal(shape.images, rows * shape.channels).chunk(rows, dim=1)
    inputs = [*bulk, *modulation]
    return inputs, list(range(len(bulk))), list(range(len(inputs)))


def of_shape(clock: Clock, shape: Shape, copy: float) -> Iterator[dict[str, Any]]:
    """Ours and eager of every op, and only then what has to be compiled, since that may take the time of all others."""
    for kinds in (("ours", "eager"), ("compiled",)):
        for name in OPS:
            yield from records(clock, shape, name, copy, kinds)


def records(clock: Clock, shape: Shape, name: str, copy: float, kinds: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Some kinds of an op, out of ours, eager and compiled; forward, and with gradients."""
    op = OPS[name]
    inputs, frozen, everything = op_inputs(name, shape, clock.device)
    size = 2 * shape.images * (shape.text + shape.image) * shape.channels
    compiled = torch.compile(op.eager, dynamic=False, backend="inductor" if clock.gpu else "eager")
    facts = {"op": name, "size": shape.name, "rows": shape.images, "tokens": shape.text + shape.image}
    torch.compiler.reset()  # past a few shapes dynamo would silently stop compiling
    for way, wanted, passes in zip(("forward", "lora", "full"), ([], frozen, everything), op.passes, strict=True):
        leaves = [value.detach().requires_grad_(i in wanted) for i, value in enumerate(inputs)]
        with torch.no_grad():  # a graph kept from this stream could not be captured on another
            results = op.eager(*leaves)
        results = results if isinstance(results, tuple) else (results,)
        incoming = [torch.randn_like(result) for result in results]
        functions = {"ours": op.ours, "eager": op.eager, "compiled": compiled}
        for kind in kinds:
            function = functions[kind]

            def call(function: Any = function, leaves: list[Tensor] = leaves, wanted: list[int] = wanted) -> Any:
                outputs = function(*leaves)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                return torch.autograd.grad(outputs, [leaves[i] for i in wanted], incoming) if wanted else outputs  # noqa: B023

            traffic = passes * size if kind == "ours" else None
            yield measure(clock, kind, call, traffic, copy, way=way, form=shape.name, **facts)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = options(__doc__, "block_ops.json", 180, 0.2, "one tiny case, to try the script on any machine")
    chosen = parser.parse_args(arguments)
    shapes = TINY if chosen.tiny else SHAPES
    return run(
        chosen,
        "block_ops.json",
        lambda clock, copy: (found for shape in shapes for found in of_shape(clock, shape, copy)),
        lambda record: "{op:20} {way:8} {size:14}".format(**record),
    )


if __name__ == "__main__":
    sys.exit(main())
