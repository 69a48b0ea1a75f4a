"""Measures CPU allocations with PyTorch's profiler, to validate memory plans."""

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile


class Allocations(NamedTuple):
    """Bytes relative to what was allocated before: the peak, and the remainder at the end."""

    peak: int
    left: int


def allocations(call: Callable[[], Any]) -> Allocations:
    """Allocations of a call; its result is kept alive until they are counted."""
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
    """A forward and backward whose gradients are freed as soon as they are computed, as by an engine."""

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    handles = [p.register_post_accumulate_grad_hook(drop) for p in module.parameters() if p.requires_grad]
    try:
        output = predict()
        output.backward(torch.ones_like(output))
    finally:
        for handle in handles:
            handle.remove()
