"""A Triton driver for machines without a GPU: kernels are compiled for sm_90 and launched as on one, but nothing runs.

Tensors are on the CPU. What is left out of a launch is the C code that hands it to the GPU (3 to 6 microseconds).
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class _Utils:
    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return name, (name, hash(binary)), 32, 0, 1024

    def unload_module(self, module: str) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}


class Launch(NamedTuple):
    """A launch that did not happen: which compiled code, how many programs, every argument of the kernel."""

    function: tuple[str, int]
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]


class StubDriver:
    """What Triton asks of a driver; launches are noted in a list where there is one."""

    utils = _Utils()

    def __init__(self, launches: list[Launch] | None = None) -> None:
        self.launches = launches

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(x: int, y: int, z: int, stream: int, function: tuple[str, int], packed: Any, *rest: Any) -> None:
            if self.launches is not None:
                self.launches.append(Launch(function, (x, y, z), rest[3:]))

        return launch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    @staticmethod
    def is_active() -> bool:
        return True

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


@contextmanager
def stubbed(launches: list[Launch] | None = None) -> Iterator[None]:
    """Take the Triton path for tensors on the CPU, with launches that do nothing but, perhaps, note themselves."""
    from pcpo_kernels import launch, variant

    kernels = {one.function.fn: one.function for one in variant.all_variants()}
    modules = [m for name, m in sys.modules.items() if name.startswith("pcpo_kernels.") and hasattr(m, "backend_for")]
    originals = [module.backend_for for module in modules]
    for module in modules:
        module.backend_for = lambda _: "triton"
    before, launch._compiled = launch._compiled, {}
    driver.set_active(StubDriver(launches))
    try:
        yield
    finally:
        for kernel in kernels.values():
            kernel.device_caches.clear()
        driver.set_active(None)
        launch._compiled = before
        for module, original in zip(modules, originals, strict=True):
            module.backend_for = original
