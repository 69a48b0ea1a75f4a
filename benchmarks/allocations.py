"""Bytes that PyTorch's CPU allocator hands out, as its profiler records them: the judge of the memory plans."""

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile


class Allocations(NamedTuple):
    """Bytes over what was allocated before: the highest number, and what is left at the end."""

    peak: int
    left: int


def allocations(call: Callable[[], Any]) -> Allocations:
    """What a call allocates at its peak; what it returns is kept until the count is done."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del kept
    return Allocations(peak, live)


def trained_once(predict: Callable[[], torch.Tensor], module: torch.nn.Module) -> None:
    """A forward and backward whose gradients leave as soon as they are there, as an engine's do."""

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    handles = [p.register_post_accumulate_grad_hook(drop) for p in module.parameters() if p.requires_grad]
    try:
        output = predict()
        output.backward(torch.ones_like(output))
    finally:
        for handle in handles:
            handle.remove()
