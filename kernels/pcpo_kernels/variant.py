"""Kernel variants: the signature of a kernel for one kind of call, for ahead-of-time compilation."""

# mypy: disallow-any-generics=False

import importlib
import math
import pkgutil
from collections.abc import Iterator
from typing import Any, NamedTuple

from pcpo_kernels import ops
from pcpo_kernels.launch import plan_for

LATENTS = 128 * 128 * 16  # elements of a row of FLUX latents at 1024 x 1024
TILE = ("ROWS", "COLUMNS", "HEADS", "SIZE")  # sides of a block with two axes
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
LENGTHS = ("elements", "channels", "size")  # lengths of a row, divisible by 16


class Variant(NamedTuple):
    """A kernel as it is compiled for one kind of call.

    Attributes:
        kernel: name of the kernel.
        name: what distinguishes the variant.
        function: the Triton function.
        signature: type of every parameter in Triton's notation.
        constants: value of every constexpr parameter; None for a missing pointer.
        aligned: positions of the parameters divisible by 16 (bulk pointers, and lengths and strides of full rows).
        warps: warps per program.
        loaded_bytes: bulk bytes that a program reads per block.
        stored_bytes: bulk bytes that a program writes per block.
    """

    kernel: str
    name: str
    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[int, ...]
    warps: int
    loaded_bytes: int
    stored_bytes: int

    @property
    def block(self) -> int:
        """Elements per block."""
        sides = ("PARTS", "BLOCK") if "BLOCK" in self.constants else TILE
        return math.prod(int(self.constants.get(side, 1)) for side in sides)


def build(
    function: Any,
    name: str,
    loaded: dict[str, str],
    stored: dict[str, str],
    row_pointers: dict[str, str],
    elements: int,
    warps: int | None = None,
    **constants: Any,
) -> Variant:
    """Build a variant from the pointers that are passed to it; all others are None.

    Block size and warps default to those of the plan for ``elements``.
    """
    plan = plan_for(elements)
    constants = {"BLOCK": plan.BLOCK, "ITERATIONS": plan.ITERATIONS} | constants
    pointers = loaded | stored | row_pointers
    signature: dict[str, str] = {}
    aligned = []
    for position, parameter in enumerate(function.params):
        own = parameter.name
        if own in pointers:
            kind, divisible = f"*{pointers[own]}", own not in row_pointers
        elif parameter.do_not_specialize or parameter.annotation_type:
            kind, divisible = parameter.annotation_type or "i32", False
        elif own in LENGTHS or own.endswith("_stride"):
            kind, divisible = "i32", True
        else:
            kind, divisible = "constexpr", False
            constants.setdefault(own, None)
        signature[own] = kind
        if divisible:
            aligned.append(position)
    missing = set(pointers) - set(signature)
    if missing:
        raise ValueError(f"{function.fn.__name__} has no parameter {', '.join(sorted(missing))}")
    variant = Variant(
        function.fn.__name__.removesuffix("_kernel"),
        name,
        function,
        signature,
        {name: constants[name] for name in signature if name in constants},
        tuple(aligned),
        warps or plan.warps,
        sum(SIZES[kind] for kind in loaded.values()),
        sum(SIZES[kind] for kind in stored.values()),
    )
    return variant._replace(
        loaded_bytes=variant.block * variant.loaded_bytes, stored_bytes=variant.block * variant.stored_bytes
    )


def all_variants() -> Iterator[Variant]:
    """The variants of all ops: those launched by the trainer (bf16 or fp32 models), and some for other callers."""
    for op in pkgutil.iter_modules(ops.__path__):
        yield from importlib.import_module(f"{ops.__name__}.{op.name}.variants").variants()
