"""What each operation of a forward makes of one row, and the first operation at which two forwards diverge."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

SAMPLES = 64
"""Elements kept of each result, evenly spaced, to say how large a difference is."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Operation:
    """What an operation, or a whole module, made of the watched row.

    Attributes:
        module: dotted name of the innermost module that was running; empty for the network itself.
        name: of the operation, or of the module's class where a module ended.
        size: number of elements.
        digest: of the bits of all of them; equal bits have equal digests.
        samples: up to :data:`SAMPLES` of them.
    """

    module: str
    name: str
    size: int
    digest: int
    samples: tuple[float, ...]

    def distance(self, other: "Operation") -> float:
        """Difference of the samples relative to their size, in the Euclidean norm; 0 for equal bits."""
        if self.digest == other.digest:
            return 0.0
        gap = math.dist(self.samples, other.samples)
        return gap / (math.hypot(*self.samples) or 1.0)


@dataclass(frozen=True)
class ForwardComparison:
    """Two forwards of the same row, operation by operation.

    Attributes:
        compared: operations that both made, in the same place and of the same size.
        unmatched: operations that only one of them made, or of another size.
        first: the first that differ, with the same inputs; None: all results have the same bits.
        before: the last operation before them; None where there is none.
        distances: relative difference of the output of each module, by name, in the order in which they ended.
    """

    compared: int
    unmatched: int
    first: tuple[Operation, Operation] | None
    before: Operation | None
    distances: Mapping[str, float]


@contextmanager
def recorded(network: nn.Module, rows: int, halves: int = 1, *, operations: bool = True) -> Iterator[list[Operation]]:
    """Within the block, record what a forward of `network` makes of the first of its rows; filled at the end.

    Args:
        network: its modules' names say where an operation belongs.
        rows: B, the number of rows of the forward.
        halves: 2 where the network gets 2 B rows, for classifier-free guidance; both first rows are recorded.
        operations: False: modules alone, for compiled code, whose operations cannot be seen.
    """
    recorder, found = _Recorder(rows, halves), list[Operation]()
    hooks = []
    for name, module in network.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: recorder.path.append(name)))
        hooks.append(module.register_forward_hook(recorder.ended, always_call=True))
    try:
        if operations:
            with recorder:
                yield found
        else:
            yield found
    finally:
        for hook in hooks:
            hook.remove()
    found.extend(recorder.operations())


class _Recorder(TorchDispatchMode):
    def __init__(self, rows: int, halves: int) -> None:
        super().__init__()
        self.rows, self.halves, self.path = rows, halves, [""]
        self._kept: list[tuple[str, str, int, Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not any(value.alias_info is not None for value in func._schema.returns):  # views compute nothing
            self._keep(func._schema.name, result)
        return result

    def ended(self, module: nn.Module, _: Any, output: Any) -> None:
        """A module's output, under its own name."""
        with torch.utils._python_dispatch._disable_current_modes():
            self._keep(type(module).__name__, output)
        self.path.pop()

    def _keep(self, name: str, result: Any) -> None:
        for value in result if isinstance(result, tuple | list) else (result,):
            if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0:
                continue
            row = self._row(value.detach()).contiguous()
            bits = row.view(_BITS[row.element_size()]).long()
            places = torch.arange(1, 2 * len(bits), 2, device=bits.device)
            chosen = torch.linspace(0, len(row) - 1, min(SAMPLES, len(row)), device=row.device).round().long()
            self._kept.append((self.path[-1], name, len(row), (bits * places).sum(), row[chosen].double()))

    def _row(self, value: Tensor) -> Tensor:
        """The watched row, in both halves; all of a tensor without rows."""
        count = value.shape[0] if value.ndim else 1
        for halves in (self.halves, 1):
            if count % (halves * self.rows) == 0:
                return value.reshape(halves, self.rows, -1)[:, 0].flatten()
        return value.flatten()

    def operations(self) -> Iterator[Operation]:
        for module, name, size, digest, samples in self._kept:
            yield Operation(module, name, size, int(digest), tuple(samples.tolist()))


def compare(one: Sequence[Operation], other: Sequence[Operation]) -> ForwardComparison:
    """Compare two forwards, each operation with the one of the same place in the other."""
    theirs = dict(_placed(other))
    mine = list(_placed(one))
    pairs = [(value, theirs[place]) for place, value in mine if place in theirs and theirs[place].size == value.size]
    different = next((k for k, (a, b) in enumerate(pairs) if a.digest != b.digest), None)
    distances = {a.module: a.distance(b) for a, b in pairs if "::" not in a.name}
    return ForwardComparison(
        compared=len(pairs),
        unmatched=len(mine) + len(theirs) - 2 * len(pairs),
        first=None if different is None else pairs[different],
        before=pairs[different - 1][0] if different else None,
        distances=distances,
    )


def _placed(operations: Sequence[Operation]) -> Iterator[tuple[tuple[str, str, int], Operation]]:
    """With its module, its name, and how often both came before."""
    seen: Counter[tuple[str, str]] = Counter()
    for operation in operations:
        key = operation.module, operation.name
        yield (*key, seen[key]), operation
        seen[key] += 1
