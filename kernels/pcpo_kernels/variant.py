"""A kernel variant: one kernel as one kind of call compiles it, as a signature for ahead-of-time compilation."""

# mypy: disallow-any-generics=False

import inspect
import math
from typing import Any, NamedTuple

from pcpo_kernels.launch import plan_for

TILE = ("ROWS", "COLUMNS", "HEADS", "SIZE")  # sides of a block with two axes
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
NUMBERS = (
    *("rows", "elements", "chunks", "hinge", "mean"),
    *("tokens", "channels", "groups", "count", "heads", "size", "first"),
)
UNALIGNED = (
    *("rows", "chunks", "hinge", "mean", "a_stride", "b_stride", "std_stride"),
    *("tokens", "groups", "count", "heads", "first"),
)


class Variant(NamedTuple):
    """One kernel as one kind of call compiles it.

    Attributes:
        kernel: name of the kernel.
        name: what distinguishes the variant.
        function: the Triton function.
        signature: type of every parameter, as Triton writes it.
        constants: value of every constexpr parameter, None for a missing pointer.
        aligned: positions of the parameters divisible by 16 (bulk pointers, and lengths and strides of full rows).
        warps: warps per program.
        loaded_bytes: bulk bytes that a program reads for one of its blocks.
        stored_bytes: bulk bytes that it writes for one.
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
        """Elements of a block."""
        return int(
            self.constants.get("BLOCK") or math.prod(self.constants[side] for side in TILE if side in self.constants)
        )


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
    """A variant from the pointers it is given; every other pointer is None.

    Blocks and warps are those of a row's plan unless they are given.
    """
    plan = plan_for(elements)
    constants = {"BLOCK": plan.BLOCK, "ITERATIONS": plan.ITERATIONS} | constants
    pointers = loaded | stored | row_pointers
    signature: dict[str, str] = {}
    aligned = []
    for position, parameter in enumerate(inspect.signature(function.fn).parameters):
        if parameter in constants:
            signature[parameter] = "constexpr"
        elif parameter in pointers:
            signature[parameter] = f"*{pointers[parameter]}"
            if parameter in loaded or parameter in stored:
                aligned.append(position)
        elif parameter in NUMBERS or parameter.endswith("_stride"):
            signature[parameter] = "i32"
            if parameter not in UNALIGNED:
                aligned.append(position)
        else:
            signature[parameter] = "constexpr"
            constants[parameter] = None
    missing = set(pointers) - set(signature)
    if missing:
        raise ValueError(f"{function.fn.__name__} has no parameter {', '.join(sorted(missing))}")
    return Variant(
        function.fn.__name__.removesuffix("_kernel"),
        name,
        function,
        signature,
        {name: constants[name] for name in signature if name in constants},
        tuple(aligned),
        warps or plan.warps,
        constants["BLOCK"] * sum(SIZES[kind] for kind in loaded.values()),
        constants["BLOCK"] * sum(SIZES[kind] for kind in stored.values()),
    )
