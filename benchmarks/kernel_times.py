"""Measure the kernels on a GPU; the JSON file is updated after each case.

    python benchmarks/kernel_times.py --out benchmarks/results/my_gpu

Every op is timed with a flushed cache, as the median of many runs: ours, eager PyTorch as the public trainers write it,
and torch.compile of that. Time is device time between events; ``host`` is how long the call keeps the CPU.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import kernel_baseline as baseline
import torch
from kernel_cases import CLIP_RANGE, NOISE, SIZES, Case, guidance_traffic, loss_traffic, make_case, step_traffic
from pcpo_kernels import guidance, policy_loss, sample_step
from revisions import origin

Call = Callable[[], Any]


class Clock:
    """Median time of a call on a device, with the second-level cache flushed before every run."""

    def __init__(self, device: torch.device, seconds: float, tiny: bool = False) -> None:
        self.device, self.seconds = device, seconds
        self.warm, self.least, self.host = (1, 1, 1) if tiny else (3, 5, 20)
        self.gpu = device.type == "cuda"
        self.not_captured = ""
        size = 4 * torch.cuda.get_device_properties(device).L2_cache_size if self.gpu else 1
        self.flush = torch.empty(max(size, 1), dtype=torch.int8, device=device)

    def milliseconds(self, call: Call) -> float:
        """Median of as many runs as fit the time, 5 to 200 (1 or more in tiny mode)."""
        for _ in range(self.warm):
            call()
        self.wait()
        times, started = [], time.perf_counter()
        while len(times) < self.least or (len(times) < 200 and time.perf_counter() - started < self.seconds):
            self.flush.zero_()
            if self.gpu:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                call()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end))
            else:
                begin_time = time.perf_counter()
                call()
                times.append(1e3 * (time.perf_counter() - begin_time))
        return statistics.median(times)

    def graph_milliseconds(self, call: Call) -> float | None:
        """The same for a captured CUDA graph, without host overhead. None if capturing fails, for ``not_captured``."""
        self.not_captured = ""
        if not self.gpu:
            return None
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                call()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
        except RuntimeError as error:
            torch.cuda.synchronize()
            self.not_captured = " ".join(str(error).split())[:300]
            return None
        return self.milliseconds(graph.replay)

    def host_microseconds(self, call: Call) -> float:
        """CPU time of a call, without waiting for the device."""
        self.wait()
        begin = time.perf_counter()
        for _ in range(self.host):
            call()
        spent = time.perf_counter() - begin
        self.wait()
        return 1e6 * spent / self.host

    def launches(self, call: Call) -> int | None:
        """Kernels, copies and fills on the device in one call."""
        if not self.gpu:
            return None
        self.wait()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            self.wait()
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())

    def peak_bytes(self, call: Call) -> int | None:
        """Peak memory of a call beyond what was allocated before it."""
        if not self.gpu:
            return None
        self.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        self.wait()
        return torch.cuda.max_memory_allocated() - before

    def wait(self) -> None:
        """Wait for the device."""
        if self.gpu:
            torch.cuda.synchronize()


def copy_bandwidth(clock: Clock, size: int) -> float:
    """Bytes per second read plus written by a device copy."""
    source = torch.empty(size, dtype=torch.int8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * size / (1e-3 * clock.milliseconds(lambda: target.copy_(source)))


def with_backward(forward: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> Call:
    """Forward and backward of a call; gradients of ``inputs`` are not accumulated."""
    return lambda: torch.autograd.grad(forward(), inputs)


def loss_calls(case: Case, form: str) -> Callable[[], torch.Tensor]:
    """Our loss with the noise in one of its forms."""
    noise = case.key if form == "key" else case.endpoints
    old = None if form == "detached" else case.old_output
    rows = case.linear, case.quadratic, case.scale, case.advantage
    return lambda: policy_loss(case.output, old, noise, *rows, clip_range=CLIP_RANGE, objective="clip").loss


def baseline_loss_call(case: Case, function: Callable[..., Any]) -> Callable[[], torch.Tensor]:
    """The public trainers' loss, eager or compiled."""
    mean, std = baseline.transition_mean(case.old_output, case.latents, case.time, case.following, NOISE)
    old = baseline.log_density(case.next_latents, mean, std)
    del mean, std
    rest = case.latents, case.next_latents, old, case.time, case.following, NOISE, case.advantage, CLIP_RANGE
    return lambda: function(case.output, *rest)[0]


def measure(clock: Clock, name: str, call: Call, traffic: int | None, copy: float, **facts: Any) -> dict[str, Any]:
    """All measurements of a call, or the reason for their absence: a failing call must not stop the others."""
    try:
        return _measure(clock, name, call, traffic, copy, **facts)
    except Exception as error:
        return failure(name, error, **facts)


