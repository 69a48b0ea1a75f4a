"""What makes the host wait for a GPU: values that it reads, and copies between it and the device."""

import traceback
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READING = {
    f"aten::{name}"
    for name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim")
}
"""Operations whose result, or its shape, the host must know."""
CONSTRUCTORS = (torch.tensor, torch.as_tensor, torch.asarray)
"""Copy what they are given to the device, beneath the dispatcher."""


class Waits(ExitStack):
    """Within the block :attr:`found` gets every wait, with the lines of this project and of diffusers that led to it.

    The meta device takes the place of a GPU where there is none: it has no values, so what reads one also raises.

    Attributes:
        within: whether waits count at the moment.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.within = True

    def __enter__(self) -> Self:
        super().__enter__()
        self.enter_context(_Operations(self))
        self.enter_context(_Constructors(self))
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> Any:
        return super().__exit__(*error)  # type: ignore[arg-type]

    def note(self, what: str) -> None:
        if self.within:
            frames = traceback.extract_stack()
            lines = [f.line for f in frames if "pcpo_fast" in f.filename or "diffusers" in f.filename]
            self.found.append(f"{what}: {' < '.join(str(line) for line in reversed(lines[-3:]))}")


class _Operations(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name
        devices = {value.device.type for value in (*args, *kwargs.values(), result) if isinstance(value, Tensor)}
        if name in READING or (name in ("aten::_to_copy", "aten::copy_") and len(devices) > 1):
            self.waits.note(name)
        return result


class _Constructors(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in CONSTRUCTORS and torch.device(kwargs.get("device") or "cpu").type != "cpu":
            self.waits.note(func.__name__)
        return func(*args, **kwargs)
