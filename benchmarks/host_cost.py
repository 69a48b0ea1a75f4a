"""What a call of the kernels costs the host, without a GPU, and whether it costs more than it did.

    python benchmarks/host_cost.py                       a table
    python benchmarks/host_cost.py --json FILE           the same for a script
    python benchmarks/host_cost.py --registered          the registered ops, through PyTorch's dispatcher
    python benchmarks/host_cost.py --against FILE...     fails where a call became more than 15 % dearer than in the
                                                         file from this CPU, or in the first one

CPU microseconds of a whole call: argument checks, allocations, recording the graph, and its launches, which are
stubbed out (benchmarks/stub_driver.py). Machines differ, and a busy one is slow: every call is timed in turn with
``reference``, a short chain of PyTorch's own operations on four numbers, forward and backward, and compared by the
ratio.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))

import torch
import triton
import triton.language as tl
from json_files import read_json
from pcpo_kernels import (
    Endpoints,
    NoiseKey,
    gated_residual,
    gated_residual_norm,
    guidance,
    modulated_norm,
    norm_rope,
    policy_loss,
    sample_step,
    swiglu,
)
from pcpo_kernels.operators import Operator
from stub_driver import stubbed

LIMIT = 1.15
FLOOR = "two launches, nothing else"
Call = Callable[[], Any]


@triton.jit
def add_kernel(result, x, y, elements, BLOCK: tl.constexpr):
    """The sum of two vectors."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < elements
    tl.store(result + index, tl.load(x + index, mask=mask) + tl.load(y + index, mask=mask), mask=mask)


class Floor(torch.autograd.Function):
    """As little as two launches of Triton with autograd around them take: nothing checked, two tensors kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, y)
        return Floor.add(x, y)

    @staticmethod
    def backward(ctx: Any, incoming: torch.Tensor) -> tuple[torch.Tensor, None]:
        _, y = ctx.saved_tensors
        return Floor.add(incoming, y), None

    @staticmethod
    def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """One launch."""
        result = torch.empty_like(x)
        add_kernel[(16,)](result, x, y, x.numel(), BLOCK=1024, num_warps=4)
        return result


def calls() -> dict[str, Call]:
    """The calls, by name; the sizes matter little, since nothing runs."""

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    def low(*shape: int) -> torch.Tensor:
        return random(*shape, dtype=torch.bfloat16)

    grad = torch.autograd.grad
    rows, elements = 4, 4096
    one = torch.ones(())
    output, old = low(rows, elements).requires_grad_(), low(rows, elements)
    key = NoiseKey(torch.arange(rows), torch.arange(rows) * elements)
    x = random(rows, elements)
    a, b, std = (random(rows) for _ in range(3))
    ends = Endpoints(x, random(rows, elements), a, b, std)
    columns = [random(rows) for _ in range(4)]

    def loss(noise: NoiseKey | Endpoints) -> torch.Tensor:
        return policy_loss(output, old, noise, *columns, clip_range=1e-4).loss

    tokens, branch = (low(2, 64, 3072).requires_grad_() for _ in range(2))
    incoming = low(2, 64, 3072)
    shift, scale, gate = low(2, 9216).chunk(3, 1)
    hidden = low(2, 64, 6144).requires_grad_()
    query, image = (low(2, 64, 24, 128).requires_grad_() for _ in range(2))
    joined, weight, table = low(2, 128, 24, 128), low(128), random(128, 128)

    def rope() -> torch.Tensor:
        return norm_rope(query, weight, table, table, second=image, second_weight=weight)

    return {
        FLOOR: lambda: grad(Floor.apply(output, old), [output], old),
        "policy_loss, key": lambda: grad(loss(key), [output], one),
        "policy_loss, endpoints": lambda: grad(loss(ends), [output], one),
        "sample_step, key": lambda: sample_step(x, old, a, b, std, key),
        "guidance": lambda: grad(guidance(old, output, std), [output], old),
        "modulated_norm": lambda: grad(modulated_norm(tokens, shift, scale), [tokens], incoming),
        "gated_residual": lambda: grad(gated_residual(tokens, branch, gate), [tokens, branch], incoming),
        "gated_residual_norm": lambda: grad(
            gated_residual_norm(tokens, branch, gate, shift, scale), [tokens, branch], [incoming, incoming]
        ),
        "norm_rope, two sequences": lambda: grad(rope(), [query, image], joined),
        "swiglu": lambda: grad(swiglu(hidden), [hidden], incoming),
    }


def reference() -> Call:
    """PyTorch's own: eight operations on four numbers, recorded, and their backward."""
    start, weight = torch.randn(4).requires_grad_(), torch.randn(4)

    def call() -> Any:
        value = start
        for _ in range(4):
            value = value * weight + weight
        return torch.autograd.grad(value, [start], weight)

    return call


def microseconds(call: Call, times: int) -> float:
    """CPU time of this thread for one call."""
    begin = time.thread_time()
    for _ in range(times):
        call()
    return 1e6 * (time.thread_time() - begin) / times


def measure(times: int, repeats: int) -> dict[str, dict[str, float]]:
    """Median CPU microseconds of each call, and the median of its ratios to the reference timed beside it."""
    records = {}
    compared = reference()
    with stubbed():
        for name, call in calls().items():
            pairs = []
            for repeat in range(repeats + 1):
                pair = microseconds(call, times), microseconds(compared, times)
                if repeat:  # the first compiles
                    pairs.append(pair)
            records[name] = {
                "microseconds": round(statistics.median(ours for ours, _ in pairs), 1),
                "reference_microseconds": round(statistics.median(theirs for _, theirs in pairs), 1),
                "ratio": round(statistics.median(ours / theirs for ours, theirs in pairs), 3),
            }
    return records


def dearer(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """A line for each call whose ratio grew by more than 15 %, or that is missing."""
    lines = []
    for name, record in before["calls"].items():
        if name not in now["calls"]:
            lines.append(f"{name}: not measured")
            continue
        growth = now["calls"][name]["ratio"] / record["ratio"]
        if growth > LIMIT:
            lines.append(f"{name}: {growth:.2f} times the host time of the baseline, at most {LIMIT} allowed")
    return lines


def processor() -> str:
    """The CPU's name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit status is 1 where a call became dearer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument(
        "--against",
        type=Path,
        nargs="+",
        help="compare the ratios with those of the file from this CPU, or of the first",
    )
    parser.add_argument(
        "--registered", action="store_true", help="call the registered ops, as eager calls would without their shortcut"
    )
    parser.add_argument("--times", type=int, default=200, help="calls timed at once (%(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="how often (%(default)s)")
    chosen = parser.parse_args(arguments)
    baselines = [read_json(file) for file in chosen.against or ()]
    torch.set_num_threads(1)
    # A plain function in the class, since Python looks special methods up there.
    through = patch.object(Operator, "__call__", lambda op, *given: op._dispatch(given))
    with through if chosen.registered else nullcontext():
        records = measure(chosen.times, chosen.repeats)
    content = {
        "cpu": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "calls": records,
    }
    print(
        f"{content['cpu']}, torch {content['torch']}, triton {content['triton']}: CPU microseconds, forward + backward"
    )
    for name, record in content["calls"].items():
        print(f"{name:28}{record['microseconds']:8.1f}   {record['ratio']:.2f} of the reference")
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(content, indent=1) + "\n")
    baselines.sort(key=lambda baseline: baseline["cpu"] != content["cpu"])
    worse = dearer(content, baselines[0]) if baselines else []
    for line in worse:
        print(f"error: {line}", file=sys.stderr)
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
