"""Seconds, memory, launches and host gaps of a training step, and the model's own share of the time."""

import time
from collections.abc import Callable
from contextlib import suppress
from statistics import median
from typing import Any

import torch
from allocations import allocations
from step_model import Size
from step_paths import Parts, StepPath, WithEngine
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pcpo_fast.config.schema import Config
from pcpo_fast.policies.pipeline_policy import DTYPES


def wait(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Wall time of a call, with the device idle before and after."""
    wait(device)
    began = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - began


def peak_memory(call: Callable[[], Any]) -> float:
    """Peak GiB that PyTorch allocates on a CPU for a call, beyond what was allocated before."""
    return allocations(call).peak / 2**30


def operations(path: StepPath) -> dict[str, float]:
    """Operations of one step on a CPU."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        path.rollout()
        path.update()
    return {"operations": len([e for e in profiler.events() if e.name.startswith("aten::") and _outermost(e)])}


class _Enough(Exception):
    """A micro-step has been recorded."""


def one_micro_step(path: WithEngine) -> None:
    """The update up to its first micro-step's backward. The path is of no further use."""

    def enough() -> None:
        raise _Enough

    path.engine.step = enough  # type: ignore[method-assign]
    with suppress(_Enough):
        path.update()


def launches(path: WithEngine, device: torch.device) -> dict[str, float]:
    """Kernels of one micro-step, and the share of the time in which the GPU was idle.

    Nothing but the GPU is recorded: each of a CPU's millions of events a step would cost 50 microseconds and 4 KB.
    """
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        took = seconds(lambda: one_micro_step(path), device)
    events = profiler.events()
    kernels = sorted(
        (e.time_range.start, e.time_range.end) for e in events if e.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, reached = 0.0, 0.0
    for start, end in kernels:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return {"micro_step_launches": len(kernels), "idle_share": max(0.0, 1 - busy / 1e6 / took)}


def _outermost(event: Any) -> bool:
    parent = event.cpu_parent
    return parent is None or not parent.name.startswith("aten::")


class Bare(Parts):
    """The network's own forwards and backwards of our step, with nothing around: the least that a loop can take."""

    def __init__(self, size: Size, config: Config, device: torch.device) -> None:
        super().__init__(size, config, device, DTYPES[config.model.dtype])
        self.latents = torch.randn(size.images, *self.policy.latent_shape, device=device)
        self.times = torch.rand(size.images, device=device)

    @torch.no_grad()
    def rollout(self) -> None:
        """As many forwards as the rollout makes, and the decoding."""
        alike = self.config.rollout.share_first_steps
        with self.policy.sampling(self.config.rollout):
            for rows in torch.arange(self.size.images).split(self.config.rollout.batch_size):
                for step in range(self.size.steps):
                    self._predict(1 if alike and step == 0 else len(rows))
                self.policy.decode(self.latents[: len(rows)])

    def update(self) -> None:
        """As many forwards and backwards as the update makes."""
        together = self.config.train.micro_batch_size
        for _ in range(self.plan.steps[0].numel() // together):
            output = self._predict(together)
            output.backward(torch.ones_like(output))
        for parameter in self.policy.module.parameters():
            parameter.grad = None

    def _predict(self, count: int) -> Tensor:
        return self.policy.predict(self.latents[:count], self.times[:count], self.conditioning(count))


class Timed:
    """A path and the times of its steps, after one that warms up."""

    def __init__(self, path: StepPath, device: torch.device) -> None:
        self.path, self.device, self.peak = path, device, 0.0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.first = seconds(path.rollout, device) + seconds(path.update, device)
        if device.type == "cuda":  # of the step that warms up: at full size another one takes most of a minute
            self.peak = torch.cuda.max_memory_allocated() / 2**30
        self.rollouts, self.updates = list[float](), list[float]()

    def repeat(self) -> None:
        """Time one more step."""
        self.rollouts.append(seconds(self.path.rollout, self.device))
        self.updates.append(seconds(self.path.update, self.device))

    def spent(self) -> float:
        """Seconds of the steps timed so far."""
        return sum(self.rollouts) + sum(self.updates)

    def record(self) -> dict[str, Any]:
        """Medians, and the memory of a step; on a CPU of an additional step, because recording slows it."""

        def step() -> None:
            self.path.rollout()
            self.path.update()

        return {
            "first_step_s": self.first,
            "repeats": len(self.rollouts),
            "rollout_s": median(self.rollouts),
            "update_s": median(self.updates),
            "peak_gib": self.peak or peak_memory(step),
        }