def failure(name: str, error: Exception, **facts: Any) -> dict[str, Any]:
    """The record of a failing call."""
    return facts | {"name": name, "failed": f"{type(error).__name__}: {error}"[:2000]}


def _measure(clock: Clock, name: str, call: Call, traffic: int | None, copy: float, **facts: Any) -> dict[str, Any]:
    milliseconds = clock.milliseconds(call)
    record = facts | {
        "name": name,
        "milliseconds": milliseconds,
        "graph_milliseconds": clock.graph_milliseconds(call),
        "host_microseconds": clock.host_microseconds(call),
        "launches": clock.launches(call),
        "peak_bytes": clock.peak_bytes(call),
        "traffic_bytes": traffic,
    }
    if clock.not_captured:
        record["not_captured"] = clock.not_captured
    best = min(value for value in (milliseconds, record["graph_milliseconds"]) if value is not None)
    if traffic is not None:
        record["gigabytes_per_second"] = traffic / best * 1e-6
        record["share_of_copy"] = traffic / (1e-3 * best) / copy
    return record


def measurements(
    clock: Clock, sizes: list[tuple[str, int, int]], large: tuple[int, int], copy: float, all_others: bool = True
) -> Iterator[Any]:
    """Records, most valuable first: (op, size, batch) with ours, and unless told otherwise eager and compiled."""
    backend = "inductor" if clock.gpu else "eager"  # on a CPU the script is tried, not measured
    compiled_loss = torch.compile(baseline.policy_loss, dynamic=False, backend=backend)
    compiled_step = torch.compile(baseline.sample_step, dynamic=False, backend=backend)
    width = 2

    def loss_records(size: str, rows: int, elements: int, forms: tuple[str, ...], others: bool) -> Iterator[Any]:
        case = make_case(rows, elements, clock.device, torch.bfloat16)
        case.output.requires_grad_()
        facts = {"size": size, "rows": rows, "elements": elements}
        for form in forms:
            forward_bytes, both_bytes = (rows * elements * count for count in loss_traffic(form, width))
            call = loss_calls(case, form)
            yield measure(
                clock, "ours", with_backward(call, [case.output]), both_bytes, copy,
                op="policy_loss", way="forward+backward", form=form, **facts,
            )  # fmt: skip
            with torch.no_grad():
                yield measure(
                    clock, "ours", call, forward_bytes or None, copy,
                    op="policy_loss", way="forward", form=form, **facts,
                )  # fmt: skip
        for name, function in (
            (("eager", baseline.policy_loss), ("compiled", compiled_loss)) if others and all_others else ()
        ):
            torch.compiler.reset()  # past a few shapes dynamo would silently stop compiling
            call = baseline_loss_call(case, function)
            shared = {"op": "policy_loss", "form": "endpoints"} | facts
            yield measure(clock, name, with_backward(call, [case.output]), None, copy, way="forward+backward", **shared)
            if name == "eager" or size == sizes[0][0]:  # compiling takes seconds: forward alone at one size
                with torch.no_grad():
                    yield measure(clock, name, call, None, copy, way="forward", **shared)

    def step_records(size: str, rows: int, elements: int) -> Iterator[Any]:
        case = make_case(rows, elements, clock.device, torch.bfloat16)
        facts = {"op": "sample_step", "way": "forward", "size": size, "rows": rows, "elements": elements}
        columns = case.a, case.b, case.std
        torch.compiler.reset()
        calls: dict[str, Call] = {
            "ours": lambda: sample_step(case.latents, case.output, *columns, case.key),
            "eager": lambda: baseline.sample_step(case.latents, case.output, case.time, case.following, NOISE),
            "compiled": lambda: compiled_step(case.latents, case.output, case.time, case.following, NOISE),
        }
        for name, call in calls.items() if all_others else [("ours", calls["ours"])]:
            traffic = rows * elements * step_traffic(width) if name == "ours" else None
            yield measure(clock, name, call, traffic, copy, form="key", **facts)

    def guidance_records(size: str, rows: int, elements: int) -> Iterator[Any]:
        case = make_case(rows, elements, clock.device, torch.bfloat16)
        halves = [case.unconditional.requires_grad_(), case.output.requires_grad_()]
        scale = torch.full((rows,), 4.5, device=clock.device)
        facts = {"op": "guidance", "way": "forward+backward", "form": "cfg", "size": size, "rows": rows}
        calls = {
            "ours": lambda: guidance(*halves, scale),
            "eager": lambda: baseline.guidance(*halves, 4.5),
        }
        incoming = torch.randn_like(case.output)
        for name, call in calls.items() if all_others else [("ours", calls["ours"])]:
            traffic = rows * elements * guidance_traffic(width)[1] if name == "ours" else None
            both = lambda call=call: torch.autograd.grad(call(), halves, incoming)  # noqa: E731
            yield measure(clock, name, both, traffic, copy, elements=elements, **facts)

    first = sizes[0]
    yield from loss_records(*first, forms=("endpoints", "key", "detached"), others=True)
    yield from step_records(*first)
    rows, elements = large
    yield from loss_records("large", rows, elements, forms=("endpoints", "key", "detached"), others=False)
    yield from step_records("large", rows, elements)
    yield from guidance_records(*first)
    for size in sizes[1:]:
        yield from loss_records(*size, forms=("endpoints", "key", "detached"), others=True)
        yield from step_records(*size)
    yield from guidance_records("large", rows, elements)


