"""The code that Inductor makes for a GPU, where there is none: it is read, and never run."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor.scheduler
from torch._dynamo import device_interface
from torch._inductor import compile_fx, config
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch.fx import GraphModule

GPU = torch.device("cuda", 0)
HOPPER = SimpleNamespace(
    name="H100", major=9, minor=0, warp_size=32, multi_processor_count=132, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, total_memory=80 << 30,
)  # fmt: skip


class Enough(Exception):
    """The code is there, and not to be loaded."""


class Hopper(device_interface.CudaInterface):
    """What Inductor asks of a GPU."""

    class Worker(device_interface.CudaInterface.Worker):
        current_device = staticmethod(lambda: 0)
        get_device_properties = staticmethod(lambda device=None: HOPPER)

    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    get_device_properties = staticmethod(lambda device=None: HOPPER)
    get_compute_capability = staticmethod(lambda device=None: 90)
    is_bf16_supported = staticmethod(lambda including_emulation=False: True)


def gpu_backend(codes: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A backend for torch.compile: Inductor's code of each graph, moved to a GPU, goes into a list.

    The graphs themselves are run as they are, on the CPU. They are traced there too, since PyTorch has no autograd for
    a device that it was not built for.
    """

    def keep(lowering: GraphLowering) -> None:
        code, _ = lowering.codegen()
        assert not lowering.constants, "the code holds a tensor between calls"
        codes.append(code if isinstance(code, str) else code.value)
        raise Enough

    def compile_graph(graph: GraphModule, inputs: list[Any], **settings: Any) -> Callable[..., Any]:
        before = len(codes)
        try:
            compile_fx.compile_fx_inner(*_moved(graph, inputs), **settings)
        except Exception:  # Inductor wraps what was raised
            if len(codes) == before:
                raise

        def run(arguments: list[Any]) -> Any:
            return graph(*arguments)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    device_interface.get_interface_for_device("cuda")  # fills the table
    monkeypatch.setitem(device_interface.device_interfaces, "cuda", Hopper)
    monkeypatch.setattr(torch.cuda, "get_device_properties", Hopper.get_device_properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch._inductor.scheduler, "has_triton", lambda: True)
    monkeypatch.setattr(GraphLowering, "compile_to_module", keep)
    DeviceProperties.create.cache_clear()
    patched = config.patch(fx_graph_cache=False, compile_threads=1)(compile_graph)
    return partial(compile_fx.compile_fx, inner_compile=patched)


def _moved(graph: GraphModule, inputs: list[Any]) -> tuple[GraphModule, list[Any]]:
    """A copy of a graph traced on the CPU, and its inputs, for a GPU."""
    moved = deepcopy(graph)
    mode = torch._guards.detect_fake_mode(inputs)
    values = []
    for node in moved.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = node.kwargs | {"device": GPU}
    with mode:
        for value in inputs:
            if isinstance(value, torch.Tensor):
                value = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=GPU)
            values.append(value)
    for node, value in zip(moved.graph.find_nodes(op="placeholder"), values, strict=True):
        node.meta["val"] = value
    moved.recompile()
    return moved, values