def write(path: Path, content: dict[str, Any]) -> None:
    """Replace the file atomically, so that readers never see a partial one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def device_facts(device: torch.device) -> dict[str, Any]:
    """Device, code and versions of the measurements, and when they were begun."""
    facts: dict[str, Any] = origin() | {"torch": torch.__version__, "device": "cpu"}
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }
    return facts


def options(description: str | None, file: str, budget: float, seconds: float, tiny: str) -> argparse.ArgumentParser:
    """Command-line options common to all scripts that measure on a GPU."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help=f"folder for {file}")
    parser.add_argument(
        "--budget", type=float, default=budget, help="seconds after which nothing new starts (%(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=seconds, help="time for one median (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help=tiny)
    return parser


def run(
    chosen: argparse.Namespace,
    file: str,
    records: Callable[[Clock, float], Iterator[dict[str, Any]]],
    label: Callable[[dict[str, Any]], str],
) -> int:
    """Measure, writing and printing each record immediately; returns the exit code.

    Args:
        chosen: what :func:`options` parsed.
        file: name of the JSON file.
        records: gets the clock and the bandwidth of a copy in bytes per second.
        label: how a record's line begins.
    """
    if not torch.cuda.is_available() and not chosen.tiny:
        print("error: no GPU that PyTorch can use; --tiny tries the script without one", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.monotonic()
    clock = Clock(device, chosen.seconds, chosen.tiny)
    chosen.out.mkdir(parents=True, exist_ok=True)
    copy = copy_bandwidth(clock, 1 << 30 if device.type == "cuda" else 1 << 20)
    content = device_facts(device) | {"copy_bytes_per_second": copy, "complete": False, "records": []}
    path, failures = chosen.out / file, 0
    for record in records(clock, copy):
        content["records"].append(record)
        write(path, content)
        if "failed" in record:
            failures += 1
            reason = " ".join(record["failed"].split())[:200]
            print(f"error: {label(record)} {record['name']}: {reason}", file=sys.stderr, flush=True)
            if "CUDA error" in reason:  # the process has lost the device
                return 1
            continue
        share = f"{record['share_of_copy']:6.1%} of copy" if "share_of_copy" in record else ""
        measured = f"{record['name']:9} {record['milliseconds']:9.4f} ms  launches {record.get('launches')}  {share}"
        print(label(record), measured, flush=True)
        if time.monotonic() - started > chosen.budget:
            print(f"{len(content['records'])} calls, {failures} failed; stopped after {chosen.budget:.0f} s")
            return int(failures > 0)
    write(path, content | {"complete": failures == 0})
    print(f"{len(content['records'])} calls, {failures} failed")
    return int(failures > 0)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = options(__doc__, "kernels.json", 300, 0.3, "two tiny cases, to try the script on any machine")
    parser.add_argument("--ours", action="store_true", help="only our kernels, not what they are compared with")
    chosen = parser.parse_args(arguments)
    batches = {"flux_1024": (8, 1, 64, 16, 2, 4, 32), "flux_720": (24, 8, 1, 64), "sd15_512": (16, 8, 64)}
    batches |= {"sd3_512": (24, 8), "flux_512": (8, 64)}
    sizes = [(name, rows, SIZES[name]) for name, counts in batches.items() for rows in counts]
    large = (512, SIZES["flux_1024"])  # 2^27 elements
    if chosen.tiny:
        sizes, large = [("tiny", 2, 96), ("tiny", 3, 200)], (4, 512)
    return run(
        chosen,
        "kernels.json",
        lambda clock, copy: measurements(clock, sizes, large, copy, not chosen.ours),
        lambda record: "{op:12} {way:17} {form:10} {size:10} x{rows:<4}".format(**record),
    )


if __name__ == "__main__":
    sys.exit(main())
